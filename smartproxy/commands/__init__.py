"""What `smartproxy COMMAND` does: one file a command, and the options that several share.

Knows click, and how an answer looks in a terminal. It decides nothing: a command calls the folder
that knows, and prints. cli.py lists the commands.
May import: every folder. No folder imports this one; only cli.py does.
"""
