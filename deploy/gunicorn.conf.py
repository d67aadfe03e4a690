"""For systemd and others that want a file: `gunicorn -c deploy/gunicorn.conf.py wsgi:app`."""

from smartproxy.proxy.gunicorn_conf import *  # noqa: F403
