"""The application that gunicorn loads in each worker, after the fork."""

from smartproxy.config.load import load_settings
from smartproxy.log import setup_logging
from smartproxy.proxy.app import create_app

setup_logging()
app = create_app(load_settings())
