"""The parts of the stand-in llama-server; `../llama_server.py` puts them together."""
