"""The table: laws with and without the change-point test, over the same windows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.progress import counting_bar
from bench.ranges import Interval, paired_interval
from bench.splice.measure import Window, windows_of
from bench.splice.prompts import spliced
from bench.splice.replay import Replay, Stretch, replay
from controller.calibration import load_calibration
from controller.policies import SHIPPED
from decoding.credit import Advice, ConstantPredictor, CreditLaw, always_safe
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

NEVER = math.inf
ALARMS = (NEVER, 1.0, 0.75, 0.5)
SLACKS = (0.25, 0.15)
_CHANGED, _OTHERS = "after a change", "elsewhere"


@dataclass(frozen=True, slots=True)
class SpliceRow:
    """One law in one place, over all texts.

    Attributes:
        place: the `AFTER` windows after a change from high credit, or all others.
        alarm, slack: of the cumulative sum; an infinite alarm is none.
        lenient: share of windows judged above T_base. threshold: mean, in nats.
        regret: nats a token accepted by divergence alone. standing: share of tokens accepted.
        alarms: for 100 windows.
        saved: nats a token against no alarm, with its 95 % interval over texts.
    """

    place: str
    alarm: float | None
    slack: float
    windows: int
    lenient: float
    threshold: float
    regret: float
    standing: float
    alarms: float
    saved: Interval | None


def run(texts: int, max_new_tokens: int, target: str, draft: str, as_json: bool) -> list[SpliceRow]:
    """Measure the windows, replay the laws and print."""
    models = TargetModel.load(target, "float32"), ModelDrafter.load(draft, "float32")
    with counting_bar() as progress:
        measured = [
            windows_of(*models, text, max_new_tokens)
            for text in progress.track(spliced(texts), description="spliced texts")
        ]
    rows = compare(measured, base_law())
    if as_json:
        for row in rows:
            print(json.dumps(msgspec.to_builtins(row)))
    else:
        Console().print(_table(rows, texts))
    return rows


def base_law() -> CreditLaw:
    """The paper's law, ω = 1 and without the safety check, at the shipped neutral credit: a
    calibration that lets credit move little would hide what is looked for."""
    law = load_calibration(SHIPPED).law(CreditLaw())
    return replace(law, predictor=ConstantPredictor(Advice(1.0, 4)), safe=always_safe)


def compare(measured: Sequence[Sequence[Window]], law: CreditLaw) -> list[SpliceRow]:
    """Every alarm and slack over the same windows."""
    without = [replay(windows, replace(law, alarm=NEVER)) for windows in measured]
    rows = [_row(place, None, SLACKS[0], without, None) for place in (_CHANGED, _OTHERS)]
    for slack in SLACKS:
        for alarm in ALARMS[1:]:
            own = replace(law, alarm=alarm, slack=slack)
            found = [replay(windows, own) for windows in measured]
            rows += [_row(place, alarm, slack, found, without) for place in (_CHANGED, _OTHERS)]
    return rows


def _row(
    place: str, alarm: float | None, slack: float, found: Sequence[Replay],
    without: Sequence[Replay] | None,
) -> SpliceRow:  # fmt: skip
    own = [_stretch(text, place) for text in found]
    whole = sum(own, Stretch())
    saved = None if without is None else _saved([_stretch(text, place) for text in without], own)
    windows, tokens = max(whole.windows, 1), max(whole.tokens, 1)
    return SpliceRow(
        place, alarm, slack, whole.windows, whole.lenient / windows, whole.threshold / windows,
        whole.regret / tokens, whole.standing / tokens, 100.0 * whole.alarms / windows, saved,
    )  # fmt: skip


def _stretch(text: Replay, place: str) -> Stretch:
    return text.changed if place == _CHANGED else text.others


def _saved(without: Sequence[Stretch], own: Sequence[Stretch]) -> Interval:
    """Nats a token less; the windows are the same, so each text has its own difference."""
    less = np.array([a.regret - b.regret for a, b in zip(without, own, strict=True)])
    tokens = np.array([stretch.tokens for stretch in own], float)

    def rate(less: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(less.sum(axis=axis) / np.maximum(tokens.sum(axis=axis), 1.0))

    return paired_interval((less, tokens), rate)


def _table(rows: Sequence[SpliceRow], texts: int) -> Table:
    table = Table(
        title=f"Abrupt changes in {texts} spliced texts: distributions measured, laws replayed",
        caption="above base: windows judged above T_base. nats: a token that only divergence let "
        "stand lies below the target's first choice, over all tokens. saved: against no alarm, "
        "95 % interval over texts",
    )
    table.add_column("windows")
    for name in ("alarm", "slack", "", "above base", "mean T", "nats", "stand", "alarms/100",
                 "saved, mnats"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        saved = "–"
        if row.saved is not None:
            value, low, high = (1e3 * part for part in msgspec.structs.astuple(row.saved))
            saved = f"{value:.1f} ({low:.1f} … {high:.1f})"
        table.add_row(
            row.place, "none" if row.alarm is None else f"{row.alarm:g}",
            "–" if row.alarm is None else f"{row.slack:g}", str(row.windows),
            f"{row.lenient:.0%}", f"{row.threshold:.3f}", f"{row.regret:.4f}",
            f"{row.standing:.1%}", f"{row.alarms:.1f}", saved,
        )  # fmt: skip
    return table
