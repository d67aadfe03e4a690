"""What the user says: config.json, the environment, and a model's `args` for llama-server.

Knows every key once, with its default, its bounds and one sentence (settings.py), how a wrong
value is told in one line (wording.py), and today's key for each older form (legacy.py).
The only reader of config.json and of our own SMARTPROXY_ variables.
May import: errors, and values of memory and planner that keys are named by. pydantic.
"""
