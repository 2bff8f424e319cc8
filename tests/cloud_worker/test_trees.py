"""A real worker on loopback whose target proposes trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from bus.protocol.messages import Ack, Fault, FaultCode, Outcome, WindowReport
from decoding.engine import NO_ROWS, ProposedTree
from decoding.sampling import SamplingParams
from engines.torch.target import TargetCache, TargetModel
from tests.cloud_worker.conftest import PROMPT, House, Start, opening, own_text
from tests.cloud_worker.test_running_on import at_rest

LENGTH = 24


@pytest.fixture
def proposing(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> TargetModel:
    """The tiny target with a speculator that knows its text: a wrong token, the right one, and
    below it two more, of which the last is wrong at every third position."""
    alone, plain = own_text(target, LENGTH + 4), target.open

    def opened(sampling: SamplingParams, speculator: str = "") -> TargetCache:
        assert speculator in ("", "medusa")
        return plain(sampling)

    def propose(
        cache: TargetCache, feed: Sequence[int], most: int, rows: bool = False
    ) -> ProposedTree:
        del rows
        at = target.length(cache) + len(feed) - len(PROMPT)
        last = 1 if at % 3 else 0
        tokens = ((alone[at] + 1) % 200, alone[at], alone[at + 1], alone[at + 2] ^ (1 - last))
        return ProposedTree(tokens[:most], (-1, -1, 1, 2)[:most], *NO_ROWS)

    monkeypatch.setattr(target, "speculators", ("medusa",))
    monkeypatch.setattr(target, "open", opened)
    monkeypatch.setattr(target, "propose", propose, raising=False)
    return target


async def test_its_text_is_the_targets_own_in_fewer_passes(
    start: Start, proposing: TargetModel
) -> None:
    house, alone = start(), own_text(proposing, LENGTH)
    await house.opens(proposing, method="medusa", max_new_tokens=LENGTH)
    assert await at_rest(house, LENGTH) == alone
    await house.until(lambda: sum(r.num_accepted for r in trees(house)) > LENGTH // 2)
    assert {report.num_drafted for report in trees(house)} <= {1, 2, 3}
    assert len(trees(house)) < LENGTH // 2


def trees(house: House) -> list[Any]:
    return [r for r in house.reported(WindowReport) if r.outcome is not Outcome.OWN]


async def test_two_sessions_and_a_reopened_one_keep_their_texts(
    start: Start, proposing: TargetModel
) -> None:
    house, alone = start(), own_text(proposing, LENGTH)
    for name in ("s1", "s2"):
        await house.opens(proposing, session=name, method="medusa", max_new_tokens=LENGTH)
    handle = await house.opens(
        proposing, session="s1", method="medusa", max_new_tokens=LENGTH, incarnation=2
    )
    for name in ("s1", "s2"):
        assert await at_rest(house, LENGTH, name) == alone
    assert await house.reads(handle, LENGTH) == alone


@pytest.mark.parametrize("tree_tokens", [0, 2])
async def test_the_setting_bounds_the_tree(
    start: Start, proposing: TargetModel, tree_tokens: int
) -> None:
    house, alone = start(tree_tokens=tree_tokens), own_text(proposing, LENGTH)
    await house.opens(proposing, method="medusa", max_new_tokens=LENGTH)
    assert await at_rest(house, LENGTH) == alone
    assert bool(trees(house)) is bool(tree_tokens)


async def test_the_threshold_of_an_acknowledgement_is_taken_and_clipped(
    start: Start, proposing: TargetModel
) -> None:
    house = start(threshold_max=0.25, tree_tokens=0)
    handle = await house.opens(proposing, method="e2sci+medusa", max_new_tokens=LENGTH)
    house.outbox.send(Ack(handle, 3, len(PROMPT), threshold=0.5))
    await house.until(lambda: house.session().state.threshold == 0.5)
    house.outbox.send(Ack(handle, 2, len(PROMPT), threshold=0.1))  # an older one comes late
    house.outbox.send(Ack(handle, 4, len(PROMPT), again=True))
    await house.until(lambda: house.session().state.heard.number == 4)  # type: ignore[union-attr]
    assert house.session().state.threshold == 0.5


async def test_a_target_without_it_refuses_and_says_what_to_do(
    start: Start, proposing: TargetModel
) -> None:
    house = start()
    assert house.record.speculators == ("medusa",)
    fault = await house.ask(opening(proposing, method="eagle3"), Fault)
    assert fault.code is FaultCode.UNKNOWN_METHOD
    assert "needs the speculator 'eagle3' beside its target" in fault.detail
    assert "--speculator DIR (`e2sci train eagle3`" in fault.detail
