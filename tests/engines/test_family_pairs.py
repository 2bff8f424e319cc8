"""Each family's pair through both state machines: an exact method gives the target's own text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

import pytest

from bench.reference import generate_alone
from decoding import methods
from decoding.sampling import SamplingParams
from engines.torch.drafter import ModelDrafter
from engines.torch.precision import NumberFormat
from engines.torch.target import TargetModel
from tests.engines.families import (
    FAMILIES,
    INT8,
    NUM_TOKENS,
    OTHERS,
    WINDOW,
    saved_pairs,
)
from tests.engines.model_pair import ModelPair
from tests.harness import EdgeCloudPair, Fate

PROMPT = (3, 101, 47, 12, 251, 9, 88, 16, 200, 7)
LENGTH = 64
NO_EOS = frozenset[int]()
SHORT = (("llama-3.1", INT8), ("deepseek-r1-distill-qwen", INT8))
CASES = [
    pytest.param(
        name, number_format, id=f"{name} {number_format}",
        marks=() if (name, number_format) in SHORT else pytest.mark.long,
    )
    for name, family in {**FAMILIES, **OTHERS}.items()
    for number_format in family.exact
]  # fmt: skip
"""Of the short ones `auto` above temperature 0, the rest is long."""


@pytest.fixture(scope="module")
def load_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("pairs")
    saved = saved_pairs(folder)

    @cache
    def load(name: str, dtype: NumberFormat) -> ModelPair:
        place = saved(name)
        return ModelPair(
            TargetModel.load(str(place / "target"), dtype, "cpu"),
            ModelDrafter.load(str(place / "draft"), dtype, "cpu"),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield load


def rough_link(seed: int) -> tuple[Fate, ...]:
    """Some messages lost, some twice, all of them late and out of order."""
    numbers = Random(seed)
    return tuple(
        Fate(tuple(numbers.uniform(1, 90) for _ in range(numbers.choice((0, 1, 1, 1, 2)))))
        for _ in range(80)
    )


@pytest.mark.parametrize(
    ("method", "temperature"),
    [
        ("auto", 0.8),
        pytest.param("auto", 0.0, marks=pytest.mark.long),
        pytest.param("sd", 0.0, marks=pytest.mark.long),
        pytest.param("sd", 0.8, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_pair_writes_what_its_target_writes_alone(
    name: str, dtype: NumberFormat, method: str, temperature: float, load_pair: Any
) -> None:
    pair: ModelPair = load_pair(name, dtype)
    sampling = SamplingParams(temperature=temperature, seed=11)
    alone = tuple(generate_alone(pair.model, PROMPT, sampling, LENGTH, NO_EOS))
    assert len(PROMPT) + len(alone) > 4 * WINDOW
    assert max(alone) < NUM_TOKENS
    found = methods.find(method)
    assert found is not None
    for fates in ((), rough_link(5)):
        run = EdgeCloudPair(
            pair, sampling, PROMPT, LENGTH, method=found, fates=fates, verify_ms=30.0,
            draft_ms=1.0,
        )  # fmt: skip
        assert run.run() == alone
        assert any(run.accepted)
        assert not all(run.accepted)
