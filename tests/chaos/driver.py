"""The order of a run: load, fault, recovery, rest, audit; and again.

The seed decides which faults come in which order, and what each of them chooses. What the kernel
and the clock do is not in its hand: a run is alike, not the same.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos import (
    faults_clients,
    faults_gpus,
    faults_machine,
    faults_models,
    faults_processes,
    faults_servers,
    faults_state,
)
from tests.chaos.audit import Audit, health_problems, oversubscribed
from tests.chaos.client import DEADLINE_S, ask
from tests.chaos.fault import FAULTS, Fault, Scene
from tests.chaos.judge import OK, judge
from tests.chaos.load import Load, chat
from tests.chaos.machine import CANARY, HOME, Machine
from tests.chaos.not_yet import NOT_YET
from tests.chaos.report import Line, Report

#: the files register their faults
SUBJECTS = (
    *(faults_clients, faults_gpus, faults_machine, faults_models),
    *(faults_processes, faults_servers, faults_state),
)
#: requests are in flight for so long before a fault comes
LEAD_S = 0.3
#: a recovery that takes longer is told with what it waited for
SLOW_S = 5.0


@dataclass(slots=True)
class Driver:
    """One run on one machine."""

    machine: Machine
    report: Report
    chooser: random.Random
    verbose: bool = True
    load: Load = field(init=False)
    audit: Audit = field(init=False)
    _log_read: int = 0
    #: what was not well before all was; told where it took long
    _last_unwell: str = ""

    def __post_init__(self) -> None:
        self.load = Load(self.machine.port, self.report.seed)
        self.audit = Audit(self.machine)

    def run(self, faults: Iterator[Fault], until: float) -> None:
        """Inject one fault after the other until a moment (monotonic seconds)."""
        began = time.monotonic()
        self.load.start()
        try:
            for fault in faults:
                if time.monotonic() > until:
                    break
                self._inject(fault)
                self.report.seconds = time.monotonic() - began
        finally:
            self.load.end()

    def _inject(self, fault: Fault) -> None:
        chooser = random.Random(self.chooser.random())
        scene = Scene(self.machine, self.load, chooser)
        line = self.report.lines.setdefault(fault.name, Line(fault.name, fault.subject))
        began = time.monotonic()
        self._say(f"{fault.subject}: {fault.name} ", end="")
        self.load.go()
        time.sleep(LEAD_S)
        recovered_s = self._make_and_mend(fault, scene)
        if scene.skipped:
            self.report.skipped[fault.name] = scene.skipped
        scene.wrong += self._rest_and_audit(scene)
        scene.wrong += self.load.lies
        seen = len(line.examples)
        line.add(self.load.done, fault.allows)
        line.injections += not scene.skipped
        line.wrong += scene.wrong
        if recovered_s is not None:
            line.recovery_s.append(round(recovered_s, 2))
        self._read_log(fault)
        troubles = "; ".join([*scene.wrong, *line.examples[seen:]])
        took_s = time.monotonic() - began
        self._say(f"{recovered_s or -1:.1f} of {took_s:.0f} s {scene.skipped} {troubles}")
        if scene.wrong:
            self._say("  starting over")
            self.load.rest(DEADLINE_S)
            self.machine.start_over()
            self.audit = Audit(self.machine)
            self._log_read = self.machine.proxy.log_path.stat().st_size

    def _make_and_mend(self, fault: Fault, scene: Scene) -> float | None:
        """Inject, hold and undo a fault; returns the seconds until all was well; None: not so."""
        script, self._last_unwell = fault.script(scene), "nothing"
        try:
            next(script, None)
            if not scene.skipped:
                time.sleep(scene.chooser.uniform(*fault.hold_s))
            mended_at = time.monotonic()
            for _ in script:
                raise AssertionError(f"{fault.name} yields twice")
        except Exception as error:  # noqa: BLE001  # a fault that fails is told, and the run goes on
            scene.wrong.append(f"the fault itself failed: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                script.close()
            return None
        if not self._recovers(fault.within_s):
            scene.wrong.append(f"not well {fault.within_s:g} s after the fault: {self._unwell()}")
            return None
        recovered_s = time.monotonic() - mended_at
        if recovered_s > SLOW_S:
            self._say(f"(slow, last: {self._last_unwell or 'nothing'}) ", end="")
        if not scene.settle(DEADLINE_S):
            scene.wrong.append("what the fault began has not ended")
        return recovered_s

    def _recovers(self, within_s: float) -> bool:
        end = time.monotonic() + within_s
        while why := self._unwell():
            self._last_unwell = why
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def _unwell(self) -> str:
        """Return what is not well: a loaded model, a load, /health, what is promised."""
        for model in (self.chooser.choice(list(HOME)), CANARY):
            verdict = judge("plain", ask(self.machine.port, chat(model), deadline_s=20))
            if verdict.word != OK:
                return f"{model}: {verdict.word} {verdict.detail}"
        return "; ".join(health_problems(self.machine.port))

    def _rest_and_audit(self, scene: Scene) -> list[str]:
        with contextlib.suppress(Exception):
            scene.wrong += oversubscribed(self.machine)
        if not self.load.rest(DEADLINE_S + 15):
            return ["requests are still in flight after their deadline"]
        return self.audit.problems()

    def _read_log(self, fault: Fault) -> None:
        """Count tracebacks: each is something that nobody thought of, though nothing was lost."""
        with self.machine.proxy.log_path.open("rb") as file:
            file.seek(self._log_read)
            text = file.read().decode(errors="replace")
            self._log_read = file.tell()
        for found in re.finditer(r"Traceback \(most recent call last\):\n(?: .*\n)+(.*)", text):
            self.report.tracebacks[f"{fault.name}: {found[1][:160]}"] += 1

    def _say(self, text: str, end: str = "\n") -> None:
        if self.verbose:
            print(text, end=end, file=sys.stderr, flush=True)


def each_once(seed: int, *, all_of_them: bool = False) -> list[Fault]:
    """Return every fault that is to be held, in an order that the seed chooses."""
    faults = [fault for fault in FAULTS.values() if all_of_them or fault.name not in NOT_YET]
    random.Random(seed).shuffle(faults)
    return faults


def for_ever(seed: int, *, all_of_them: bool = False) -> Iterator[Fault]:
    """Yield every fault once, then again and again by weight."""
    chooser = random.Random(seed)
    first = each_once(seed, all_of_them=all_of_them)
    yield from first
    while True:
        yield chooser.choices(first, [fault.weight for fault in first])[0]
