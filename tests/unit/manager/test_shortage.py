"""A model that ran out of GPU memory asks for more at its next load."""

from __future__ import annotations

from typing import Any, cast

import pytest

from smartproxy.errors import LoadFailed
from smartproxy.manager import context
from smartproxy.manager.context import Ahead, NotYet, Preload
from smartproxy.manager.shortage import Facts, Shortage, Shortages, ask
from smartproxy.memory.types import Layout
from smartproxy.types import GIB
from tests.support.worlds import Sketch

TWO_GPUS = Layout(tensor_split=(1.0, 1.0), gpu_layers=8, context_size=8192, cpu_moe_layers=0)


class Spec:
    id = "m"


def test_what_was_read_before_a_shortage_is_raised_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "FRESH_S", 600.0)
    spec, sketch, unread = cast("Any", Spec()), Sketch(), cast("Any", None)
    facts = Facts(need=sketch.need(), loaded=unread, options_key="")
    ahead: Ahead[Facts] = Ahead(lambda: None)
    assert ahead.wait("m", spec, lambda: facts, within_s=30) is facts
    shortages = Shortages(Preload([]))
    assert ask(ahead, unread, shortages, spec) is facts
    shortages.put("m", Shortage(raised_bytes=GIB))
    raised = ask(ahead, unread, shortages, spec).need.estimate(TWO_GPUS)
    plain = sketch.estimate(TWO_GPUS)
    assert [device.compute_bytes for device in raised.devices] == [
        device.compute_bytes + GIB for device in plain.devices
    ]
    assert raised.host == plain.host
    with pytest.raises((NotYet, LoadFailed)):
        ask(ahead, unread, shortages, cast("Any", Spec()))  # another one is read anew
