"""How many bytes a model takes of each device. PURE: values in, values out.

Knows llama.cpp's allocation: weights by layer, KV cache, states, compute buffers, the host's
part, a projector, and how measured loads correct all of it. Formulas name their source.
May import: values of gpus and model_file, errors, types, and of the standard library what has no
disk, clock, process, network or log in it.
"""
