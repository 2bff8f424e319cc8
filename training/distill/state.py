"""What a distillation knows about itself between two runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from bus.protocol.errors import ConfigurationError
from training.distill.evaluation import DraftQuality
from training.runs import check_same_settings


@dataclass(slots=True)
class RunState:
    """Kept in `work/run.json`.

    Attributes:
        identity: the settings that runs on one directory must share.
        initial: the draft's quality before training, once known.
    """

    path: Path
    identity: dict[str, object]
    initial: DraftQuality | None
    _began: float  # monotonic time at which nothing of the budget was spent

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, object]) -> Self:
        """The state of the run before, or of a new run.

        Raises:
            ConfigurationError: that was a run with other settings, or the file is damaged.
        """
        now, wanted = time.monotonic(), dict(identity)
        if not path.is_file():
            return cls(path, wanted, None, now)
        try:
            kept = json.loads(path.read_text("utf-8"))
            found = kept["identity"]
            initial = None if kept["initial"] is None else quality_from_json(kept["initial"])
            began = now - float(kept["spent"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is damaged ({error}); use a new --out") from error
        check_same_settings(found, wanted, path.parent.parent, "--out")
        return cls(path, wanted, initial, began)

    @property
    def spent(self) -> float:
        """Seconds of the budget spent, over all runs up to their last save."""
        return time.monotonic() - self._began

    def save(self) -> None:
        """Write atomically."""
        kept = {
            "identity": self.identity,
            "initial": None if self.initial is None else asdict(self.initial),
            "spent": self.spent,
        }
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(kept), "utf-8")
        scratch.replace(self.path)


def quality_from_json(kept: dict[str, object]) -> DraftQuality:
    """A `DraftQuality` from `asdict` and JSON, which turns numbers that are keys into text."""
    values = dict(kept)
    for name in ("accepted", "accepted_sampled"):
        windows = values[name]
        assert isinstance(windows, dict)
        values[name] = {int(window): float(length) for window, length in windows.items()}
    return DraftQuality(**values)  # type: ignore[arg-type]  # checked where it is read
