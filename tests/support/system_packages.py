"""What the tests use of the system, and the Debian packages that have it. Standard library only.

`python tests/support/system_packages.py` prints the packages that are missing here, on one line.
"""

from __future__ import annotations

import shutil
from pathlib import Path

#: nginx is where root alone looks
PATH_OF_ROOT = "/usr/sbin:/usr/local/sbin:/usr/bin:/bin"
#: by what a test asks for: its Debian packages
PACKAGES = {
    "gcc": "gcc libc6-dev",
    "nginx": "nginx-light",
    "sqlite3": "sqlite3",
    "curl": "curl",
    "chromium": "chromium",
    "a Vulkan software device": "mesa-vulkan-drivers",
}


def found(name: str) -> bool:
    """Return whether the system has one of PACKAGES."""
    if name == "a Vulkan software device":
        return any(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    return bool(shutil.which(name) or (name == "nginx" and shutil.which(name, path=PATH_OF_ROOT)))


def reason(name: str) -> str:
    """Return why a test is skipped where this is missing; the summary looks for these words."""
    return f"{name} is not installed: apt-get install {PACKAGES[name]}"


def advice(skipped: dict[str, int]) -> list[str]:
    """Return the lines that say what was skipped and how to get it. skipped: tests by name."""
    lines = [f"skipped {tests} tests: no {name}" for name, tests in skipped.items()]
    packages = " ".join(PACKAGES[name] for name in skipped)
    return [*lines, f"get it: apt-get install --no-install-recommends {packages}"]


if __name__ == "__main__":
    print(*(packages for name, packages in PACKAGES.items() if not found(name)))
