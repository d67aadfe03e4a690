"""The folder of the state file, the locks and the logs: ours alone, or it is refused.

Who can write there can name any program's pid as ours, and read prompts and the servers' keys.
"""

from __future__ import annotations

import os
from pathlib import Path

from smartproxy.errors import ConfigError

OTHERS_MAY_WRITE = 0o022
#: opened for writing, by name
FILES = ("state.db", "state.db-wal", "state.db-shm", "manager.lock", "serve.lock", "logs")


def prepare(folder: Path) -> None:
    """Make the folder, for its owner alone. Raises ConfigError where others own or can write it.

    Call it before anything in it is opened. A file that is a symbolic link is refused too: what it
    points to would be written, and given to us alone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"state_dir: {folder} can't be made: {error.strerror}") from None
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"state_dir: {folder} belongs to user {found.st_uid}, and this is user {os.geteuid()}:"
            f" run as that user, or `chown -R {os.geteuid()} {folder}`"
        )
    mode = found.st_mode & 0o7777
    if mode & OTHERS_MAY_WRITE:
        raise ConfigError(
            f"state_dir: other users can write to {folder} (mode {mode:04o}): `chmod 700 {folder}`"
        )
    for name in FILES:
        if (folder / name).is_symlink():
            raise ConfigError(
                f"state_dir: {folder / name} is a symbolic link: `rm {folder / name}`; it is made"
                " anew"
            )
