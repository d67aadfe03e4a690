"""Who an answer is written to, whatever carries the bytes: head, body, and news of a fault.

Two kinds exist: `socket_client` and `wsgi_client`. All of it runs in the relay's loop thread.
"""

from __future__ import annotations

from collections.abc import Callable

import orjson

from smartproxy.errors import SmartProxyError, openai_body
from smartproxy.proxy.wire.bodies import LAST_CHUNK, chunk
from smartproxy.proxy.wire.heads import AnswerHead, Framing
from smartproxy.proxy.wire.own_answers import OwnAnswer, error_answer


def _nothing() -> None:
    """The callback of who has nobody to tell."""


class Client:
    """Who waits for an answer. Ends with exactly one of `finish` and `cut`."""

    #: whether it understands chunked bodies and takes our framing at all
    chunked = True

    def __init__(self) -> None:
        #: a head was sent; errors can't have an HTTP status any more
        self.began = False
        self.ended = False
        #: framing of the body that it gets
        self.framing = Framing.NONE
        self.is_event_stream = False
        #: called once when it goes before the answer's end
        self.on_gone: Callable[[], object] = _nothing
        #: called when it can take more after `full`
        self.on_room: Callable[[], None] = _nothing
        self.sent_status = 0

    @property
    def full(self) -> bool:
        """Whether so much waits to be taken that the server should not be read now."""
        raise NotImplementedError

    def progress_bytes(self) -> int:
        """Return a count that moves while the client takes bytes."""
        raise NotImplementedError

    def begin(self, head: AnswerHead) -> None:
        """Take the head; it leaves with the first `write`."""
        self.began = True
        self.sent_status = head.status
        self.framing = head.framing
        if head.framing in (Framing.CHUNKED, Framing.CLOSE):
            self.framing = Framing.CHUNKED if self.chunked else Framing.CLOSE
        self.is_event_stream = head.is_event_stream
        self._send_head(head)

    def write(self, data: bytes) -> None:
        """Send body bytes, framed as `framing` says."""
        raise NotImplementedError

    def finish(self) -> None:
        """The answer is complete."""
        raise NotImplementedError

    def cut(self) -> None:
        """The answer can't be completed: end it so that the client notices."""
        raise NotImplementedError

    def write_event(self, event: bytes) -> None:
        """Send bytes of an event stream that are not from the server."""
        self.write(chunk(event) if self.framing is Framing.CHUNKED else event)

    def finish_events(self) -> None:
        """End an event stream that is not the server's own body."""
        if self.framing is Framing.CHUNKED:
            self.write(LAST_CHUNK)
        self.finish()

    def fail(self, error: SmartProxyError, *, torn: bool, reader: bytes) -> None:
        """Say what went wrong in whatever way is still possible.

        reader: the origin whose pages may read it, or nothing.
        torn: the last bytes ended inside a chunk, so nothing can be put behind them.
        """
        if not self.began:
            self.answer(error_answer(error, reader))
        elif self.is_event_stream and not torn and self.framing is not Framing.LENGTH:
            # The blank line ends an event that the server may have left half sent.
            self.write_event(b"\n\ndata: " + orjson.dumps(openai_body(error)) + b"\n\n")
            self.finish_events()
        else:
            self.cut()

    def answer(self, answer: OwnAnswer) -> None:
        """Send a whole answer of our own."""
        self.begin(answer.head)
        self.write(answer.body)
        self.finish()

    def _send_head(self, head: AnswerHead) -> None:
        raise NotImplementedError
