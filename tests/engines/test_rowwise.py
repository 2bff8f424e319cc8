"""A row's result has the same bits alone, among others, and at 1 to 4 threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.torch import rowwise

THREADS = st.integers(1, 4)


pytestmark = pytest.mark.usefixtures("threads")


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
