"""Faults whose mend is still on its way: by name, the number in issue #10's list of faults.

They are left out until the mend is there; `--all` injects them too.
"""

from __future__ import annotations

NOT_YET: dict[str, str] = {
    "a client closes its half after the request": "F21",
    "requests are malformed": "F15, F16, F21",
    "serve is hung up on": "SIGHUP is to reload",
    "the manager is hung up on": "SIGHUP is to reload",
    "the state file's head is damaged in place": "F5",
    "pages of the state file are damaged in place": "F5",
    "the state file is cut short": "F5",
    "the write-ahead log is removed": "F5",
    "the write-ahead log is damaged in place": "F5",
    "the state file is replaced by an older copy": "F5",
    "the state file is removed": "F6",
    "the state file and its log are removed": "F6",
    "the state file is removed and the manager killed": "F6",
    "a model's file is a pipe": "F4",
    "files appear that lie about their size": "F4",
    "a squatter takes the port of a server that starts": "F13",
    "serve and the manager are killed": "F17",
    "a server is killed while it loads": "F18",
}
