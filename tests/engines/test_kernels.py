"""What surrounds the integer products: near float64, and the same bits on every processor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.torch.kernels import largest_activation, run
from engines.torch.kernels.compiling import compiled
from engines.torch.kernels.instructions import pointer_to
from engines.torch.kernels.row import attend, exp, gate_row, normalise

Floats = npt.NDArray[np.float32]


@compiled
def gated(row: Any, width: int) -> None:
    gate_row(pointer_to(row, 0), pointer_to(row, width), width)


@compiled
def normalised(row: Any, out: Any) -> None:
    normalise(pointer_to(row, 0), row.shape[0], np.float32(1e-6), pointer_to(out, 0))


@compiled
def exponentials(row: Any, out: Any) -> None:
    for i in range(row.shape[0]):
        out[i] = exp(row[i])


@compiled
def attend_once(
    query: Any, keys: Any, values: Any, past: int, tail: Any, count: int, scores: Any, out: Any
) -> None:
    attend(
        pointer_to(query, 0), pointer_to(keys, 0), pointer_to(values, 0),
        query.shape[0], past, pointer_to(tail, 0), count, pointer_to(scores, 0),
        pointer_to(out, 0),
    )  # fmt: skip


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_exponentials_are_right_to_two_units_in_the_last_place() -> None:
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    out = np.empty_like(x)
    exponentials(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=2.4e-7)


@pytest.mark.parametrize("width", [1, 7, 8, 48, 1536])
def test_gates(width: int) -> None:
    row = random(2 * width) * 20
    row[0] = -200
    gate, up = row.astype(np.float64)[:width], row.astype(np.float64)[width:]
    gated(row, width)
    np.testing.assert_allclose(row[:width], gate / (1 + np.exp(-gate)) * up, rtol=1e-6, atol=1e-30)


def test_a_damaged_gate_shows() -> None:
    row = np.array([np.nan, 1, np.inf, 1, 1, 1], np.float32)
    gated(row, 3)
    assert np.isnan(row[0])
    assert row[2] == np.inf


@pytest.mark.parametrize("width", [1, 6, 36, 576, 4001])
def test_norms(width: int) -> None:
    row = random(width)
    out = np.empty_like(row)
    normalised(row, out)
    exact = row / np.sqrt(np.mean(row.astype(np.float64) ** 2) + 1e-6)
    np.testing.assert_allclose(out, exact, rtol=1e-5)


def attended(query: Floats, keys: Floats, values: Floats, past: int, tail: list[int]) -> Floats:
    count = past + len(tail)
    out = np.empty_like(query)
    places = np.array([*tail, 0], np.int32)
    attend_once(query, keys, values, past, places, count, np.empty(count, np.float32), out)
    return out


@given(st.sampled_from([6, 20, 64, 128]), st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_attention_sees_its_prefix_and_its_path_wherever_they_lie(
    dim: int, past: int, num_tail: int
) -> None:
    count = past + num_tail
    query, keys, values = random(dim), random(60, dim, seed=1), random(60, dim, seed=2)
    scores = keys[:count].astype(np.float64) @ query / dim**0.5
    shares = np.exp(scores - scores.max())
    exact = shares / shares.sum() @ values[:count]
    in_order = attended(query, keys, values, count, [])
    np.testing.assert_allclose(in_order, exact, rtol=1e-4, atol=1e-5)
    tail = list(range(past, count))
    assert np.array_equal(attended(query, keys, values, past, tail), in_order)
    elsewhere = [59 - 2 * i if 59 - 2 * i >= count else place for i, place in enumerate(tail)]
    for there, here in zip(elsewhere, tail, strict=True):
        keys[there], values[there] = keys[here], values[here]
    assert np.array_equal(attended(query, keys, values, past, elsewhere), in_order)


def test_machine_code_is_kept_apart_for_each_state_of_the_sources() -> None:
    path: Any = run
    assert re.search(r"/[0-9a-f]{16}/kernels_[0-9a-f]{40}$", path.stats.cache_path)


def test_no_sum_leaves_int32() -> None:
    for width in (8, 576, 4096, 8960, 100_000):
        assert largest_activation(width) * 127 * width < 2**31


DIGEST = """
import torch
from engines.torch.integer_decoder import convert
from engines.torch.linears import integer
from engines.torch.network import CausalNetwork
from engines.torch.probe import probe
from engines.torch.weights import MappedWeights
from tests.engines.tiny import random_model
model = random_model(hidden_size=72, head_dim=20)
decoder = convert(model.config, MappedWeights(model.state_dict()))
print(probe(CausalNetwork(decoder, 200, integer), 200, torch.device("cpu")).digest)
"""


@pytest.mark.long
@pytest.mark.slow_model
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="compiles for another x86 processor")
def test_the_bits_do_not_depend_on_the_processor(tmp_path: Path) -> None:
    """As on a processor of the year 2003, with vectors half as wide and nothing fused."""
    chosen = {
        "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2",
        "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path.cwd()),
    }  # fmt: skip
    there, here = (
        subprocess.run(
            [sys.executable, "-c", DIGEST], env={**os.environ, **changed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for changed in (chosen, {"PYTHONPATH": str(Path.cwd())})
    )  # fmt: skip
    assert there == here
    assert len(here.strip()) == 64
