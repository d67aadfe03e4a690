"""What a fault is, and what it can reach: the scene.

A fault is a generator function in a file by subject. Until its `yield` it goes wrong; the driver
lets it be for a while (`hold_s`); what comes after the yield makes it good again. It is recovered
when requests and loads are answered and /health is "ok" again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.client import Answer, Failure, ask
from tests.chaos.judge import OK, Verdict
from tests.chaos.load import Load, chat
from tests.chaos.machine import Machine, becomes
from tests.support.process_tree import Tree

#: what a request in a process that is killed can't have but this
CUT = frozenset({Failure.RESET, Failure.TORN})
#: a stream whose server died is told so in its last event; before any byte it is tried again
SERVER_DIED = frozenset({"backend_failed"})
STOPPING = frozenset({"shutting_down"})


@dataclass(slots=True)
class Scene:
    """What a fault works with. `wrong` takes what the fault itself saw go wrong."""

    machine: Machine
    load: Load
    chooser: random.Random
    wrong: list[str] = field(default_factory=list)
    #: why this fault can't be injected now; it is not counted
    skipped: str = ""
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.machine.port

    @property
    def tree(self) -> Tree:
        return self.machine.tree()

    def expect(self, condition: object, text: str) -> None:
        """Say what is wrong unless a condition holds."""
        if not condition:
            self.wrong.append(text)

    def await_(self, condition: Callable[[], Any], text: str, *, within_s: float = 60.0) -> bool:
        """Wait for a condition; say what is wrong if it does not come to hold."""
        came = becomes(condition, within_s=within_s)
        self.expect(came, f"not within {within_s:g} s: {text}")
        return came

    def beside(self, work: Callable[[], object]) -> None:
        """Do something while the fault lasts; it is waited for before the audit."""
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def settle(self, within_s: float) -> bool:
        """Wait for what `beside` began; returns whether it has ended."""
        end = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def judged(
        self, kind: str, model: str, payload: bytes, *right: str, expected: str = OK
    ) -> Verdict:
        """Ask as the load does. right: the only words that are right, beside what is allowed."""
        verdict = self.load.ask(kind, model, payload, expected=expected)
        if right and verdict.word not in right:
            self.wrong.append(
                f"{model}: {verdict.word} ({verdict.detail}), not {' or '.join(right)}"
            )
        return verdict

    def warm(self, model: str) -> bool:
        """Have a model loaded; returns whether it answered."""
        return self.judged("plain", model, chat(model)).word == OK

    def raw(self, payload: bytes, *, deadline_s: float = 20.0) -> Answer:
        """Send bytes that are not judged by kind; the fault says what is right."""
        return ask(self.port, payload, deadline_s=deadline_s)


#: what a fault's function returns: it yields once
Faulty = Generator[None, None, None]
Script = Callable[[Scene], Faulty]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault."""

    name: str
    subject: str
    script: Script
    #: words (judge.py) that requests may get while it lasts, beside "ok"
    allows: frozenset[str]
    #: seconds it lasts, from the shortest to the longest
    hold_s: tuple[float, float]
    #: seconds within which all must be well again
    within_s: float
    #: how often it is chosen beside others
    weight: float


FAULTS: dict[str, Fault] = {}


def fault(
    name: str,
    *allows: str | frozenset[str],
    hold_s: tuple[float, float] = (0.3, 1.0),
    within_s: float = 60.0,
    weight: float = 1.0,
) -> Callable[[Script], Script]:
    """Register a fault under a name."""

    def register(script: Script) -> Script:
        assert name not in FAULTS, name
        sets = [frozenset({word}) if isinstance(word, str) else word for word in allows]
        FAULTS[name] = Fault(
            name=name,
            subject=script.__module__.rpartition("faults_")[2],
            script=script,
            allows=frozenset[str]().union(*sets),
            hold_s=hold_s,
            within_s=within_s,
            weight=weight,
        )
        return script

    return register
