"""Uniforms by address: the same for all time, independent of each other, uniform."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.uniforms import LARGEST, Purpose, opened, uniform, words

MASK = 2**64 - 1

addresses = st.tuples(
    st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1), st.sampled_from(Purpose)
)

GOLDEN = {
    (0, 0, Purpose.DRAFT): 0.8133540609793564,
    (0, 0, Purpose.ACCEPT): 0.8144335776159866,
    (0, 1, Purpose.DRAFT): 0.9601820526527756,
    (1, 0, Purpose.DRAFT): 0.07515115109591125,
    (2**63 - 1, 2**31 - 1, Purpose.NOISE): 0.3577722612554895,
    (42, 1000, Purpose.RESIDUAL): 0.16249649749974399,
}
"""Stored seeds must go on giving the texts they gave: these never change."""


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), 64-bit, 10 rounds."""
    for _ in range(10):
        low_0, low_1 = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (low_1 >> 64) ^ counter[1] ^ key[0], low_1 & MASK,
            (low_0 >> 64) ^ counter[3] ^ key[1], low_0 & MASK,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


@pytest.mark.parametrize(("address", "value"), GOLDEN.items(), ids=str)
def test_golden_values(address: tuple[int, int, Purpose], value: float) -> None:
    assert uniform(*address) == value


@given(addresses)
def test_it_is_philox_of_the_address(address: tuple[int, int, Purpose]) -> None:
    """In the same words as the paper, so that a client in any language can do the same."""
    seed, position, purpose = address
    word = philox_4x64_10([1, position, 0, 0], [seed, purpose])[0]
    expected = min(((word >> 11) + 0.5) / 2**53, LARGEST)
    assert uniform(seed, position, purpose) == expected


def test_the_same_address_gives_the_same_number_whatever_was_asked_before() -> None:
    forward = [uniform(5, i, Purpose.DRAFT) for i in range(50)]
    for i in reversed(range(50)):
        uniform(6, i, Purpose.ACCEPT)
        assert uniform(5, i, Purpose.DRAFT) == forward[i]


@pytest.mark.parametrize("word", [0, 1, 2**11, 2**63, 2**64 - 2**11, 2**64 - 1])
def test_numbers_lie_in_the_open_interval(word: int) -> None:
    (value,) = opened(np.array([word], np.uint64))
    assert 0.0 < value < 1.0


def test_no_two_positions_share_numbers() -> None:
    """With the position in the lowest word, p + 1 would repeat p's numbers four ids on."""
    drawn = np.concatenate([words(5, position, Purpose.NOISE, 0, 4000) for position in range(40)])
    assert np.unique(drawn).size == drawn.size


N = 10_000
STREAMS = tuple(itertools.product((0, 1), Purpose))


@functools.cache  # drawn by the tests and not on import, which every process of a run would pay
def numbers(seed: int, purpose: Purpose) -> np.ndarray:
    return np.array([uniform(seed, i, purpose) for i in range(N)])


def kolmogorov_smirnov(sample: np.ndarray) -> float:
    ordered = np.sort(sample)
    steps = np.arange(1, ordered.size + 1) / ordered.size
    return float(max((steps - ordered).max(), (ordered - steps + 1 / ordered.size).max()))


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_numbers_are_uniform_over_positions(stream: tuple[int, Purpose]) -> None:
    assert kolmogorov_smirnov(numbers(*stream)) < 1.95 / N**0.5  # one true stream in 1,000 fails


def test_numbers_are_uniform_over_seeds() -> None:
    over_seeds = np.array([uniform(seed, 7, Purpose.ACCEPT) for seed in range(N)])
    assert kolmogorov_smirnov(over_seeds) < 1.95 / N**0.5


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_neighbouring_addresses_are_independent(lag: int) -> None:
    """Purposes, seeds and positions side by side are uncorrelated, and so is max with either."""
    for one, other in itertools.combinations_with_replacement(STREAMS, 2):
        if one == other and lag == 0:
            continue
        x, y = numbers(*one)[: N - lag], numbers(*other)[lag:]
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / N**0.5
        assert abs((x * y < 0.25).mean() - 0.25 * (1 + np.log(4))) < 4 * 0.5 / N**0.5


def test_different_addresses_give_different_numbers() -> None:
    everything = np.concatenate([numbers(*stream) for stream in STREAMS])
    assert np.unique(everything).size == everything.size
