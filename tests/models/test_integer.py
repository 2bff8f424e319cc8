"""Integer products against the same sums in exact arithmetic, and rows against each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import integer as module
from models.integer import GROUP, IntegerMatrix, IntegerProduct, available, joined, num_groups
from models.linears import integer

pytestmark = pytest.mark.skipif(not available(), reason="torch has no FBGEMM here")

SHAPES = st.sampled_from(
    [(1, 16, 1), (7, 36, 1), (33, 64, 2), (97, 576, 1), (64, 1536, 3), (50, 4096, 2), (301, 96, 6)]
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(matrix: IntegerMatrix, rows: Tensor) -> Tensor:
    """The module's formula in float64, with sums of whole numbers. Activations are rounded with
    FBGEMM's own 90 in float32: ties fall as they do there."""
    scale = 1 / torch.tensor(1 / 90)
    num_out, num_in = matrix.shape
    total = torch.zeros(len(rows), num_out, dtype=torch.float64)
    width = num_in // matrix.num_groups
    for group in range(matrix.num_groups):
        part = rows[:, group * width : (group + 1) * width]
        peak = part.abs().amax(dim=1, keepdim=True)
        rounded = (part / peak * scale).round().double()
        weight = matrix.weight[:, group * width : (group + 1) * width].double()
        sums = rounded @ weight.T  # whole numbers below 2⁵³: exact
        total += sums * (peak.double() / 90) * matrix.scale[group].double()
    return total if matrix.bias is None else total + matrix.bias.double()


@given(SHAPES, st.integers(0, 99), st.booleans())
@settings(max_examples=15, deadline=None)
@torch.inference_mode()
def test_products_are_those_of_the_rounded_numbers(
    shape: tuple[int, int, int], seed: int, biased: bool
) -> None:
    """But for the float32 scaling of each group's exact sum: a few units in its last place."""
    num_out, num_in, groups = shape
    bias = random(num_out, seed=seed + 2) if biased else None
    matrix = IntegerMatrix.of(random(num_out, num_in, seed=seed), groups, bias)
    rows = random(5, num_in, seed=seed + 1)
    product, expected = IntegerProduct(matrix)(rows), exact(matrix, rows)
    size = (
        rows.abs() @ matrix_in_float(matrix).abs().T
    ).double()  # of the terms before they cancel
    assert ((product.double() - expected).abs() <= 2**-20 * size + 1e-6).all()


def matrix_in_float(matrix: IntegerMatrix) -> Tensor:
    num_out, num_in = matrix.shape
    groups = matrix.weight.float().view(num_out, matrix.num_groups, -1)
    return (groups * matrix.scale.T[:, :, None]).view(num_out, num_in)


@torch.inference_mode()
def test_sums_at_the_largest_numbers_do_not_overflow() -> None:
    """Without VNNI two products are added in int16: 2 · 180 · 91 is the most there is."""
    for sign in (1.0, -1.0):
        matrix = IntegerMatrix.of(torch.full((40, 2048), sign), 1)
        product = IntegerProduct(matrix)(torch.ones(3, 2048))
        torch.testing.assert_close(product, torch.full((3, 40), sign * 2048), rtol=1e-6, atol=0)


