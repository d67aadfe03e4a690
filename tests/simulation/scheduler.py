"""One virtual clock and one seeded choice of who runs next: the ground that a simulation stands on.

A task is a greenlet: a thread of the manager's, a worker's event loop, a client. Exactly one runs.
It gives way where it sleeps, waits, or reaches the outside (a state write, a spawn, a probe). Then
the seed chooses. Time passes only when nobody can run.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import sys
from asyncio import events
from collections.abc import Callable, Iterable
from typing import Any

import greenlet

#: virtual seconds that a step takes
STEP_S = 2e-5
#: steps after which a seed is taken to go round in circles
MOST_STEPS = 300_000
#: Unix seconds at which every seed begins
EPOCH = 1_800_000_000.0


#: from 3.14 on, a loop can't stand inside a step while another runs in the same thread
WHOLE_STEPS = sys.version_info >= (3, 14)


class Gone(BaseException):
    """Raised in a task whose process was killed: it ends where it stands."""


class Broken(AssertionError):
    """A rule was broken; the message says which."""


class Process:
    """What is killed together: a worker, or a manager with all its threads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.tasks: set[Task] = set()
        #: transactions that it has committed
        self.commits = 0


class Task:
    """One line of execution."""

    __slots__ = ("ended", "epoch", "greenlet", "name", "process", "weight")

    def __init__(self, name: str, process: Process, weight: float) -> None:
        self.name = name
        self.process = process
        #: how readily the seed chooses it
        self.weight = weight
        #: moves when it wakes, so that an earlier alarm finds it gone
        self.epoch = 0
        self.ended = False
        self.greenlet: greenlet.greenlet


class Event:
    """Somebody waits for it in virtual time. Once set it stays set until cleared."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._set = False
        self._waiting: list[Task] = []

    def set(self) -> None:
        self._set = True
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            self._scheduler.wake(task)

    def clear(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block the current task until it is set. False: the time was over before."""
        if not self._set:
            self._waiting.append(self._scheduler.current)
            self._scheduler.block(timeout_s)
            task = self._scheduler.current
            if task in self._waiting:
                self._waiting.remove(task)
        return self._set


class Scheduler:
    """Owns time, tasks and chance of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        #: virtual, monotonic
        self.now = 1000.0
        #: what the wall clock is ahead of EPOCH beside `now`; jumps
        self.wall_offset_s = 0.0
        self.steps = 0
        #: (virtual seconds, task, text with %, its values)
        self.history: list[tuple[float, str, str, tuple[Any, ...]]] = []
        self._hub = greenlet.getcurrent()
        self._ready: list[Task] = []
        self._alarms: list[tuple[float, int, Task, int]] = []
        self._alarm_count = 0
        self.outside = Process("outside")
        self._main = Task("main", self.outside, 1.0)
        self._main.greenlet = self._hub
        self.current = self._main
        self.broken: Broken | None = None

    def time(self) -> float:
        return EPOCH + self.now - 1000.0 + self.wall_offset_s

    def note(self, text: str, *values: Any) -> None:
        """Add a line to the history."""
        self.history.append((self.now, self.current.name, text, values))

    def chance(self, share: float) -> bool:
        return share > 0 and self.random.random() < share

    def spawn(self, name: str, process: Process, work: Callable[[], object]) -> Task:
        """Start a task. What it raises breaks the seed, save that its process was killed."""
        task = Task(name, process, self.random.choice((0.2, 1.0, 1.0, 3.0)))

        def run() -> None:
            try:
                work()
            except Gone:
                pass
            except Broken as error:
                self.broken = self.broken or error
            except BaseException as error:  # noqa: BLE001 - told as what broke the seed
                self.note("ended with %r", error)
                self.broken = self.broken or Broken(f"{name} ended with {error!r}")
                self.broken.__cause__ = error
            finally:
                task.ended = True
                process.tasks.discard(task)

        task.greenlet = greenlet.greenlet(run, parent=self._hub)
        process.tasks.add(task)
        self._ready.append(task)
        return task

    def wake(self, task: Task) -> None:
        """Let a blocked task run again."""
        if not task.ended:
            task.epoch += 1
            self._ready.append(task)

    def block(self, timeout_s: float | None) -> None:
        """Stop the current task until it is woken or the time is over."""
        task = self.current
        if task.process.dead:
            raise Gone
        if timeout_s is not None:
            self._alarm_count += 1
            alarm = (self.now + max(0.0, timeout_s), self._alarm_count, task, task.epoch)
            heapq.heappush(self._alarms, alarm)
        self._leave(task)

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass for the current task."""
        self.block(seconds)

    def pause(self) -> None:
        """Let the seed choose who goes on: the current task, or another that can."""
        task = self.current
        if task.process.dead:
            raise Gone
        if WHOLE_STEPS and events._get_running_loop() is not None:
            return
        if self._ready or (self._alarms and self._alarms[0][0] <= self.now):
            self._ready.append(task)
            self._leave(task)

    def maybe_pause(self, share: float) -> None:
        if self.current.process.dead:
            raise Gone
        if self.random.random() < share:
            self.pause()

    def kill(self, process: Process) -> None:
        """End a process at once: each of its tasks ends where it stands."""
        process.dead = True
        here = greenlet.getcurrent()
        for task in sorted(process.tasks, key=lambda task: task.name):
            if task.greenlet is here or task.ended:
                continue
            caller, self.current = self.current, task
            task.greenlet.parent = here
            with contextlib.suppress(Gone):  # of one that has not begun
                task.greenlet.throw(Gone)
            self.current = caller
            task.ended = True
        process.tasks.clear()

    def run(self, until: Callable[[], bool]) -> None:
        """Let tasks run until the condition holds, or a rule is broken. The main task only."""
        while not until():
            if self.broken is not None:
                raise self.broken
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise Broken(f"no end after {MOST_STEPS} steps")
            self.now += STEP_S
            alarms = self._alarms
            while alarms and (alarms[0][0] <= self.now or not self._ready):
                at, _, task, epoch = heapq.heappop(alarms)
                if task.epoch == epoch and not task.ended:
                    self.now = max(self.now, at)
                    self.wake(task)
            if not self._ready:
                raise Broken("everybody waits for ever")
            task = self._choose()
            if not task.ended:
                self.current = task
                task.greenlet.switch()
                self.current = self._main
        if self.broken is not None:
            raise self.broken

    def _choose(self) -> Task:
        ready = self._ready
        if len(ready) == 1:
            return ready.pop()
        weights = [task.weight for task in ready]
        place = self.random.choices(range(len(ready)), weights)[0]
        ready[place], ready[-1] = ready[-1], ready[place]
        return ready.pop()

    def _leave(self, task: Task) -> None:
        # of a loop that stands in the middle of a step: another may run in between
        loop = events._get_running_loop()
        events._set_running_loop(None)
        try:
            self._hub.switch()
        finally:
            events._set_running_loop(loop)
        if task.process.dead:
            raise Gone

    def told(self, last: int | None = None) -> str:
        """Return the history as text, the last lines of it."""
        lines = self.history if last is None else self.history[-last:]
        return "\n".join(line(*entry) for entry in lines)


def line(at: float, who: str, text: str, values: Iterable[Any]) -> str:
    """Return one line of a history."""
    values = tuple(values)
    return f"{at - 1000.0:10.4f}  {who:<22} {text % values if values else text}"
