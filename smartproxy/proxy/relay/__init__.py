"""One request on one server: wait for the server, send, pass the answer on, try again if lost.

Knows what may be repeated, who the answer is written to (a socket, WSGI, nginx), and what a fault
looks like for a client. Which model and whose request was decided before. One event loop.
May import: proxy/wire, errors. werkzeug and flask only for WSGI clients. No state file.
"""
