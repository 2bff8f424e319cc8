"""Integer products against the same sums in exact arithmetic, and rows against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engines.torch.integer import IntegerMatrix, IntegerProduct
from engines.torch.kernels import largest_activation
from engines.torch.linears import integer

SHAPES = st.sampled_from([(1, 16), (7, 36), (33, 64), (97, 576), (64, 1536), (50, 4096), (301, 90)])
WINDOWS = st.lists(st.integers(1, 16), min_size=1, max_size=8)


pytestmark = pytest.mark.usefixtures("threads")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(matrix: IntegerMatrix) -> Tensor:
    """Ŵ as float64[out, in], read from the blocks."""
    num_out, num_in = matrix.shape
    rows = matrix.weight[0].transpose(1, 2).flatten(0, 1).flatten(1)
    return rows[:num_out, :num_in].double()


def exact(matrix: IntegerMatrix, rows: Tensor) -> Tensor:
    """The module's formula in float64, with sums of whole numbers."""
    largest = largest_activation(2 * matrix.num_pairs)
    peak = rows.abs().amax(dim=1, keepdim=True)
    rounded = (rows * (torch.tensor(float(largest)) / peak)).round().double()
    scale, bias = (part[0, : matrix.shape[0]].double() for part in (matrix.scale, matrix.bias))
    return rounded @ whole_numbers(matrix).T * (peak.double() / largest) * scale + bias


@given(SHAPES, st.integers(0, 99), st.booleans())
@settings(max_examples=15, deadline=None)
def test_products_are_those_of_the_rounded_numbers(
    shape: tuple[int, int], seed: int, biased: bool
) -> None:
    """But for the float32 scaling of each exact sum: a few units in its last place."""
    num_out, num_in = shape
    bias = random(num_out, seed=seed + 2) if biased else None
    matrix = IntegerMatrix.of(random(num_out, num_in, seed=seed), bias)
    rows = random(5, num_in, seed=seed + 1)
    product, expected = IntegerProduct(matrix)(rows), exact(matrix, rows)
    assert product.shape == (5, num_out)
    assert ((product.double() - expected).abs() <= 2**-21 * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("width", [16, 4096, 8960, 40_000])
def test_sums_at_the_largest_numbers_do_not_overflow(width: int) -> None:
    for sign in (1.0, -1.0):
        matrix = IntegerMatrix.of(torch.full((20, width), sign))
        product = IntegerProduct(matrix)(torch.ones(3, width))
        torch.testing.assert_close(product, torch.full((3, 20), sign * width), rtol=1e-6, atol=0)


@given(SHAPES, WINDOWS, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_a_row_has_the_same_bits_beside_any_others(
    shape: tuple[int, int], sizes: list[int], threads: int
) -> None:
    num_out, num_in = shape
    product = IntegerProduct(IntegerMatrix.of(random(num_out, num_in), random(num_out, seed=2)))
    rows = random(sum(sizes), num_in, seed=1)
    # numbers a hair from a half, where two ways to round would differ
    largest = largest_activation(num_in)
    rows[:, 1::3] = (torch.arange(rows[:, 1::3].shape[1]) % largest + 0.4999999) / largest
    rows[:, 0] = 1.0
    torch.set_num_threads(1)
    expected = torch.cat([product(row) for row in torch.split(rows, 1)])
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat([product(part) for part in torch.split(rows, sizes)]), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, 0.0, 1e-42])
def test_a_damaged_or_huge_row_does_not_touch_its_neighbours(bad: float) -> None:
    product = IntegerProduct(IntegerMatrix.of(random(70, 128)))
    good = random(3, 128, seed=1)
    for place in range(4):
        for row in (
            torch.full((1, 128), bad),
            torch.cat((good[:1, :64] * 0 + bad, good[:1, 64:]), 1),
        ):
            mixed = torch.cat((good[:place], row, good[place:]))
            kept = [i for i in range(4) if i != place]
            assert torch.equal(product(mixed)[kept], product(good))


def test_a_damaged_row_shows_and_a_row_of_zeros_is_zero() -> None:
    product = IntegerProduct(IntegerMatrix.of(random(70, 128)))
    for bad in (torch.nan, torch.inf, -torch.inf):
        row = torch.zeros(1, 128)
        row[0, 77] = bad
        assert product(row).isnan().all()
    assert torch.equal(product(torch.zeros(2, 128)), torch.zeros(2, 70))


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_rounding_a_matrix_moves_no_weight_by_more_than_half_a_step(
    shape: tuple[int, int], seed: int
) -> None:
    weight = random(*shape, seed=seed)
    weight[0] = 0  # a row of zeros stays one
    matrix = IntegerMatrix.of(weight)
    scale = matrix.scale[0, : shape[0], None]
    assert ((whole_numbers(matrix) * scale - weight).abs() <= 0.5001 * scale).all()
    assert int(matrix.weight.abs().max()) <= 127
    assert not whole_numbers(matrix)[0].any()


def test_chosen_rows_multiply_as_before() -> None:
    matrix = IntegerMatrix.of(random(40, 50), random(40, seed=2))
    rows = random(4, 50, seed=9)
    ids = torch.tensor([0, 5, 16, 31, 39])
    assert torch.equal(IntegerProduct(matrix.rows(ids))(rows), IntegerProduct(matrix)(rows)[:, ids])


def test_rows_may_have_more_dimensions_and_lie_apart() -> None:
    product = IntegerProduct(IntegerMatrix.of(random(20, 32)))
    rows = random(3, 5, 64, seed=3)[..., ::2]
    assert torch.equal(product(rows).flatten(0, 1), product(rows.reshape(15, 32).contiguous()))


def test_the_layout_multiplies_modules_in_int8_and_leaves_other_formats() -> None:
    linears = [nn.Linear(64, 20), nn.Linear(64, 12)]
    rows = random(4, 64)
    plain = torch.cat([linear(rows) for linear in linears], 1).detach()
    product = integer(linears)
    assert product.num_bytes == 32 * 64
    assert 0 < float((product(rows) - plain).norm() / plain.norm()) < 0.02
    halves = [x.bfloat16() for x in linears]
    assert torch.equal(
        integer(halves)(rows.bfloat16()), torch.cat([x(rows.bfloat16()) for x in halves], 1)
    )
