"""Whose run a directory holds: only one plan may fill it, so that its rows belong together."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bus.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PLAN = "plan.json"


def claim(out: Path, plan: DataclassInstance, may_grow: Collection[str]) -> None:
    """Make the directory and note the plan there.

    Args:
        may_grow: attributes of a plan that may differ; with more of them it is the same plan.

    Raises:
        ConfigurationError: it holds another plan's run.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in asdict(plan).items() if name not in may_grow}
    text = json.dumps(kept, default=str)
    path = out / PLAN
    if path.exists() and path.read_text("utf-8") != text:
        raise ConfigurationError(f"{out} holds a run with other settings; use a new --out")
    path.write_text(text, "utf-8")
