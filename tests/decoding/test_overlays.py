"""E²-SCI over other methods: `e2sci+HOST`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.messages import DraftWindow
from bus.protocol.requests import new_request
from decoding import methods
from decoding.methods.base import Control, Method
from decoding.methods.divergence import DivergenceRule, ElasticRule
from decoding.methods.paces import Ahead, Continuous, Lockstep
from decoding.sampling import SamplingParams
from tests.decoding.test_pair import fates, pairs, windows
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyPair, likely_tree, target_alone

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)
OVERLAYS = tuple(name for name in methods.names() if "+" in name)
HOSTS = tuple(name.removeprefix("e2sci+") for name in OVERLAYS)


def found(name: str) -> Method:
    method = methods.find(name)
    assert method is not None, name
    return method


@pytest.mark.parametrize("name", HOSTS)
def test_over_any_host_credit_moves_the_threshold_of_an_elastic_rule(name: str) -> None:
    host, over = found(name), found(f"e2sci+{name}")
    assert over.name == f"e2sci+{name}"
    assert over.control is Control.CREDIT
    assert over.fixed_threshold is None
    assert not over.lossless
    assert over.summary.endswith("(lossy)")
    if host.lossless:
        assert isinstance(over.acceptance, ElasticRule)
    else:
        assert over.acceptance is host.acceptance


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_keeps_its_pace_and_one_in_lockstep_gets_that_of_e2sci(name: str) -> None:
    host, over = found(name), found(f"e2sci+{name}")
    paced = found("e2sci") if host.lockstep else host
    assert (over.pace, over.runs_on) == (paced.pace, paced.runs_on)
    assert over.needs == host.needs


def test_what_that_means_for_the_methods_there_are() -> None:
    def parts(name: str) -> tuple[type, type, bool]:
        method = found(name)
        return type(method.acceptance), type(method.pace), method.runs_on

    assert parts("e2sci+sd") == parts("e2sci") == (ElasticRule, Ahead, True)
    assert parts("e2sci+fsd") == (DivergenceRule, Ahead, True)
    assert parts("e2sci+fsd-plc") == (DivergenceRule, Ahead, False)
    assert parts("e2sci+amusd") == (ElasticRule, Continuous, False)


def test_a_host_of_its_own_making_is_kept_but_for_what_is_laid_over_it() -> None:
    host = replace(found("sd"), name="mine", needs=("trees", "hidden_states"), pace=Lockstep(3))
    over = methods.e2sci.over(host)
    assert (over.name, over.needs) == ("e2sci+mine", ("trees", "hidden_states"))
    assert isinstance(over.pace, Ahead)


@pytest.mark.parametrize(
    ("name", "threshold"), [("e2sci+fsd:0.25", 0.25), ("e2sci+amusd:0.1", 0.1)]
)
def test_an_overlay_takes_the_base_of_its_threshold(name: str, threshold: float) -> None:
    method = found(name)
    assert (method.name, method.threshold, method.fixed_threshold) == (name, threshold, None)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("e2sci+e2sci", "the threshold of e2sci moves already; lay e2sci over one of auto, sd"),
        ("e2sci+e2sci+fsd", "the threshold of e2sci+fsd moves already"),
        ("e2sci+e2sci-no-plc", "e2sci-no-plc is e2sci with one part changed"),
        ("e2sci+e2sci-fixed", "e2sci-fixed is e2sci with one part changed"),
        ("e2sci+e2sci-explore", "the threshold of e2sci-explore moves already"),
        ("e2sci+auto-chain", "auto-chain is auto with one part changed"),
        ("e2sci+", "there is no 'e2sci+'"),
        ("e2sci+nonsense", "there is no 'e2sci+nonsense'"),
        ("fsd+e2sci", "there is no 'fsd+e2sci'"),
        ("e2sci+sd:6", "there is no 'e2sci+sd:6'"),
        ("e2sci+sd:6:0.1", "there is no 'e2sci+sd:6:0.1'"),
        ("x" * 64, "known are auto, "),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(name: str, why: str) -> None:
    assert methods.find(name) is None
    sentence = methods.why_unknown(name)
    assert why in sentence
    assert "\n" not in sentence
    assert len(sentence) <= 500  # what a fault can carry


@pytest.mark.parametrize("name", [*OVERLAYS, "e2sci+fsd:0.25"])
def test_a_request_can_ask_for_it(name: str) -> None:
    assert new_request("Hello", method=name).method == name


exact_hosts = st.sampled_from([name for name in HOSTS if found(name).lossless])


@settings(max_examples=60, deadline=None)
@given(
    host=exact_hosts, pair=pairs, fates=fates, windows=windows,
    sampling=st.sampled_from([GREEDY, SAMPLED]), draft_ms=st.sampled_from([0.5, 2.0, 9.0]),
    forget=st.frozensets(st.integers(0, 40), max_size=3),
)  # fmt: skip
def test_below_a_threshold_of_zero_it_writes_what_its_exact_host_writes(
    host: str, pair: ToyPair, fates: tuple[Fate, ...], windows: tuple[int, ...],
    sampling: SamplingParams, draft_ms: float, forget: frozenset[int],
) -> None:  # fmt: skip
    proposing = replace(pair, speculator=likely_tree)
    answers = [
        EdgeCloudPair(
            proposing, sampling, method=found(name), windows=windows, fates=fates, forget_at=forget,
            prompt=(1, 0), draft_ms=draft_ms, threshold=-1.0,
        ).run()
        for name in (host, f"e2sci+{host}")
    ]  # fmt: skip
    assert answers[0] == answers[1] == target_alone(pair, (1, 0), sampling, 24, frozenset())


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_lenient_threshold_lets_through_what_its_exact_host_rejects(name: str) -> None:
    """Windows carry probabilities or trees have them, and a divergence of 0.3 nats is accepted."""
    pair = ToyPair(agreement=0.8, vocab_size=9, num_sparse=9, speculator=likely_tree)
    run = EdgeCloudPair(
        pair, GREEDY, method=found(name), threshold=0.3, max_new_tokens=40, draft_ms=0.5,
        tree_tokens=1,
    )  # fmt: skip
    answer = run.run()
    sent = [message for message in run.sent if isinstance(message, DraftWindow)]
    assert bool(sent) is not bool(found(name).speculator)
    assert all(message.rows is not None for message in sent)
    assert answer != target_alone(pair, (1, 2, 3), GREEDY, 40, frozenset())
