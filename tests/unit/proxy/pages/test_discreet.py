"""What clients are not told of the machine."""

from __future__ import annotations

from typing import Any

from smartproxy.proxy.auth import Role
from smartproxy.proxy.pages.discreet import for_role

BODY: dict[str, Any] = {
    "status": "degraded",
    "mode": "gpu",
    "reasons": [
        *("the manager gave no sign for 7 s", "gpu 0: lost /dev/nvidia0", "secret-model failed"),
        *("other-model failed", "the state file can't be read: /srv/state.db"),
    ],
    "manager": {"pid": 7, "alive": False, "llama_server": "/opt/llama-server", "build": "b1"},
    "servers": [{"model_id": "m", "process": 8, "reason": "open /srv/m.gguf failed"}],
    "gpu_pool_status": {"gpu_list": [{"id": 0, "processes": [{"pid": 1, "name": "game"}]}]},
}


def test_a_client_is_told_no_pids_paths_and_processes_of_others() -> None:
    told = for_role(BODY, Role.CLIENT)
    assert told["manager"] == {"pid": None, "alive": False, "llama_server": None, "build": "b1"}
    assert told["servers"] == [{"model_id": "m", "process": None, "reason": "open m.gguf failed"}]
    assert told["gpu_pool_status"] == {"gpu_list": [{"id": 0, "processes": []}]}
    assert "/srv" not in str(told)


def test_a_stranger_is_told_reasons_without_names() -> None:
    assert for_role(BODY, Role.STRANGER) == {
        "status": "degraded",
        "mode": "gpu",
        "reasons": [
            *("the manager does not work", "a GPU is in error", "something does not work"),
            "the state file can't be used",
        ],
    }


def test_an_operator_is_told_all() -> None:
    assert for_role(BODY, Role.ADMIN) is BODY
