"""A row's result has the same bits alone, among others, and at 1 to 4 threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import rowwise

THREADS = st.integers(1, 4)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Of many magnitudes, so that a sum's order shows in its last bits."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * torch.randn(*shape, generator=generator).exp()


def alone(operation: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Row by row on one thread."""
    torch.set_num_threads(1)
    return torch.cat([operation(row.clone()) for row in torch.split(rows, 1)])


def cut(operation: Callable[[Tensor], Tensor], rows: Tensor, size: int, threads: int) -> Tensor:
    torch.set_num_threads(threads)
    return torch.cat([operation(part) for part in torch.split(rows, size)])


# 12,288 · 16 and 40,000 are beyond what torch runs on one thread.
WIDTHS = st.sampled_from([16, 48, 80, 576, 1536, 2720, 4864, 12_288])


@given(WIDTHS, st.integers(1, 16), THREADS)
@settings(max_examples=20, deadline=None)
@torch.inference_mode()
def test_gated_rows_do_not_see_each_other(width: int, size: int, threads: int) -> None:
    rows = random(17, 2 * width)
    expected = alone(rowwise.gated, rows)
    assert torch.equal(cut(rowwise.gated, rows, size, threads), expected)
    gate, up = rows.double().chunk(2, dim=1)
    torch.testing.assert_close(expected.double(), F.silu(gate) * up, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("width", [40_000, 70_016])
@torch.inference_mode()
def test_rows_wider_than_a_threads_share(width: int) -> None:
    rows = random(3, width)
    expected = alone(rowwise.silu, rows)
    for threads in (1, 2, 3):
        assert torch.equal(cut(rowwise.silu, rows, 3, threads), expected)


@given(st.integers(1, 4000), st.integers(1, 16), THREADS)
@settings(max_examples=20, deadline=None)
@torch.inference_mode()
def test_normalised_rows_do_not_see_each_other(width: int, size: int, threads: int) -> None:
    def operation(x: Tensor) -> Tensor:
        return rowwise.normalised(x, 1e-6)

    rows = random(17, width)
    expected = alone(operation, rows)
    assert torch.equal(cut(operation, rows, size, threads), expected)
    exact = F.rms_norm(rows.double(), (width,), eps=1e-6)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-12)


@given(st.integers(1, 70_000), st.integers(1, 5), THREADS)
@settings(max_examples=15, deadline=None)
@torch.inference_mode()
def test_sums_of_exponentials_do_not_see_each_other(width: int, size: int, threads: int) -> None:
    rows = random(5, width).clamp(-20, 20)
    expected = alone(rowwise.exp_sum, rows)
    assert expected.dtype == torch.float64
    assert torch.equal(cut(rowwise.exp_sum, rows, size, threads), expected)
    # a part of the rows' columns, as logits without their padding are
    wide = F.pad(rows, (0, 3))
    assert torch.equal(cut(lambda x: rowwise.exp_sum(x[:, :width]), wide, size, threads), expected)
    torch.testing.assert_close(expected, rows.double().exp().sum(1), rtol=1e-6, atol=0)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Of the last positions of a whole cache."""
    with rowwise.one_thread():
        return rowwise.attention(queries, keys, values, keys.shape[2] - queries.shape[0])


@pytest.mark.parametrize(("num_kv", "group", "dim"), [(2, 2, 16), (1, 4, 64), (1, 3, 6)])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@torch.inference_mode()
def test_a_query_sees_its_prefix_alone(num_kv: int, group: int, dim: int, threads: int) -> None:
    """As one query at a time, and as a float64 softmax over the positions up to its own."""
    length, num = 300, 9
    keys, values, queries = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
        for shape in [(1, num_kv, length, dim), (1, num_kv, length, dim), (num, num_kv, group, dim)]
    )
    torch.set_num_threads(threads)
    together = attend(queries, keys, values)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    first = length - num + 1
    for i in range(num):
        seen = (keys[:, :, : first + i], values[:, :, : first + i])
        assert torch.equal(attend(queries[i : i + 1].clone(), *seen), together[i : i + 1])
    scores = torch.einsum("nhgd,hld->nhgl", queries.double(), keys[0].double()) / dim**0.5
    for i in range(num):
        scores[i, :, :, first + i :] = -torch.inf
    exact = torch.einsum("nhgl,hld->nhgd", scores.softmax(-1), values[0].double())
    torch.testing.assert_close(together.double(), exact.reshape(num, -1), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_damaged_row_stays_among_itself() -> None:
    good = random(3, 96)
    bad = torch.full((1, 96), torch.nan)
    rows = torch.cat((good[:1], bad, good[1:2], bad * torch.inf, good[2:]))
    for operation in (rowwise.gated, lambda x: rowwise.normalised(x, 1e-6)):
        assert torch.equal(operation(rows)[::2], operation(good))
