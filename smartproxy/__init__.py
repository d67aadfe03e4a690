"""Llama Smart Proxy: one OpenAI-compatible address in front of llama.cpp.

A folder is one body of knowledge. Its docstring says what it knows and what it may import;
docs/architecture.md shows all of them on one page, with the way of a request and of a decision.
The modules beside this file are the front door: the command line, and values, errors, log and
lifetimes that several folders share. They import no folder but commands/ and plain values.
"""
