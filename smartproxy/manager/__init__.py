"""The manager process: it alone starts, watches and stops servers, and looks at the GPUs.

Knows the order of things: look, decide, act, write what happened (tick.py, one screen).
It drives and does not know better: what fits is planner's knowledge, how much a model takes is
memory's, how a server is started is llama's, SQL is state's.
May import: every folder but proxy, serving and commands. psutil, requests, apscheduler.
"""
