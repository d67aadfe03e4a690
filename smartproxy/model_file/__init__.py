"""What a GGUF file says: its header, its parts, its tensors, and what kind of file it is.

Knows the format and llama.cpp's keys and architectures. It reads headers, never weights; the bytes
of a file are hostile until shown otherwise. What a model takes of memory is memory's knowledge.
May import: errors, values of gpus. gguf, for its tables of types.
"""
