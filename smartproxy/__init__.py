"""Llama Smart Proxy: one OpenAI-compatible address in front of llama.cpp."""
