"""Which speculators a cloud worker holds beside its target: a setting → directories."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from bus.protocol.errors import ModelError
from engines.catalog.sources import DEFAULT_SPEC, SPECULATOR_CONFIG

NONE = "none"


def chosen_speculators(setting: str, target: str) -> list[Path]:
    """Directories.

    Args:
        setting: directories, separated by commas; `none`; empty: those shipped for this target.
        target: the target's spec.
    """
    if setting == NONE:
        return []
    if setting:
        return [Path(part.strip()).expanduser() for part in setting.split(",") if part.strip()]
    return shipped_speculators() if target == DEFAULT_SPEC else []


def shipped_speculators() -> list[Path]:
    """Directories of those that come with this project, for the default target; maybe none."""
    # An installed package is a folder, never an archive: the models need far more files.
    root = Path(str(resources.files("engines.torch") / "shipped"))
    return sorted(path.parent for path in root.glob(f"*/{SPECULATOR_CONFIG}"))


def as_setting(directories: Sequence[str]) -> str:
    """What a worker is given for directories named on a command line; `none` alone is none.

    Raises:
        ModelError: one of them holds no speculator.
    """
    if list(directories) == [NONE]:
        return NONE
    paths = [Path(given).expanduser().resolve() for given in directories]
    for path in paths:
        if not (path / SPECULATOR_CONFIG).is_file() or "," in str(path):
            raise ModelError(
                f"{path} holds no speculator; expected a directory with {SPECULATOR_CONFIG}, as "
                "`e2sci train` writes it, whose path has no comma"
            )
    return ",".join(map(str, paths))
