"""A lossy answer is replayed from what was recorded of it: which tokens are the target's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decoding import methods
from decoding.coupling import choose_sparse
from decoding.methods.base import Flow, Method, PaceView
from decoding.sampling import SamplingParams, from_wire, warp
from tests.harness import EdgeCloudPair
from tests.toy import ToyPair, target_alone

PROMPT: tuple[int, ...] = (1, 2, 3)
NEVER: frozenset[int] = frozenset()


class Steady:
    """Three tokens in flight, one a window."""

    name, forecasts = "steady", False

    def flow(self, view: PaceView) -> Flow:
        return Flow(1, 3, awaits=False)


LENIENT: Method = replace(
    methods.fsd.AHEAD, name="lenient", pace=Steady(), threshold=0.3, runs_on=True
)


def replayed(
    pair: ToyPair, sampling: SamplingParams, accepted: tuple[bool, ...]
) -> tuple[int, ...]:
    """The draft's token where one was accepted, else the target's own."""
    text = PROMPT
    for drafted in accepted:
        if drafted:
            q = warp(from_wire(*pair.draft_probs(text)), sampling)
            text += (
                (int(q.ids[0]),)
                if sampling.greedy
                else (choose_sparse(q, sampling.seed, len(text)),)
            )
        else:
            text += target_alone(pair, text, sampling, 1, NEVER)
    return text[len(PROMPT) :]


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.8, seed=11)])
@pytest.mark.parametrize("busy_ms", [0.0, 4.0, 30.0])
def test_recorded_positions_replay_a_lossy_answer(sampling: SamplingParams, busy_ms: float) -> None:
    pair = ToyPair(agreement=0.6)
    run = EdgeCloudPair(pair, sampling, method=LENIENT, max_new_tokens=60, busy_ms=busy_ms)
    answer = run.run()
    assert any(run.accepted)
    assert not all(run.accepted)
    assert answer != target_alone(pair, PROMPT, sampling, 60, NEVER), "it was lenient"
    assert replayed(pair, sampling, tuple(run.accepted)) == answer
