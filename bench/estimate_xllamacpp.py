"""xllamacpp's estimator, for the comparison: in an environment of its own under .bench/."""

from __future__ import annotations

import json
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.support.measured_cases import Case, metadata_of, scratch_folder

FOLDER = Path(__file__).parent.parent / ".bench" / "xllamacpp"
CHILD = Path(__file__).parent / "estimate_xllamacpp_child.py"


def answers(cases: Sequence[Case]) -> list[int | None]:
    """Return its bytes for each case, None where it gave up. Takes minutes; needs the registry.

    Raises CalledProcessError when it can't be installed.
    """
    python = FOLDER / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        subprocess.run([*pip, "xllamacpp", "gguf"], check=True)
    asked = [
        {
            # of a model in parts it reads the first only
            "path": metadata_of(case.file, scratch_folder()).files[0],
            "context_size": case.layout.context_size,
            "ubatch": case.options.ubatch,
            "parallel": case.options.parallel or 4,
            "cache_type": case.options.cache_type_k,
        }
        for case in cases
    ]
    done = subprocess.run(
        [python, "-P", CHILD],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    told: list[int | None] = json.loads(done.stdout)
    return told


def version() -> str:
    """Return the version that answers."""
    code = "from importlib.metadata import version; print(version('xllamacpp'))"
    done = subprocess.run(
        [FOLDER / "bin" / "python", "-c", code], stdout=subprocess.PIPE, check=True, text=True
    )
    return done.stdout.strip()