@given(SHAPES, st.lists(st.integers(1, 16), min_size=1, max_size=8), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
@torch.inference_mode()
def test_a_row_has_the_same_bits_beside_any_others(
    shape: tuple[int, int, int], sizes: list[int], threads: int
) -> None:
    num_out, num_in, groups = shape
    product = IntegerProduct(
        IntegerMatrix.of(random(num_out, num_in), groups, random(num_out, seed=2))
    )
    rows = random(sum(sizes), num_in, seed=1)
    # numbers a hair from a half, where two ways to round would differ
    rows[:, 1::3] = (torch.arange(rows[:, 1::3].shape[1]) % 90 + 0.4999999) / 90
    rows[:, 0] = 1.0
    torch.set_num_threads(1)
    expected = torch.cat([product(row) for row in torch.split(rows, 1)])
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat([product(part) for part in torch.split(rows, sizes)]), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, 0.0, 1e-42])
@pytest.mark.parametrize("groups", [1, 4])
@torch.inference_mode()
def test_a_damaged_or_huge_row_does_not_touch_its_neighbours(bad: float, groups: int) -> None:
    product = IntegerProduct(IntegerMatrix.of(random(70, 128), groups))
    good = random(3, 128, seed=1)
    for place in range(4):
        for row in (
            torch.full((1, 128), bad),
            torch.cat((good[:1, :64] * 0 + bad, good[:1, 64:]), 1),
        ):
            mixed = torch.cat((good[:place], row, good[place:]))
            kept = [i for i in range(4) if i != place]
            assert torch.equal(product(mixed)[kept], product(good))


@torch.inference_mode()
def test_a_damaged_row_shows_and_a_row_of_zeros_is_zero() -> None:
    product = IntegerProduct(IntegerMatrix.of(random(70, 128), 2))
    assert product(torch.full((1, 128), torch.nan)).isnan().all()
    assert not product(torch.full((1, 128), torch.inf)).isfinite().any()
    assert torch.equal(product(torch.zeros(2, 128)), torch.zeros(2, 70))


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_rounding_a_matrix_moves_no_weight_by_more_than_half_a_step(
    shape: tuple[int, int, int], seed: int
) -> None:
    num_out, num_in, groups = shape
    weight = random(num_out, num_in, seed=seed)
    weight[0] = 0  # a row of zeros stays one
    matrix = IntegerMatrix.of(weight, groups)
    moved = (matrix_in_float(matrix) - weight).view(num_out, groups, -1).abs()
    assert (moved <= 0.5001 * matrix.scale.T[:, :, None]).all()
    assert int(matrix.weight.abs().max()) <= 91
    assert not matrix.weight[0].any()


@given(st.integers(1, 400).map(lambda x: 16 * x), st.sampled_from([64, 1280, GROUP]))
def test_groups_are_equal_and_the_fewest(size: int, largest: int) -> None:
    count = num_groups(size, largest)
    possible = [n for n in range(1, size // 16 + 1) if size % (16 * n) == 0]
    assert count == min([n for n in possible if size // n <= largest], default=1)


def test_a_width_that_cannot_be_cut_is_one_group() -> None:
    assert num_groups(2050) == 1
    assert num_groups(36) == 1


@torch.inference_mode()
def test_joined_matrices_and_chosen_rows_multiply_as_before() -> None:
    parts = [IntegerMatrix.of(random(n, 64, seed=n), 2, random(n)) for n in (20, 12)]
    rows = random(4, 64, seed=9)
    together = IntegerProduct(joined(parts))(rows)
    assert torch.equal(together, torch.cat([IntegerProduct(part)(rows) for part in parts], 1))
    ids = torch.tensor([0, 5, 31])
    assert torch.equal(IntegerProduct(joined(parts).rows(ids))(rows), together[:, ids])


@torch.inference_mode()
def test_the_layout_multiplies_modules_in_int8_and_leaves_them_where_it_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linears = [nn.Linear(64, 20), nn.Linear(64, 12)]
    rows = random(4, 64)
    plain = torch.cat([linear(rows) for linear in linears], 1)
    product = integer(linears)
    assert product.num_bytes == 32 * 64
    assert 0 < float((product(rows) - plain).norm() / plain.norm()) < 0.03
    monkeypatch.setattr("models.linears.available", lambda: False)
    assert torch.equal(integer(linears)(rows), plain)
    assert torch.equal(
        integer([x.bfloat16() for x in linears])(rows.bfloat16()).float(),
        torch.cat([x(rows.bfloat16()) for x in linears], 1).float(),
    )


def test_available_means_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = type(torch.backends.quantized)
    monkeypatch.setattr(engines, "supported_engines", property(lambda _: ["qnnpack"]))
    assert not module.available()
