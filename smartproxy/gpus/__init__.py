"""What GPUs the machine has, what they hold now, and which processes hold it.

Knows the vendors' libraries: nvml.py alone imports pynvml. Everybody else gets a `GpuSnapshot`.
Another vendor is another module here that answers with the same values.
A GPU that can't be read is an entry with `error`, never an exception for the others.
May import: errors, types. No database, no configuration, no planning.
"""
