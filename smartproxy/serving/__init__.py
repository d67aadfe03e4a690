"""`smartproxy serve`: manager and gunicorn as children of one parent, which holds the socket.

Knows lifetimes: a child that dies is started again, and when the parent goes, however it goes,
everything it started goes. It answers no request and reads no state file.
May import: config, errors, lifetime. The manager and the proxy are started as processes, not
imported.
"""
