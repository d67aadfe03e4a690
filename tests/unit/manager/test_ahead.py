"""What the main loop asks of files is read beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from smartproxy.errors import LoadFailed, MetadataError
from smartproxy.manager import context
from smartproxy.manager.context import MOST_READERS, Ahead, NotYet

SPEC, OTHER = object(), object()


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """Readers wait for it, as for a file system that does not answer."""
    event = threading.Event()
    yield event
    event.set()


def read_until_there(ahead: Ahead[int], read: Callable[[], int], of: object = SPEC) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            return ahead.get("m", of, read)
        except NotYet:
            time.sleep(0.001)
    pytest.fail("never there")


def test_the_first_question_is_answered_once_it_is_read_and_wakes_the_loop() -> None:
    poked = threading.Event()
    ahead: Ahead[int] = Ahead(poked.set)
    with pytest.raises(NotYet):
        ahead.get("m", SPEC, lambda: 7)
    assert poked.wait(30)
    assert read_until_there(ahead, lambda: 7) == 7


def test_an_error_is_raised_where_it_is_asked_for() -> None:
    def fail() -> int:
        raise MetadataError("broken")

    ahead: Ahead[int] = Ahead(lambda: None)
    with pytest.raises(MetadataError, match="broken"):
        read_until_there(ahead, fail)


def test_an_error_is_raised_once_and_a_mended_file_read_at_once() -> None:
    broken = True

    def read() -> int:
        if broken:
            raise MetadataError("broken")
        return 5

    ahead: Ahead[int] = Ahead(lambda: None)
    with pytest.raises(MetadataError, match="broken"):
        read_until_there(ahead, read)
    broken = False
    assert read_until_there(ahead, read) == 5


def test_an_error_that_nobody_fetched_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "OFTEN_S", 0.0)
    monkeypatch.setattr(context, "FRESH_S", 0.0)
    ended = threading.Event()

    def fail() -> int:
        raise MetadataError("broken")

    ahead: Ahead[int] = Ahead(ended.set)
    with pytest.raises(NotYet):
        ahead.get("m", SPEC, fail)
    assert ended.wait(30)
    with pytest.raises(NotYet):
        ahead.get("m", SPEC, lambda: 6)


def test_an_unexpected_error_is_an_answer_too() -> None:
    ahead: Ahead[int] = Ahead(lambda: None)
    with pytest.raises(LoadFailed, match="ZeroDivisionError"):
        read_until_there(ahead, lambda: 1 // 0)


def test_another_specification_of_the_model_is_read_anew() -> None:
    ahead: Ahead[int] = Ahead(lambda: None)
    assert read_until_there(ahead, lambda: 1) == 1
    with pytest.raises(NotYet):
        ahead.get("m", OTHER, lambda: 2)
    assert read_until_there(ahead, lambda: 2, OTHER) == 2


def test_what_hangs_blocks_nobody_and_is_told_at_the_deadline(hang: threading.Event) -> None:
    def read() -> int:
        hang.wait()
        return 3

    ahead: Ahead[int] = Ahead(lambda: None, deadline_s=0.2)
    with pytest.raises(NotYet):
        ahead.get("m", SPEC, read)
    with pytest.raises(LoadFailed, match=r"could not be read within 0\.2 s"):
        read_until_there(ahead, read)
    hang.set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            assert ahead.get("m", SPEC, read) == 3
            return
        except (NotYet, LoadFailed):
            time.sleep(0.001)
    pytest.fail("it did not recover")


def test_so_many_may_hang_and_no_more_threads_are_spent(hang: threading.Event) -> None:
    def read() -> int:
        hang.wait()
        return 0

    ahead: Ahead[int] = Ahead(lambda: None)
    before = threading.active_count()
    for number in range(3 * MOST_READERS):
        with pytest.raises(NotYet):
            ahead.get(str(number), SPEC, read)
    assert threading.active_count() <= before + MOST_READERS


def test_a_start_may_wait_for_it_but_not_for_ever(hang: threading.Event) -> None:
    ahead: Ahead[int] = Ahead(lambda: None)
    assert ahead.wait("m", SPEC, lambda: 4, within_s=30) == 4

    def read() -> int:
        hang.wait()
        return 0

    with pytest.raises(LoadFailed, match="could not be read"):
        ahead.wait("hung", SPEC, read, within_s=0.05)


def test_a_reader_that_could_not_be_started_is_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ahead: Ahead[int] = Ahead(lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        with pytest.raises(NotYet):
            ahead.get("m", SPEC, lambda: 7)
    assert read_until_there(ahead, lambda: 7) == 7
