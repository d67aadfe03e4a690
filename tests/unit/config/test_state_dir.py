"""The folder of the state file: made for its owner alone, refused where others share it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smartproxy.config import state_dir
from smartproxy.errors import ConfigError, StateError
from smartproxy.state import migrate


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    state_dir.prepare(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    state_dir.prepare(folder)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_one_that_others_can_write_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, mode: int
) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"\(mode {mode:04o}\): `chmod 700 {tmp_path}`"):
        state_dir.prepare(tmp_path)
    tmp_path.chmod(0o755)
    state_dir.prepare(tmp_path)


def test_one_of_another_owner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match=f"belongs to user {os.getuid()}.*`chown -R"):
        state_dir.prepare(tmp_path)


@pytest.mark.parametrize("name", state_dir.FILES)
def test_a_link_in_it_is_refused_and_what_it_points_to_stays(tmp_path: Path, name: str) -> None:
    target, folder = tmp_path / "target", tmp_path / "state"
    target.write_text("mine")
    target.chmod(0o644)
    folder.mkdir(mode=0o700)
    (folder / name).symlink_to(target)
    with pytest.raises(ConfigError, match=rf"{name} is a symbolic link: `rm "):
        state_dir.prepare(folder)
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("mine", 0o644)


def test_a_state_file_that_is_a_link_is_not_opened(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch(mode=0o644)
    (tmp_path / "state.db").symlink_to(target)
    with pytest.raises(StateError, match="is a symbolic link"):
        migrate.create(tmp_path / "state.db")
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"", 0o644)
