"""Log-probabilities travel with the tokens of a session that asks for them, as the target's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bus.protocol.arrays import Float64Array, pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.errors import LocalError
from bus.protocol.messages import FaultCode, Feedback
from decoding import cloud, methods
from decoding.engine import Want
from decoding.rows import reduced
from decoding.sampling import SamplingParams
from decoding.token_scores import carried, joined, parted, score
from tests.harness import LIMITS, EdgeCloudPair, Fate
from tests.sessions import OPENING
from tests.toy import ToyPair, likely_tree, target_alone

PROMPT = (1, 2, 3)
GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.9, top_p=0.9, seed=5)
fates = st.lists(
    st.builds(Fate, st.lists(st.floats(1, 3000), max_size=3).map(tuple)), max_size=40
).map(tuple)
PLAIN = [
    name
    for name in methods.names()
    if (method := methods.find(name)) and not method.inner and method.steps is None
]


def expected(pair: ToyPair, text: tuple[int, ...], at: int) -> Float64Array:
    """float64[V]: ln p₁ after the first `at` tokens of a text."""
    logits = pair.target_logits(text[:at])
    logs: Float64Array = logits - np.log(np.exp(logits).sum())
    return logs


def session(name: str, pair: ToyPair, sampling: SamplingParams, **changes: Any) -> EdgeCloudPair:
    method = methods.find(name)
    assert method is not None
    given: dict[str, Any] = {"logprobs": 3, "prompt_logprobs": True, "prompt": PROMPT}
    return EdgeCloudPair(pair, sampling, method=method, **(given | changes))


def check(run: EdgeCloudPair, pair: ToyPair, num_before: int = 0) -> None:
    """Each token's score is the target's own, and so are the alternatives."""
    text = PROMPT + run.answer
    places = range(len(PROMPT) + num_before, len(text))
    assert len(run.scores) == len(places)
    prompt = () if num_before else range(1, len(PROMPT))
    assert len(run.prompt_scores) == len(prompt)
    scores = (*run.prompt_scores, *run.scores)
    for place, found in zip((*prompt, *places), scores, strict=True):
        logs = expected(pair, text, place)
        assert found.logprob == pytest.approx(logs[text[place]], rel=1e-6)
        best = np.lexsort((np.arange(logs.size), -logs))[:3]
        assert [token for token, _ in found.others] == best.tolist()
        assert [log for _, log in found.others] == pytest.approx(logs[best], rel=1e-6)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", PLAIN)
def test_scores_are_the_targets_with_every_method(name: str, sampling: SamplingParams) -> None:
    pair = ToyPair(agreement=0.7, speculator=likely_tree, num_sparse=7, seed=3)
    run = session(name, pair, sampling)
    run.run()
    assert any(run.accepted)
    check(run, pair)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["auto", "sd", "plc", "e2sci", "fsd", "eagle3"]),
    st.sampled_from([GREEDY, SAMPLED]),
    st.integers(0, 50),
    fates,
    st.frozensets(st.integers(0, 40), max_size=3),
)
def test_they_survive_losses_and_a_cloud_that_forgets(
    name: str, sampling: SamplingParams, seed: int, fates: tuple[Fate, ...], forgets: frozenset[int]
) -> None:
    pair = ToyPair(agreement=0.6, speculator=likely_tree, num_sparse=7, seed=seed)
    run = session(name, pair, sampling, fates=fates, forget_at=forgets)
    run.run()
    check(run, pair)


def test_a_session_taken_over_scores_what_follows() -> None:
    pair = ToyPair(agreement=0.7)
    whole = target_alone(pair, PROMPT, GREEDY, 24, frozenset())
    run = session("auto", pair, GREEDY, committed=whole[:5])
    assert run.run() == whole
    check(run, pair, num_before=5)


def test_a_prompt_of_one_token_has_no_score_but_its_answer_has() -> None:
    pair = ToyPair()
    run = session("auto", pair, GREEDY, prompt=(1,))
    run.run()
    assert run.prompt_scores == ()
    assert len(run.scores) == len(run.answer)


def test_no_scores_where_none_are_asked_for() -> None:
    run = session("auto", ToyPair(), GREEDY, logprobs=None, prompt_logprobs=False)
    run.run()
    assert run.scores == run.prompt_scores == ()


def test_scores_of_zero_alternatives_are_the_tokens_own() -> None:
    run = session("auto", ToyPair(), GREEDY, logprobs=0)
    run.run()
    assert all(found.others == () and found.logprob <= 0 for found in run.scores)


def test_with_residual_coupling_the_cloud_refuses() -> None:
    message = replace(OPENING, logprobs=1, coupling=SessionCoupling.RESIDUAL)
    fault = cloud.check_open(message, OPENING.tokenizer_digest, LIMITS)
    assert fault is not None
    assert fault.code is FaultCode.UNKNOWN_METHOD
    assert "log-probabilities need coupling 'gumbel'" in fault.detail


# --- one row ----------------------------------------------------------------------------------


def test_scores_travel_and_part_again() -> None:
    row = reduced(np.array([0.0, -np.inf, 2.0]), Want(0, top=True, scored=(1,)), GREEDY)
    found = (score(row, 2, 2), score(row, 1, 2))
    assert found[1].logprob == -1e4  # −∞ has no place in JSON
    assert parted(joined(found)) == found
    feedback = Feedback(1, 10, pack_tokens((2, 1)), None, 0, 0, 0, 1, scores=joined(found))
    assert carried(feedback, 11, 1) == found[1:]
    assert carried(Feedback(1, 10, pack_tokens((2,)), None, 0, 0, 0, 1), 10, 1) == ()
    assert parted(joined(())) == ()


def test_a_row_that_was_not_asked_is_an_error() -> None:
    with pytest.raises(LocalError, match="not asked for any"):
        score(reduced(np.zeros(3), Want(0), GREEDY), 1, 1)
    wide = reduced(-np.arange(30.0), Want(0, top=True), GREEDY)
    with pytest.raises(LocalError, match="not asked for token 25"):
        score(wide, 25, 1)
