"""Log-probabilities on their way to the user: over real sockets into the result, as bytes."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from bus.client import Answer, Client
from bus.protocol.messages import DraftWindow
from bus.settings import BusSettings
from decoding.token_scores import TokenScore
from edge_worker.scores import Scorer
from tests.edge_worker.shell import PAIR, PATIENCE_S, House, ToyTokenizer


def own(value: float) -> TokenScore:
    return TokenScore(np.array([value], "<f4").tobytes(), b"", b"")


async def scored(house: House, bus_settings: BusSettings, name: str, **fields: object) -> Answer:
    await house.submit(name, **{"logprobs": 2, **fields})
    async with Client(settings=bus_settings) as client:
        return await client.result(name, PATIENCE_S)


def check(answer: Answer, prompt: tuple[int, ...]) -> None:
    text = prompt + answer.token_ids
    assert len(answer.scores) == len(answer.token_ids)
    for number, found in enumerate(answer.scores):
        logits = PAIR.target_logits(text[: len(prompt) + number])
        logs = logits - np.log(np.exp(logits).sum())
        assert found.chosen.token == answer.token_ids[number]
        assert found.chosen.logprob == pytest.approx(logs[found.chosen.token], rel=1e-6)
        assert [one.token for one in found.top] == np.argsort(-logs, kind="stable")[:2].tolist()
    assert "".join(found.chosen.text for found in answer.scores) == answer.text


@pytest.mark.parametrize("method", ["sd", "auto", "e2sci"])
async def test_every_token_has_its_log_probability(
    house: House, bus_settings: BusSettings, method: str
) -> None:
    house.cloud()
    house.start()
    answer = await scored(house, bus_settings, "r1", method=method, prompt_logprobs=True)
    prompt = tuple(ToyTokenizer().encode("prompt r1"))
    check(answer, prompt)
    first, *others = answer.prompt_scores
    assert (first.chosen.token, first.chosen.logprob, first.top) == (prompt[0], 0.0, ())
    assert tuple(found.chosen.token for found in others) == prompt[1:]
    logits = PAIR.target_logits(prompt[:1])
    expected = logits[prompt[1]] - np.log(np.exp(logits).sum())
    assert others[0].chosen.logprob == pytest.approx(expected, rel=1e-6)


async def test_an_answer_taken_over_has_each_score_once(
    house: House, bus_settings: BusSettings
) -> None:
    cloud = house.cloud(pass_s=0.002)
    house.start()
    task = asyncio.create_task(scored(house, bus_settings, "r1", max_new_tokens=60))
    await house.until(lambda: any(isinstance(message, DraftWindow) for message in house.sent))
    house.clouds.remove(cloud)
    await cloud.lapse()
    await cloud.stop()
    house.cloud("cloud-2")
    answer = await task
    assert len({message.incarnation for message in house.opens()}) > 1
    assert answer.error == ""
    assert len(answer.token_ids) == 60
    check(answer, tuple(ToyTokenizer().encode("prompt r1")))


async def test_what_cannot_have_log_probabilities_says_so(house: House) -> None:
    house.cloud()
    house.start()
    await house.fails("r1", "logprobs: they need coupling 'gumbel'", logprobs=1,
                      coupling="residual", temperature=1.0)  # fmt: skip
    await house.fails("r2", "gives none; use auto", logprobs=1, method="lookahead")


def test_scores_of_another_number_of_tokens_are_an_error() -> None:
    scorer = Scorer(ToyTokenizer(), (1, 2, 3))
    assert scorer.scored((1, 2), ()) == ()
    with pytest.raises(ValueError, match="zip"):
        scorer.scored((1, 2), (own(-1.0),))
    assert [one.chosen.logprob for one in scorer.prompt((own(-1.0), own(-2.0)))] == [0, -1, -2]
