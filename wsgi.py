"""For gunicorn: `gunicorn -c deploy/gunicorn.conf.py wsgi:app`."""

from smartproxy.proxy.wsgi import app

__all__ = ["app"]
