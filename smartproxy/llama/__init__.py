"""All that talks to llama-server: find the binary, build its command line, start it, read its log.

Knows llama-server's options, devices, exit codes and messages, build by build.
It is told where a model goes and does not choose; it keeps nothing in the state file.
Another backend is another folder beside this one.
May import: catalog, config, gpus, memory, values of planner, errors, lifetime, types.
"""
