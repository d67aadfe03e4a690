"""gunicorn's worker: it accepts, collects whole requests, and keeps connections alive.

Knows gunicorn, the only folder that does so besides proxy's two settings modules, and the short
way of a plain request. Threads run the application; one event loop has all sockets.
May import: proxy, proxy/relay, proxy/wire. gunicorn. No state file: the application has that.
"""
