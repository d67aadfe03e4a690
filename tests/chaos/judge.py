"""What an answer is worth: "ok", a code of the proxy's own, or how it failed.

Nothing here knows of faults; which words a fault may cause stands with the fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.chaos.client import Answer, Failure, events

OK = "ok"
#: an answer that is whole and well-formed, and yet not what it must be
WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    word: str
    detail: str = ""


def judge(kind: str, answer: Answer) -> Verdict:
    """Return the verdict on the answer to a request of this kind (load.py)."""
    if answer.failure is not None:
        return Verdict(word=answer.failure, detail=f"{answer.status} {answer.detail}")
    try:
        if answer.code:
            return _error(answer)
        return _CHECKS[kind](answer)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        text = f"{type(error).__name__} {error}: {answer.body[:200]!r}"
        return Verdict(word=Failure.MALFORMED, detail=f"{answer.status} {text}")


def _error(answer: Answer) -> Verdict:
    """An error of the proxy's own: its body must say the same as its header."""
    body = answer.json()["error"]
    if body["code"] != answer.code or not body["message"] or answer.status < 400:
        return Verdict(word=WRONG, detail=f"{answer.status} {answer.code}: {body}")
    if answer.status == 503 and "retry" in body["message"] and not answer.header("retry-after"):
        return Verdict(word=WRONG, detail=f"no Retry-After: {body}")
    return Verdict(word=answer.code, detail=str(body["message"]))


def _whole(answer: Answer) -> Verdict:
    if answer.status != 200:
        return Verdict(word=WRONG, detail=f"{answer.status} {answer.body[:200]!r}")
    if not answer.json()["choices"][0]["message"]["content"]:
        return Verdict(word=WRONG, detail="an answer without content")
    return Verdict(word=OK)


def _stream(answer: Answer) -> Verdict:
    if answer.status != 200:
        return Verdict(word=WRONG, detail=f"{answer.status} {answer.body[:200]!r}")
    said = events(answer.body)
    last: Any = said[-1] if said else None
    if last == "[DONE]":
        return Verdict(word=OK)
    if isinstance(last, dict) and "error" in last:
        return Verdict(word=str(last["error"].get("code")), detail=str(last["error"]))
    return Verdict(word=Failure.TORN, detail=f"the stream ends with {str(last)[:200]}")


def _upload(answer: Answer) -> Verdict:
    """The stand-in has no such route: its own 404 shows that the whole upload reached it."""
    if answer.status == 404 and answer.json()["error"]["message"] == "File Not Found":
        return Verdict(word=OK)
    return Verdict(word=WRONG, detail=f"{answer.status} {answer.body[:200]!r}")


def _operation(answer: Answer) -> Verdict:
    answer.json()
    return Verdict(word=OK if answer.status == 200 else WRONG, detail=f"{answer.status}")


def _page(answer: Answer) -> Verdict:
    """/health may be 503 while stopping; its body is JSON all the same."""
    body = answer.json()
    if answer.status == 503 and body["manager"]["stopping"]:
        return Verdict(word="shutting_down")
    return Verdict(word=OK if answer.status == 200 else WRONG, detail=f"{answer.status}")


def _figures(answer: Answer) -> Verdict:
    lines = answer.body.decode().splitlines()
    bad = [line for line in lines if line and line[0] != "#" and len(line.rsplit(" ", 1)) != 2]
    return Verdict(word=OK if answer.status == 200 and not bad else WRONG, detail=str(bad[:2]))


def _unknown(answer: Answer) -> Verdict:
    return Verdict(word=WRONG, detail=f"{answer.status}: no error of ours for an unknown model")


_CHECKS = {
    "plain": _whole,
    "stream": _stream,
    "upload": _upload,
    "operation": _operation,
    "page": _page,
    "figures": _figures,
    "unknown": _unknown,
}
