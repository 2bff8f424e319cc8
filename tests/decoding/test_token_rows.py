"""Distributions of committed tokens travel with feedback to a session that asks for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import DraftWindow, Feedback, OpenSession, Outcome, TokenRows
from decoding import methods
from decoding.engine import TargetRow, Want
from decoding.methods.base import Proposal
from decoding.rows import reduced
from decoding.sampling import SamplingParams
from decoding.token_rows import TokenRow, carried, packed
from engines.row import given_rows
from tests.chain import Chain, Middle
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyPair, target_alone

PAIR = ToyPair(vocab_size=9, agreement=0.8, seed=1)
GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.9, seed=5)
NEVER: frozenset[int] = frozenset()


def target_row(*logits: float, top: bool = True) -> TargetRow:
    return reduced(np.array(logits), Want(0, top=top), GREEDY)


def row(ids: tuple[int, ...], *probs: float) -> TokenRow:
    return TokenRow(pack_tokens(ids), np.array(probs, "<f2").tobytes())


def over(**changes: object) -> Chain:
    """E²-SCI over a chain of three toy models."""
    method = methods.find("e2sci+pipespec")
    assert method is not None
    middle = Middle(vocab_size=9, agreement=0.8, seed=1, closeness=0.8)
    given = {"sampling": GREEDY, "middle": middle, "method": method, "max_new_tokens": 80}
    return Chain(PAIR, **(given | changes))  # type: ignore[arg-type]


# --- one row ----------------------------------------------------------------------------------


def test_a_row_travels_in_canonical_order_and_comes_back() -> None:
    sent = packed((target_row(0.0, 2.0, 2.0, 1.0), target_row(5.0, 0.0, 0.0, 0.0)))
    assert sent is not None
    feedback = Feedback(1, 10, pack_tokens((1, 0)), None, 0, 0, 0, 1, rows=sent)
    rows = carried(feedback, 10, 2)
    assert None not in rows
    ids, probs = rows[0].arrays()  # type: ignore[union-attr]
    assert ids.tolist() == [1, 2, 3, 0]  # equal ones by rising id
    softmax = np.exp([2.0, 2.0, 1.0, 0.0]) / np.exp([0.0, 2.0, 2.0, 1.0]).sum()
    assert probs == pytest.approx(softmax, rel=1e-3)
    assert carried(feedback, 11, 1) == rows[1:]
    assert rows[1].arrays()[0][0] == 0  # type: ignore[union-attr]


def test_without_rows_nothing_is_known() -> None:
    assert packed((target_row(0.0, 1.0, top=False),)) is None
    assert packed(()) is None
    assert carried(Feedback(1, 4, pack_tokens((7, 8)), None, 0, 0, 0, 1), 5, 1) == (None,)


@pytest.mark.parametrize(
    ("num_tokens", "ids", "probs", "why"),
    [
        (2, (1, 2, 3), (0.5, 0.5, 0.5), "q_ids: expected i32"),
        (1, (), (), "q_ids: expected i32"),
        (1, (1, 2), (0.5,), "q_probs: expected f16"),
        (1, (1, 2), (0.2, 0.5), "probabilities falling"),
        (0, (1,), (0.5,), "q_probs: expected f16"),
    ],
)
def test_what_are_no_rows_of_the_tokens_is_refused(
    num_tokens: int, ids: tuple[int, ...], probs: tuple[float, ...], why: str
) -> None:
    rows = TokenRows(pack_tokens(ids), np.array(probs, "<f2").tobytes())
    with pytest.raises(ValueError, match=why):
        Feedback(1, 4, pack_tokens(range(num_tokens)), None, 0, 0, 0, 1, rows=rows)


# --- as a draft's -----------------------------------------------------------------------------


def test_a_token_without_a_row_or_against_it_is_certain() -> None:
    known = (row((4, 5), 0.75, 0.25), None, row((4, 5), 0.75, 0.25), row((4,), 1.0))
    ids, probs = given_rows((4, 6, 7, 4), known, GREEDY)
    assert ids.tolist() == [[4, 5], [6, 0], [7, 0], [4, 0]]
    assert probs.tolist() == [[0.75, 0.25], [1, 0], [1, 0], [1, 0]]
    assert given_rows((4, 6), (), GREEDY)[0].tolist() == [[4], [6]]


def test_above_temperature_zero_a_row_need_not_begin_with_its_token() -> None:
    known = (row((4, 5), 0.75, 0.25),)
    assert given_rows((5,), known, SAMPLED)[1].tolist() == [[0.75, 0.25]]
    assert given_rows((5,), known, GREEDY)[1].tolist() == [[1.0]]
    narrow = SamplingParams(temperature=0.9, top_p=0.5, seed=5)
    assert given_rows((5,), known, narrow)[1].tolist() == [[1.0]]


# --- in a session -----------------------------------------------------------------------------


def test_feedback_carries_them_where_they_are_asked_for() -> None:
    with_rows = EdgeCloudPair(PAIR, GREEDY, method=methods.pipespec.TWO, rows=True)
    assert with_rows.run() == target_alone(PAIR, (1, 2, 3), GREEDY, 24, NEVER)
    (opened,) = [message for message in with_rows.sent if isinstance(message, OpenSession)]
    assert opened.rows
    feedback = [message for message in with_rows.sent if isinstance(message, Feedback)]
    assert feedback
    assert all(message.rows is not None for message in feedback if message.tokens)
    without = EdgeCloudPair(PAIR, GREEDY, method=methods.pipespec.TWO)
    without.run()
    assert not any(m.rows for m in without.sent if isinstance(m, Feedback))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_the_middle_models_own_distributions_are_the_drafts(sampling: SamplingParams) -> None:
    chain = over(sampling=sampling)
    chain.run()
    windows = [message for message in chain.sent if isinstance(message, DraftWindow)]
    rows = [
        (tuple(ids), probs.tolist(), message.start + index, token)
        for message in windows
        for index, (token, ids, probs) in enumerate(
            zip(message.token_ids, message.q_id_rows.tolist(), message.q_prob_rows, strict=True)
        )
    ]
    uncertain = [(ids, probs, at, token) for ids, probs, at, token in rows if len(set(probs)) > 2]
    assert len(uncertain) > len(rows) // 2
    text = chain.prompt + chain.answer
    ids, probs, at, token = next(r for r in uncertain if text[r[2]] == r[3])
    own = reduced(chain.middle.target_logits(text[:at]), Want(0, top=True), sampling)
    sent = packed((own,))
    assert sent is not None
    assert (pack_tokens(ids), np.array(probs, "<f2").tobytes()) == (sent.q_ids, sent.q_probs)
    assert Proposal(token, np.array(ids, "<i4"), np.array(probs, "<f2"), sampling).possible


def test_leniency_lets_through_what_pipespec_rejects() -> None:
    exact = over(method=methods.pipespec.METHOD)
    exact.run()
    lenient = over(threshold=0.3)
    lenient.run()
    rejected = [
        sum(judged.outcome is not Outcome.ACCEPTED for judged in chain.judged)
        for chain in (exact, lenient)
    ]
    assert rejected[1] < rejected[0]
    assert lenient.restarts < exact.restarts


DELAYS = st.lists(st.sampled_from((1.0, 5.0, 30.0, 120.0)), max_size=2)
FATES = st.lists(DELAYS, max_size=40).map(lambda all_of: tuple(Fate(tuple(d)) for d in all_of))


@settings(max_examples=30, deadline=None)
@given(
    sampling=st.sampled_from([GREEDY, SAMPLED]), fates=FATES, inner_fates=FATES,
    forget=st.frozensets(st.integers(2, 40), max_size=2), silent=st.integers(0, 9),
)  # fmt: skip
def test_below_a_threshold_of_zero_the_text_is_the_targets_own(
    sampling: SamplingParams, fates: tuple[Fate, ...], inner_fates: tuple[Fate, ...],
    forget: frozenset[int], silent: int,
) -> None:  # fmt: skip
    chain = over(
        sampling=sampling, threshold=-1.0, fates=fates, inner_fates=inner_fates, silent=silent,
        inner_forget_at=forget, max_new_tokens=30,
    )  # fmt: skip
    assert chain.run() == target_alone(PAIR, chain.prompt, sampling, 30, NEVER)
