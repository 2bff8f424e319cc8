"""An edge worker that drafts by EAGLE-3's layer, and a cloud worker, with tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.reference import generate_alone
from bus.protocol.messages import DraftWindow
from bus.store import SessionEntry
from decoding.engine import DrafterCapabilities
from decoding.sampling import SamplingParams
from edge_worker.loading import load_model
from edge_worker.settings import EdgeSettings
from engines.padding import LeastTimes, Padding
from engines.torch.speculators.drafter import Eagle3Cache, Eagle3Drafter
from engines.torch.speculators.file import EAGLE3
from engines.torch.target import TargetModel
from tests.edge_worker import shell
from tests.edge_worker.shell import Drafter, House
from tests.engines.speculating import save_random
from tests.engines.tiny import save_tiny

LENGTH = 24
MOST_ANSWERS = 10


class Counting(Eagle3Drafter):
    """Knows its open caches, and what it has learnt in all of them."""

    open_caches = 0
    num_learnt = 0

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> Eagle3Cache:
        self.open_caches += 1
        return super().open(sampling, prompt)

    def learn(self, cache: Eagle3Cache, start: int, features: Any) -> None:
        self.num_learnt += len(features)
        super().learn(cache, start, features)

    def close(self, cache: Eagle3Cache) -> None:
        self.open_caches -= 1
        super().close(cache)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    place = save_tiny(tmp_path_factory.mktemp("target"), num_layers=4)
    return TargetModel.load(str(place), "float32", "cpu")


@pytest.fixture
def drafter(target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = save_random(tmp_path / "layer", EAGLE3, target)
    place = save_tiny(tmp_path / "model", num_layers=4)
    spec = f"{directory}@{place}"
    settings = EdgeSettings.load(draft=spec, drafter="model")
    assert isinstance(load_model(settings), Eagle3Drafter)
    return Counting.load(spec)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_the_answer_is_the_targets_own_and_the_layer_learns_and_drafts(
    house: House, target: TargetModel, drafter: Counting, monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:  # fmt: skip
    monkeypatch.setattr(shell, "Serving", lambda _pass_s, _pair: target)
    monkeypatch.setattr(target, "padding", Padding(LeastTimes.parse("20")))  # time to draft in
    house.cloud()
    model: Any = drafter
    house.start(model)
    for number in range(1, MOST_ANSWERS + 1):
        await check_answer(house, target, f"r{number}", temperature)
        # On a busy machine the target may have written it all before the layer's first step.
        if drafter.num_learnt > 1 and any(isinstance(sent, DraftWindow) for sent in house.sent):
            break
    else:
        raise AssertionError(f"nothing learnt and drafted in {MOST_ANSWERS} answers")
    assert {message.features for message in house.opens()} == {True}
    entries = await house.telemetry(number)
    methods = {entry.method for entry in entries if isinstance(entry, SessionEntry)}
    assert methods == {"eagle3-edge"}


async def check_answer(house: House, target: TargetModel, name: str, temperature: float) -> None:
    """It is the target's own."""
    await house.submit(name, method="eagle3-edge", temperature=temperature, seed=5)
    tokens, _, end = await house.answer(name)
    assert end.end.error == ""
    prompt = target.tokenizer.encode(f"prompt {name}")
    sampling = SamplingParams(temperature, seed=5)
    assert list(tokens) == list(generate_alone(target, prompt, sampling, LENGTH, target.eos_tokens))


async def test_methods_that_give_no_features_are_refused_by_such_a_draft(house: House) -> None:
    house.cloud()
    house.start(Drafter(capabilities=DrafterCapabilities(features=True)))
    await house.fails(
        "r1", "method 'auto' gives a draft no features of the target, and toy drafts by these "
        "alone: use eagle3-edge, or start the edge with another --draft", method="auto",
    )  # fmt: skip


async def test_the_method_is_refused_by_an_edge_with_another_draft(house: House) -> None:
    house.cloud()
    house.start()
    await house.fails(
        "r1", "method 'eagle3-edge' needs a draft that reads the target's features; this edge "
        "drafts with toy and has none: start the edge with --draft DIR, a directory of `e2sci "
        "train eagle3`, or use another method", method="eagle3-edge",
    )  # fmt: skip
