from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import Float64Array, Int32Array
from decoding.engine import Want
from decoding.sampling import SamplingParams, warp_dense
from engines.torch import rows as rows_module
from engines.torch.rows import Rows

VOCAB_SIZE = 700

samplings = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.05, 5.0)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    top_k=st.one_of(st.just(0), st.integers(1, VOCAB_SIZE + 50)),
)


def random_logits(seed: int, spread: float, ties: bool) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (3, VOCAB_SIZE))
    if ties:  # as in bfloat16: few distinct values, ties at every cut
        logits = np.round(logits)
    return torch.tensor(logits, dtype=torch.float32)


def clear_of_the_nucleus_edge(logits: Float64Array, sampling: SamplingParams) -> bool:
    """Whether float32 sums, off by less than 1e-6, cannot decide how many tokens top-p keeps."""
    if sampling.greedy or sampling.top_p == 1.0:
        return True
    whole = replace(sampling, top_p=1.0)
    reached = np.cumsum(np.sort(warp_dense(logits, whole))[::-1])
    return bool(np.abs(reached - sampling.top_p).min() > 1e-6)


@settings(max_examples=200, deadline=None)
@given(
    sampling=samplings,
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.01, 1.0, 4.0, 15.0]),
    ties=st.booleans(),
)
@example(SamplingParams(1.0, top_k=5), 0, 1.0, True)
@example(SamplingParams(0.7, top_p=0.95), 0, 0.01, False)  # a nucleus beyond the first look
def test_reduced_rows_are_the_dense_distribution_at_the_ids(
    sampling: SamplingParams, seed: int, spread: float, ties: bool
) -> None:
    logits = random_logits(seed, spread, ties)
    wide = logits.double().numpy()
    rng = np.random.default_rng(seed)
    ids = [rng.permutation(VOCAB_SIZE)[:size].astype(np.int32) for size in (48, 0, 300)]
    rows = Rows.of(logits, sampling)
    assume(all(clear_of_the_nucleus_edge(row, sampling) for row in wide))
    for index, row in enumerate(rows.reduce(wants(ids))):
        p = warp_dense(wide[index], sampling)
        p1 = warp_dense(wide[index], SamplingParams(temperature=1.0))
        assert row.argmax == wide[index].argmax()
        np.testing.assert_allclose(row.p1_at_q, p1[ids[index]], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(rows.dense(index), p, rtol=1e-5, atol=1e-9)
        assert rows.dense(index).sum() == pytest.approx(1.0, abs=1e-6)
        if sampling.greedy:
            assert row.p_at_q.size == 0
        else:
            np.testing.assert_allclose(row.p_at_q, p[ids[index]], rtol=1e-5, atol=1e-9)
            np.testing.assert_array_equal(row.p_at_q == 0, rows.dense(index)[ids[index]] == 0)


@pytest.mark.parametrize("first_look", [1, 3, 512, 10_000])
def test_how_many_candidates_are_looked_at_first_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, first_look: int
) -> None:
    sampling = SamplingParams(temperature=1.3, top_p=0.8)
    logits = random_logits(3, 2.0, ties=True)
    expected = Rows.of(logits, sampling).dense(1)
    monkeypatch.setattr(rows_module, "_FIRST_LOOK", first_look)
    np.testing.assert_allclose(Rows.of(logits, sampling).dense(1), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_large_flat_row_sums_to_one_within_a_millionth(temperature: float) -> None:
    """150,000 logits far from 0: a float32 log-sum-exp would be off by more."""
    logits = torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0)) + 25
    everything = np.arange(150_000, dtype=np.int32)
    (row,) = Rows.of(logits, SamplingParams(temperature)).reduce(wants([everything]))
    assert row.p1_at_q.sum() == pytest.approx(1.0, abs=1e-6)
    assert row.p_at_q.sum() == pytest.approx(1.0, abs=1e-6)


def wants(row_ids: list[Int32Array]) -> list[Want]:
    return [Want(index, ids) for index, ids in enumerate(row_ids)]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ONE_BY_ONE = (
    SamplingParams(0.7),
    SamplingParams(1.0),
    SamplingParams(0.8, top_p=0.9),
    SamplingParams(0.0),
)


@pytest.mark.parametrize("sampling", ONE_BY_ONE, ids=["T", "plain", "top-p", "greedy"])
@pytest.mark.parametrize("width", [300, 49_152, 151_665])
def test_rows_have_the_same_bits_alone_in_windows_and_on_any_threads(
    width: int, sampling: SamplingParams
) -> None:
    logits = 4 * torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    rng = np.random.default_rng(width)
    ids = [rng.permutation(width)[:size].astype(np.int32) for size in (48, 5, 0, 17, 48)]
    alone = [_bits(logits[i : i + 1].clone(), ids[i : i + 1], sampling)[0] for i in range(5)]
    for number in (1, 2, 3, 4):
        with threads(number):
            for windows in ([5], [1, 4], [2, 3]):
                parts = torch.split(logits, windows)
                ends = np.cumsum(windows)
                found = [
                    row
                    for part, end in zip(parts, ends, strict=True)
                    for row in _bits(part, ids[end - len(part) : end], sampling)
                ]
                assert found == alone, f"{number} threads, windows {windows}"


def _bits(
    logits: torch.Tensor, ids: list[Int32Array], sampling: SamplingParams
) -> list[tuple[object, ...]]:
    """Everything that comes of each row, as bytes."""
    rows = Rows.of(logits, sampling)
    return [
        (row.argmax, row.p1_at_q.tobytes(), row.p_at_q.tobytes(), row.p1_max,
         rows.dense(index).tobytes())
        for index, row in enumerate(rows.reduce(wants(ids)))
    ]  # fmt: skip


def test_bfloat16_logits_are_reduced_as_the_numbers_they_are() -> None:
    logits = random_logits(1, 3.0, ties=False).bfloat16()
    ids = np.arange(VOCAB_SIZE, dtype=np.int32)
    sampling = SamplingParams(temperature=0.9, top_k=30)
    row = Rows.of(logits, sampling).reduce(wants([ids] * 3))[0]
    expected = warp_dense(logits[0].double().numpy(), sampling)
    np.testing.assert_allclose(row.p_at_q, expected, rtol=1e-5, atol=1e-9)
