"""The configuration in force: settings and the models that follow from them, always both.

Whoever handles a request or makes a pass asks for it then and keeps it until it is done. So a
configuration that is read anew takes effect at the next request and the next pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from smartproxy.catalog.catalog import Catalog, build_catalog
from smartproxy.config.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Settings, and the catalogue built from them."""

    settings: Settings
    catalog: Catalog


class Live:
    """Holds the configuration in force. Any thread may read; `put` is for one writer a process."""

    def __init__(self, settings: Settings, catalog: Catalog | None = None) -> None:
        self._now = _both(settings, catalog)

    @property
    def now(self) -> Configuration:
        """The configuration in force."""
        return self._now

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._now.settings

    @property
    def catalog(self) -> Catalog:
        """The models in force."""
        return self._now.catalog

    def put(self, settings: Settings, catalog: Catalog | None = None) -> None:
        """Put another configuration in force, both parts at once."""
        self._now = _both(settings, catalog)


def _both(settings: Settings, catalog: Catalog | None) -> Configuration:
    return Configuration(settings=settings, catalog=catalog or build_catalog(settings))
