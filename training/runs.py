"""What every training has: something that shows how far it is, and settings that the runs on one
directory must have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from bus.protocol.errors import ConfigurationError


class Progress(Protocol):
    """Shows how far a run is."""

    def phase(self, name: str) -> None:
        """A phase begins."""

    def advance(self, share: float, tokens: int, loss: float | None = None) -> None:
        """The phase is done to `share`, 0 … 1, with `tokens` more since the last call."""


def check_same_settings(
    found: Mapping[str, object], wanted: Mapping[str, object], directory: Path, option: str
) -> None:
    """Compare the settings a directory was begun with and those of this run.

    Args:
        option: of the command line that names another directory.

    Raises:
        ConfigurationError: one of them differs.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ConfigurationError(
                f"{directory} was begun with {name} {found.get(name)!r}, not {value!r}; repeat its "
                f"settings to go on, or use a new {option}"
            )
