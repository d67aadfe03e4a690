"""gunicorn's own messages in the shape of ours, so that the whole log can be read as one."""

from __future__ import annotations

from typing import Any

from gunicorn.glogging import Logger

from smartproxy.log import LineFormatter


class LineLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's logger; where its lines go is still its own options' business."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        for handler in self.error_log.handlers:
            handler.setFormatter(LineFormatter())
