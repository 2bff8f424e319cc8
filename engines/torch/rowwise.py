"""Sums of exponentials that are bitwise the same whatever rows are beside a row.

torch's kernels cut their work by the number of elements and threads, and the few elements at the
end of a cut go through other instructions than the rest, with other last bits. A kernel runs on one
thread below 32,768 elements, so that rows go through it one by one, in pieces that size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 32_752  # a multiple of 16 below what torch gives to several threads


def exp_sum(rows: Tensor) -> Tensor:
    """float64[n]: Σ exp(x) over each row of float32[n, width], exponentials in float32.

    Any width: each row is cut in the same places.
    """
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for begin in range(0, rows.shape[1], _STEP):
        part = rows[:, begin : begin + _STEP]
        sums = [row.exp().sum(dtype=torch.float64) for row in part.unbind()]
        total += torch.stack(sums)
    return total
