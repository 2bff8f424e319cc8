"""Spliced texts: which prompts, and what a law lets through behind a change; by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from bench.splice.measure import Token, Window, windows_of
from bench.splice.prompts import KINDS, spliced
from bench.splice.replay import AFTER, replay
from bench.splice.run import compare
from decoding.credit import CreditLaw
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

LAW = CreditLaw(neutral=lambda _: 0.5, band=0.0, hold=0)
EASY = Token(overlap=1.0, divergence=0.0, regret=0.0)
HARD = Token(overlap=0.1, divergence=0.2, regret=0.5)
"""Stands at 0.2 nats and above, where the draft is alike and yet wrong."""


def text(*parts: tuple[Token, int]) -> list[Window]:
    return [
        Window(part, (token,) * 4)
        for part, (token, count) in enumerate(parts)
        for _ in range(count)
    ]  # fmt: skip


def test_every_kind_follows_every_other() -> None:
    texts = spliced(24)
    follows = {(a, b) for t in texts for (a, _), (b, _) in itertools.pairwise(t)}
    assert len(follows) == len(KINDS) * (len(KINDS) - 1)
    assert {prompt for t in texts for _, prompt in t} == {p for ps in KINDS.values() for p in ps}


def test_an_old_threshold_lets_through_what_the_alarm_would_not() -> None:
    """Credit from 10 easy windows asks for more than 0.2; it fades window by window."""
    windows = text((EASY, 10), (HARD, 10))
    slow = replay(windows, replace(LAW, alarm=math.inf))
    quick = replay(windows, replace(LAW, alarm=0.5))
    assert slow.changed.windows == quick.changed.windows == AFTER
    assert slow.others.windows == quick.others.windows == 12
    assert quick.changed.alarms == 1
    assert quick.others.alarms == slow.changed.alarms == 0
    # The first hard window is judged before anything is known; the alarm is heard by the second.
    assert quick.changed.regret == pytest.approx(4 * 0.5)
    assert quick.changed.lenient == 1
    assert slow.changed.regret > quick.changed.regret
    assert slow.changed.regret == pytest.approx(slow.changed.lenient * 2.0, abs=2.0)


def test_where_credit_was_low_nothing_counts_as_a_change() -> None:
    found = replay(text((HARD, 10), (EASY, 10)), LAW)
    assert found.changed.windows == 0
    assert found.others.standing == 40


def test_saving_is_told_by_text_and_with_an_interval() -> None:
    measured = [text((EASY, 10), (HARD, 10 + i)) for i in range(4)]
    rows = compare(measured, LAW)
    none = rows[0]
    assert (none.alarm, none.saved) == (None, None)
    best = next(row for row in rows if row.alarm == 0.5 and row.place == none.place)
    assert best.saved is not None
    assert best.saved.value == pytest.approx(none.regret - best.regret)
    assert best.saved.low <= best.saved.value <= best.saved.high


@pytest.mark.long
@pytest.mark.slow_model
def test_the_pair_reads_its_own_answers() -> None:
    target, draft = TargetModel.load("default", "float32"), ModelDrafter.load("default", "float32")
    windows = windows_of(target, draft, spliced(1)[0], max_new_tokens=10)
    assert [window.part for window in windows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [len(window.tokens) for window in windows] == [4, 4, 2] * 3
    tokens = [token for window in windows for token in window.tokens]
    assert all(0.0 <= t.overlap <= 1.0 and 0.0 <= t.divergence <= math.log(2) for t in tokens)
    assert 3 <= sum(token.regret == 0.0 for token in tokens) < len(tokens)
