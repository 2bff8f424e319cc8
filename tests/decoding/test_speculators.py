"""Sessions whose target proposes by a speculator: over any link, with any proposal, in every
order of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.errors import LocalError
from bus.protocol.messages import Ack, DraftWindow, Feedback, FinishReason
from decoding import methods
from decoding.engine import ProposedTree
from decoding.methods import Method
from decoding.sampling import SamplingParams
from tests.decoding.test_pair import fates
from tests.explorer import Explorer, explore
from tests.harness import EdgeCloudPair, Fate
from tests.toy import Speculator, ToyPair, likely_tree, nonsense, target_alone

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)
CUT = SamplingParams(temperature=1.2, top_p=0.8, top_k=5, seed=7)
PROMPT = (1, 2, 3)
NEVER: frozenset[int] = frozenset()
LOSSLESS = ("medusa", "eagle3")


def found(name: str) -> Method:
    method = methods.find(name)
    assert method is not None
    return method


def session(
    pair: ToyPair, name: str = "medusa", sampling: SamplingParams = GREEDY, **more: object
) -> EdgeCloudPair:
    return EdgeCloudPair(pair, sampling, method=found(name), **more)  # type: ignore[arg-type]


pairs = st.builds(
    ToyPair,
    vocab_size=st.integers(2, 9),
    agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 50),
    num_sparse=st.integers(1, 9),
    speculator=st.just(likely_tree) | st.integers(0, 20).map(nonsense),
)


@settings(max_examples=120, deadline=None)
@given(
    pair=pairs, name=st.sampled_from(LOSSLESS), sampling=st.sampled_from([GREEDY, SAMPLED, CUT]),
    fates=fates, forget=st.frozensets(st.integers(0, 30), max_size=2), size=st.integers(0, 12),
    length=st.integers(1, 24), end=st.none() | st.integers(0, 8),
)  # fmt: skip
def test_a_lossless_method_writes_the_targets_own_text_for_any_proposal(
    pair: ToyPair, name: str, sampling: SamplingParams, fates: tuple[Fate, ...],
    forget: frozenset[int], size: int, length: int, end: int | None,
) -> None:  # fmt: skip
    """Lost, repeated and reordered messages, restarts, any size of tree, any end of the answer."""
    eos = NEVER if end is None else frozenset({end})
    run = session(
        pair, name, sampling, fates=fates, forget_at=forget, tree_tokens=size, eos=eos,
        max_new_tokens=length,
    )  # fmt: skip
    assert run.run() == target_alone(pair, PROMPT, sampling, length, eos)
    assert not any(isinstance(message, DraftWindow) for message in run.sent)


def test_a_tree_saves_passes_and_its_size_is_the_settings() -> None:
    pair = ToyPair(agreement=1.0, speculator=likely_tree, num_sparse=7)
    by_size = {}
    for size in (0, 1, 4):
        run = session(pair, tree_tokens=size, max_new_tokens=40)
        run.run()
        sent = [m for m in run.sent if isinstance(m, Feedback) and m.pass_tokens]
        assert {m.proposed for m in sent if m.proposed} <= {*range(1, size + 1)}
        assert all(m.pass_tokens == 1 + m.proposed for m in sent)
        assert (len(run.trees) > 0) is (size > 0)
        by_size[size] = len(sent)
    assert by_size[0] == 40
    assert by_size[4] < by_size[1] < by_size[0]


def test_accepted_tokens_of_a_tree_are_marked_and_counted() -> None:
    pair = ToyPair(agreement=1.0, speculator=likely_tree, num_sparse=7)
    run = session(pair, tree_tokens=4, max_new_tokens=30)
    run.run()
    num_accepted = sum(len(tree.walked.path) for tree in run.trees)
    assert num_accepted > 5
    assert sum(run.accepted) == num_accepted


@pytest.mark.parametrize("at", range(6))
def test_an_end_token_inside_a_path_ends_the_answer_there(at: int) -> None:
    pair = ToyPair(agreement=1.0, speculator=likely_tree, num_sparse=7, seed=2)
    alone = target_alone(pair, PROMPT, GREEDY, 24, NEVER)
    eos = frozenset({alone[at]})
    run = session(pair, eos=eos, tree_tokens=12)
    assert run.run() == target_alone(pair, PROMPT, GREEDY, 24, eos)
    assert run.finished is not None
    assert run.finished.reason is FinishReason.STOP


def test_the_text_never_goes_beyond_what_was_asked_for() -> None:
    pair = ToyPair(agreement=1.0, speculator=likely_tree, num_sparse=7)
    for length in range(1, 12):
        run = session(pair, max_new_tokens=length, tree_tokens=12)
        assert run.run() == target_alone(pair, PROMPT, GREEDY, length, NEVER)
        assert run._cloud is None or len(run._cloud.tokens) <= len(PROMPT) + length


def test_typical_acceptance_writes_another_text_and_takes_longer_paths() -> None:
    pair = ToyPair(agreement=0.6, speculator=likely_tree, vocab_size=9, num_sparse=9)
    exact, typical = (session(pair, name, tree_tokens=8) for name in ("medusa", "medusa-typical"))
    assert exact.run() == target_alone(pair, PROMPT, GREEDY, 24, NEVER)
    assert typical.run() != exact.answer
    assert len(typical.answer) == 24

    def per_tree(run: EdgeCloudPair) -> float:
        return sum(len(tree.walked.path) for tree in run.trees) / len(run.trees)

    assert per_tree(typical) > per_tree(exact)


@settings(max_examples=60, deadline=None)
@given(
    pair=pairs, name=st.sampled_from(["medusa-typical", "e2sci+medusa", "e2sci+eagle3"]),
    sampling=st.sampled_from([GREEDY, SAMPLED]), fates=fates, threshold=st.sampled_from([0.0, 0.3]),
    forget=st.frozensets(st.integers(0, 30), max_size=2), end=st.none() | st.integers(0, 8),
)  # fmt: skip
def test_a_lossy_method_comes_to_its_end_over_any_link(
    pair: ToyPair, name: str, sampling: SamplingParams, fates: tuple[Fate, ...], threshold: float,
    forget: frozenset[int], end: int | None,
) -> None:  # fmt: skip
    eos = NEVER if end is None else frozenset({end})
    run = session(pair, name, sampling, fates=fates, forget_at=forget, threshold=threshold, eos=eos)
    answer = run.run()
    assert len(answer) == 24 or answer[-1] in eos
    assert not eos & set(answer[:-1])


def test_the_edge_sends_its_threshold_by_acknowledgements_and_the_cloud_clips_it() -> None:
    pair = ToyPair(agreement=0.6, speculator=likely_tree, vocab_size=9, num_sparse=9)
    run = session(pair, "e2sci+medusa", threshold=0.9, tree_tokens=1)
    run.run()
    acks = [message for message in run.sent if isinstance(message, Ack)]
    assert acks[0].threshold == pytest.approx(0.02), "the conservative one before any update"
    assert acks[-1].threshold == pytest.approx(0.9)
    assert {round(tree.judge.threshold, 3) for tree in run.trees} == {0.02, 0.3}
    exact = session(pair, "medusa")
    exact.run()
    assert {m.threshold for m in exact.sent if isinstance(m, Ack)} <= {None}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, CUT])
@pytest.mark.parametrize(
    ("seed", "faults", "ordered", "speculator"),
    [(1, 0, False, likely_tree), (3, 1, True, likely_tree), (3, 1, True, nonsense(4))],
)
def test_no_order_of_events_breaks_a_session(
    sampling: SamplingParams, seed: int, faults: int, ordered: bool, speculator: Speculator
) -> None:
    pair = ToyPair(vocab_size=3, agreement=0.5, seed=seed, num_sparse=3, speculator=speculator)
    explorer = Explorer(pair, sampling, found("medusa"), 4, lease=2, ordered=ordered, tree_tokens=3)
    assert explore(explorer, faults, limit=12_000) > 20
    assert explorer.trees > 3


def bad(tokens: tuple[int, ...], parents: tuple[int, ...]) -> Speculator:
    def propose(pair: ToyPair, text: tuple[int, ...], most: int) -> ProposedTree:
        made = likely_tree(pair, text, most)
        return ProposedTree(tokens, parents, made.q_ids, made.q_probs)

    return propose


@pytest.mark.parametrize(
    "speculator",
    [bad((1, 2), (0, 0)), bad((1,) * 9, (-1,) * 9), bad((99,), (-1,)), bad((1, 2), (-1,))],
)
def test_a_bad_tree_is_an_error_before_anything_runs(speculator: Speculator) -> None:
    run = session(ToyPair(speculator=speculator))
    with pytest.raises(LocalError, match="the speculator proposed"):
        run.run()
