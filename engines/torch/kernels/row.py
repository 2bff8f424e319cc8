"""What a pass does to one row at a time, but for products with weights.

Rows are float32*; pointers, because an index into an array may count from its end, which keeps
loops from being vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.torch.kernels.compiling import compiled
from engines.torch.kernels.instructions import (
    bits_of_float,
    dot,
    float_of_bits,
    further,
    mix_1,
    mix_4,
    pointer_to,
)

_MAGIC = np.float32(12_582_912.0)  # 1.5 · 2²³: adding it rounds to the nearest whole number
_MAGIC_BITS = np.int32(0x4B400000)
_DAMAGED = np.int32(0x7F800000)  # bits of infinity: NaN's are above
_TINY = np.float32(1e-30)
_NUM_LANES = 64


@compiled
def exp(x: Any) -> Any:
    """eˣ of float32 in [−87, 88]: 2ⁿ·e^r with |r| ≤ ½ ln 2 (the polynomial of Cephes' expf)."""
    shifted = x * np.float32(1.4426950408889634) + _MAGIC
    n = shifted - _MAGIC
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = (p * r) * r + r + np.float32(1.0)
    power = np.int32(np.int32(bits_of_float(shifted) - _MAGIC_BITS + np.int32(127)) << 23)
    return p * float_of_bits(power)


@compiled
def round_row(row: Any, width: int, padded: int, largest: Any, out: Any) -> Any:
    """Round `width` numbers into int16*[padded]; the size of a step, NaN for a damaged row."""
    peak_bits = np.int32(0)
    for i in range(width):
        peak_bits = max(peak_bits, np.int32(bits_of_float(row[i]) & np.int32(0x7FFFFFFF)))
    peak = float_of_bits(peak_bits)
    done = 0
    if peak_bits < _DAMAGED and peak > _TINY:
        factor = largest / peak
        for i in range(width):
            shifted = row[i] * factor + _MAGIC
            out[i] = np.int16(bits_of_float(shifted) - _MAGIC_BITS)
        done = width
    for i in range(done, padded):
        out[i] = np.int16(0)
    return peak / largest if peak_bits < _DAMAGED else np.float32(np.nan)


@compiled
def normalise(row: Any, width: int, epsilon: Any, out: Any) -> None:
    """x / √(mean x² + ε)."""
    whole = width // 8
    total = dot(row, row, whole)
    for i in range(8 * whole, width):
        total += row[i] * row[i]
    root = np.sqrt(total / np.float32(width) + epsilon)
    for i in range(width):
        out[i] = row[i] / root


@compiled
def gate_row(gate: Any, up: Any, width: int) -> None:
    """silu(g)·u, over g."""
    for i in range(width):
        power = -gate[i]
        power = power if not power > np.float32(88) else np.float32(88)
        power = power if not power < np.float32(-87) else np.float32(-87)
        gate[i] = gate[i] / (np.float32(1) + exp(power)) * up[i]


@compiled
def turn_head(head: Any, cos: Any, signed_sin: Any, dim: int, out: Any) -> None:
    """RoPE of one head."""
    half = dim // 2
    for i in range(half):
        low, high = head[i], head[half + i]
        out[i] = low * cos[i] + high * signed_sin[i]
        out[half + i] = high * cos[half + i] + low * signed_sin[half + i]


@compiled
def exp_sums(rows: Any, out: Any) -> None:
    """Σ eˣ of each row of float32[n, width], contiguous, in float64[n]: exponentials in float32,
    summed over 64 lanes, then over the lanes. What is below −87 counts as −87."""
    num_rows, width = rows.shape
    powers, lanes = np.empty(_NUM_LANES, np.float32), np.empty(_NUM_LANES, np.float64)
    power, lane = pointer_to(powers, 0), pointer_to(lanes, 0)
    for r in range(num_rows):
        for i in range(_NUM_LANES):
            lane[i] = 0.0
        for begin in range(0, width, _NUM_LANES):
            part = pointer_to(rows, r * width + begin)
            count = min(_NUM_LANES, width - begin)
            for i in range(count):
                x = part[i]
                power[i] = exp(x if not x < np.float32(-87) else np.float32(-87))
            for i in range(count):
                lane[i] += power[i]
        total = 0.0
        for i in range(_NUM_LANES):
            total += lane[i]
        out[r] = total


@compiled
def most_probable(rows: Any, ids: Any, log_probs: Any) -> None:
    """The K largest of each row of logits float32[n, width], contiguous, in falling order: their
    places int64[n, K] and natural logarithms of their probabilities float32[n, K]."""
    num_rows, width = rows.shape
    size = ids.shape[1]
    for r in range(num_rows):
        row, held = pointer_to(rows, r * width), 0
        for i in range(width):
            if held == size and not row[i] > log_probs[r, size - 1]:
                continue
            held = min(held + 1, size)
            place = held - 1
            while place > 0 and row[i] > log_probs[r, place - 1]:
                log_probs[r, place], ids[r, place] = log_probs[r, place - 1], ids[r, place - 1]
                place -= 1
            log_probs[r, place], ids[r, place] = row[i], i
        top, total = log_probs[r, 0], 0.0
        for i in range(width):
            below = row[i] - top
            total += exp(below if not below < np.float32(-87) else np.float32(-87))
        for place in range(size):
            log_probs[r, place] -= np.float32(top + np.log(total))


@compiled
def mix_rows(shares: Any, values: Any, dim: int, count: int, out: Any) -> None:
    """out += Σ_t p_t·v_t over `count` rows of values."""
    i = 0
    while i + 32 <= dim:
        mix_4(shares, further(values, i), dim, count, further(out, i))
        i += 32
    while i + 8 <= dim:
        mix_1(shares, further(values, i), dim, count, further(out, i))
        i += 8
    for t in range(count):
        for j in range(i, dim):
            out[j] += shares[t] * values[t * dim + j]


@compiled
def attend(
    query: Any, keys: Any, values: Any, dim: int, past: int, tail: Any, count: int, scores: Any,
    out: Any,
) -> None:  # fmt: skip
    """softmax(q·Kᵀ/√d)·V of one head.

    Args:
        keys, values: [capacity, dim]. past: how many positions lie in order there.
        tail: int32*[count − past], where the rest lie.
        scores: [count], to work in.
    """
    scale = np.float32(1) / np.sqrt(np.float32(dim))
    whole = dim // 8
    top = np.float32(-np.inf)
    for t in range(count):
        key = further(keys, (t if t < past else tail[t - past]) * dim)
        score = dot(query, key, whole)
        for i in range(8 * whole, dim):
            score += query[i] * key[i]
        score *= scale
        scores[t] = score
        top = score if score > top else top
    for t in range(count):
        power = scores[t] - top
        scores[t] = exp(power if not power < np.float32(-87) else np.float32(-87))
    total = np.float64(0)
    for t in range(count):
        total += scores[t]
    for i in range(dim):
        out[i] = np.float32(0)
    mix_rows(scores, values, dim, past, out)
    for t in range(past, count):
        mix_rows(further(scores, t), further(values, tail[t - past] * dim), dim, 1, out)
    inverse = np.float32(1 / total)
    for i in range(dim):
        out[i] *= inverse
