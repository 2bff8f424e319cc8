from __future__ import annotations

import hashlib

import pytest
import torch

from engines.torch.rotation import rotate


@pytest.mark.parametrize("size", [1, 2, 3, 6, 16, 18, 35, 36, 80, 96, 128])
def test_the_change_of_basis_is_orthogonal(size: int) -> None:
    basis = rotate(torch.eye(size)).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(size).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [576, 896, 1536])
def test_real_widths_keep_lengths_and_spread_an_outlier(size: int) -> None:
    rows = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(rows).norm(dim=1), rows.norm(dim=1), rtol=1e-5, atol=0)
    outlier = torch.zeros(1, size)
    outlier[0, 7] = 1000.0
    assert rotate(outlier).abs().max() < 1000 * 2 / size**0.5 * 1.5


def test_each_row_of_any_shape_is_rotated_by_itself() -> None:
    rows = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(rows)[1, 2], rotate(rows[1, 2]))
    assert torch.equal(rotate(rows.transpose(0, 1)), rotate(rows).transpose(0, 1))


def test_the_bits_are_the_same_everywhere() -> None:
    """Whole numbers in, so that every machine starts from the same; a changed digest means that
    copies converted before and after differ (`engines.torch.integer_decoder.FORMAT`)."""
    rows = ((torch.arange(4 * 576) * 7919) % 1000 - 500).float().view(4, 576)
    before = torch.get_num_threads()
    digests = set()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        digests.add(hashlib.sha256(rotate(rows).numpy().tobytes()).hexdigest()[:16])
    torch.set_num_threads(before)
    assert digests == {"0c0e5bb40f3f6abe"}
