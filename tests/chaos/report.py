"""What a run found, as JSON and as a table: fault x injections, requests, answers, seconds."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from tests.chaos.client import Failure
from tests.chaos.judge import OK
from tests.chaos.load import Done

#: verdicts that are kept whole, of each fault
KEPT = 20


@dataclass(slots=True)
class Line:
    """One kind of fault."""

    name: str
    subject: str
    injections: int = 0
    requests: int = 0
    answered: int = 0
    #: errors that the fault may cause, by word
    errors: Counter[str] = field(default_factory=Counter)
    #: what it may not cause, by word
    lost: Counter[str] = field(default_factory=Counter)
    hung: int = 0
    recovery_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def add(self, done: list[Done], allows: frozenset[str]) -> None:
        """Count the requests of one injection."""
        for one in done:
            word = one.verdict.word
            self.requests += 1
            if word == OK:
                self.answered += 1
            elif word == Failure.LATE:
                self.hung += 1
                self._keep(one)
            elif word in allows:
                self.errors[word] += 1
            else:
                self.lost[word] += 1
                self._keep(one)

    def _keep(self, one: Done) -> None:
        if len(self.examples) < KEPT:
            took = f"{one.ended - one.began:.1f} s"
            text = one.verdict.detail[:400]
            self.examples.append(f"{one.kind} {one.model}: {one.verdict.word} after {took}: {text}")

    def as_json(self) -> dict[str, Any]:
        names = ("name", "subject", "injections", "requests", "answered", "hung", "recovery_s")
        plain = {name: getattr(self, name) for name in (*names, "wrong", "examples")}
        return {**plain, "errors": dict(self.errors), "lost": dict(self.lost)}

    def take(self, said: dict[str, Any]) -> None:
        """Add what another run said of the same fault (as_json)."""
        for name in ("injections", "requests", "answered", "hung", "recovery_s", "wrong"):
            setattr(self, name, getattr(self, name) + said[name])
        self.examples += said["examples"]
        self.errors.update(said["errors"])
        self.lost.update(said["lost"])

    @property
    def clean(self) -> bool:
        return not self.lost and not self.hung and not self.wrong


@dataclass(slots=True)
class Report:
    """All of a run."""

    seed: int
    about: dict[str, Any]
    lines: dict[str, Line] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tracebacks: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        return all(line.clean for line in self.lines.values())

    def totals(self) -> dict[str, int]:
        lines = self.lines.values()
        return {
            "kinds": len(lines),
            "injections": sum(line.injections for line in lines),
            "requests": sum(line.requests for line in lines),
            "answered": sum(line.answered for line in lines),
            "errors": sum(line.errors.total() for line in lines),
            "lost": sum(line.lost.total() for line in lines),
            "hung": sum(line.hung for line in lines),
            "wrong": sum(len(line.wrong) for line in lines),
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            **self.about,
            "seconds": round(self.seconds),
            "totals": self.totals(),
            "faults": [line.as_json() for line in self.lines.values()],
            "skipped": self.skipped,
            "tracebacks": dict(self.tracebacks.most_common()),
        }

    def table(self, style: str = "simple") -> str:
        heads = ["fault", "injected", "requests", "answered", "errors", "lost", "hung", "wrong"]
        rows = [
            [
                *(f"{line.subject}: {line.name}", line.injections, line.requests, line.answered),
                *(_words(line.errors), _words(line.lost), line.hung, len(line.wrong)),
                *_seconds(line.recovery_s),
            ]
            for line in sorted(self.lines.values(), key=lambda line: (line.subject, line.name))
        ]
        totals = self.totals()
        names = ("injections", "requests", "answered", "errors", "lost", "hung", "wrong")
        rows.append(["all", *(totals[name] for name in names), "", ""])
        return tabulate(rows, [*heads, "median s", "max s"], tablefmt=style)

    def complaints(self) -> str:
        """Return what went wrong, a line each."""
        return "\n".join(
            f"{line.subject}: {line.name}: {text}"
            for line in self.lines.values()
            for text in [*line.wrong, *line.examples]
        )


def merged(runs: list[dict[str, Any]]) -> Report:
    """Return one report of several runs (as_json)."""
    report = Report(runs[0]["seed"], {})
    for run in runs:
        report.seconds += run["seconds"]
        for said in run["faults"]:
            name = said["name"]
            report.lines.setdefault(name, Line(name, said["subject"])).take(said)
    return report


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "0"


def _seconds(values: list[float]) -> list[str]:
    if not values:
        return ["", ""]
    return [f"{statistics.median(values):.1f}", f"{max(values):.1f}"]
