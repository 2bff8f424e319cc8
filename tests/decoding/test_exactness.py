"""Exact verification commits tokens distributed as the target's own: proved by enumeration.

One step is integrated over its three uniforms by bisection of the real functions; whole answers
are enumerated through both state machines, for every way to cut them into windows.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from bus.protocol.arrays import Float16Array, Float64Array, Int32Array
from bus.protocol.bounds import SessionCoupling
from decoding.acceptance import accepts_exactly, draw_residual
from decoding.engine import TargetRow, Want
from decoding.methods import exact
from decoding.rows import reduced
from decoding.sampling import (
    SamplingParams,
    SparseDistribution,
    draw_dense,
    from_wire,
    warp,
    warp_dense,
)
from decoding.uniforms import Purpose
from tests import toy
from tests.harness import EdgeCloudPair
from tests.toy import ToyPair

BISECTIONS = 45


def measure(draw: Callable[[float], int], size: int) -> Float64Array:
    """The distribution of `draw(u)` over uniform u: u-intervals of each outcome, by bisection."""
    probs = np.zeros(size)

    def visit(low: float, high: float, at_low: int, at_high: int, depth: int) -> None:
        if at_low == at_high or depth == BISECTIONS:
            probs[at_low] += high - low
            return
        middle = (low + high) / 2
        at_middle = draw(middle)
        visit(low, middle, at_low, at_middle, depth + 1)
        visit(middle, high, at_middle, at_high, depth + 1)

    edges = np.linspace(0.0, 1.0 - 2**-50, 33)  # no interval between equal ends hides another
    for low, high in itertools.pairwise(edges):
        visit(float(low), float(high), draw(float(low)), draw(float(high)), 0)
    return probs


def committed(p: Float64Array, q: SparseDistribution) -> Float64Array:
    """The distribution of one committed token under the real acceptance and recovery."""
    drafted = measure(q.draw, p.size)
    total = np.zeros(p.size)
    rejected = 0.0
    for token in q.ids:
        chance = measure(partial(_rejects, float(p[token]), q.prob(int(token))), 2)
        total[token] += drafted[token] * chance[0]
        rejected += drafted[token] * chance[1]
    if rejected > 1e-12:
        total += rejected * measure(lambda u: draw_residual(p, q, u), p.size)
    return total


def _rejects(p_x: float, q_x: float, u: float) -> int:
    return int(not accepts_exactly(p_x, q_x, u))


logits = st.lists(st.floats(-4, 4), min_size=4, max_size=4).map(np.array)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    top_k=st.integers(0, 4),
)


@settings(max_examples=60, deadline=None)
@given(target=logits, draft=logits, sampling=params, num_sparse=st.integers(1, 4))
def test_one_token_is_distributed_as_the_targets(
    target: Float64Array, draft: Float64Array, sampling: SamplingParams, num_sparse: int
) -> None:
    """For truncated q, every temperature, top-k and top-p."""
    p = warp_dense(target, sampling)
    dense = np.exp(draft - draft.max())
    ids = np.argsort(-dense)[:num_sparse].astype(np.int32)
    q = warp(from_wire(ids, (dense[ids] / dense.sum()).astype(np.float16)), sampling)
    np.testing.assert_allclose(committed(p, q), p, atol=2e-9)


TARGET_TABLES = (
    (0.25, 0.5, 0.25), (0.75, 0.25, 0.0), (0.0, 0.5, 0.5), (0.25, 0.25, 0.5), (1.0, 0.0, 0.0),
)  # fmt: skip
DRAFT_TABLES = {
    3: ((0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5)),
    2: ((0.375, 0.375, 0.25), (0.25, 0.375, 0.375), (0.375, 0.25, 0.375)),  # halves, once cut
}


class TablePair(ToyPair):
    """Distributions in quarters: the four uniforms of `EveryUniform` integrate them exactly."""

    def target_logits(self, prefix: tuple[int, ...]) -> Float64Array:
        with np.errstate(divide="ignore"):
            logits: Float64Array = np.log(np.array(_pick(TARGET_TABLES, prefix, 1)))
        return logits

    def draft_probs(self, prefix: tuple[int, ...]) -> tuple[Int32Array, Float16Array]:
        probs = np.array(_pick(DRAFT_TABLES[self.num_sparse], prefix, 3))
        ids = np.lexsort((np.arange(3), -probs))[: self.num_sparse].astype(np.int32)
        return ids, probs[ids].astype(np.float16)


def _pick(
    tables: tuple[tuple[float, ...], ...], prefix: tuple[int, ...], which: int
) -> tuple[float, ...]:
    return tables[sum((i + which) * (t + 2) for i, t in enumerate(prefix)) % len(tables)]


class EveryUniform:
    """Stands in for `uniform`: over all runs, each address asked for takes each of four values."""

    GRID = (0.125, 0.375, 0.625, 0.875)

    def __init__(self) -> None:
        self._script: list[int] = []
        self._chosen: dict[tuple[int, Purpose], float] = {}

    def __call__(self, seed: int, position: int, purpose: Purpose) -> float:
        address = (position, purpose)
        if address not in self._chosen:
            if len(self._chosen) == len(self._script):
                self._script.append(0)
            self._chosen[address] = self.GRID[self._script[len(self._chosen)]]
        return self._chosen[address]

    def next_run(self) -> bool:
        """Turn to the next combination; False once all have been."""
        self._chosen = {}
        while self._script and self._script[-1] == len(self.GRID) - 1:
            self._script.pop()
        if not self._script:
            return False
        self._script[-1] += 1
        return True

    @property
    def probability(self) -> float:
        """Of the run just made."""
        return float(len(self.GRID)) ** -len(self._chosen)


END = 3
"""Of the answers that are enumerated: a prompt of one token and two more."""


@dataclass(frozen=True)
class DrawnChoice:
    """The target's own choice by an enumerated uniform, drawn only when it is looked at; beyond
    the end of the answer any will do."""

    probs: Float64Array
    position: int
    uniforms: EveryUniform

    @property
    def token(self) -> int:
        if self.position >= END:
            return 0
        return draw_dense(self.probs, self.uniforms(0, self.position, Purpose.NOISE))


@pytest.mark.parametrize(
    ("num_sparse", "windows"),
    [
        (3, (1, 3)),
        pytest.param(3, (1,), marks=pytest.mark.long),
        pytest.param(3, (2,), marks=pytest.mark.long),
        pytest.param(2, (2,), marks=pytest.mark.long),
    ],
)
def test_whole_answers_are_distributed_as_the_targets(
    monkeypatch: pytest.MonkeyPatch, windows: tuple[int, ...], num_sparse: int
) -> None:
    """Two tokens through both machines, for every value of every uniform that is asked for."""
    pair = TablePair(vocab_size=3, num_sparse=num_sparse)
    uniforms = EveryUniform()

    def drawn(logits: Float64Array, want: Want, sampling: SamplingParams) -> TargetRow:
        row = reduced(logits, want, sampling)
        if want.choice_at is None:
            return row
        choice: Any = DrawnChoice(warp_dense(logits, sampling), want.choice_at, uniforms)
        return structs.replace(row, choice=choice)

    monkeypatch.setattr(toy, "uniform", uniforms)
    monkeypatch.setattr(exact, "uniform", uniforms)
    monkeypatch.setattr(toy, "reduced", drawn)
    sampling = SamplingParams(temperature=1.0, coupling=SessionCoupling.RESIDUAL)
    got: dict[tuple[int, ...], float] = defaultdict(float)
    going_on = True
    while going_on:
        run = EdgeCloudPair(pair, sampling, prompt=(1,), max_new_tokens=2, windows=windows)
        got[run.run()] += uniforms.probability
        going_on = uniforms.next_run()
    assert sum(got.values()) == pytest.approx(1.0)
    for answer in itertools.product(range(3), repeat=2):
        expected = 1.0
        for i, token in enumerate(answer):
            expected *= warp_dense(pair.target_logits((1, *answer[:i])), sampling)[token]
        assert got[answer] == pytest.approx(expected, abs=1e-12)


def test_residual_of_equal_distributions_is_the_distribution() -> None:
    q = SparseDistribution(np.array([0, 1], dtype=np.int32), np.array([0.5, 0.5]))
    p = np.array([0.5, 0.5])
    assert draw_residual(p, q, 0.7) == draw_dense(p, 0.7)
