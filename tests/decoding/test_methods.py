"""What a method is made of: names, paces, and the exact rule's use of uniforms."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bus.protocol.bounds import SessionCoupling
from bus.protocol.codec import decode, encode
from decoding import methods
from decoding.acceptance import draw_residual
from decoding.engine import Capabilities, DrafterCapabilities, TargetRow
from decoding.methods.base import Control, Flow, PaceView, Proposal
from decoding.methods.exact import ExactRule
from decoding.methods.paces import Lockstep
from decoding.sampling import SamplingParams, from_wire, warp
from decoding.uniforms import Purpose, uniform
from tests.sessions import OPENING

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.5, seed=3, coupling=SessionCoupling.RESIDUAL)
IDS = np.array([9, 2, 5], dtype=np.int32)
PROBS = np.array([0.5, 0.25, 0.125], np.float16)
Q1 = from_wire(IDS, PROBS)


def test_methods_are_found_by_name() -> None:
    assert methods.names()[0] == "auto"
    for name in methods.names():
        method = methods.find(name)
        assert method is not None
        assert method.name == name
        assert method.summary
        assert ("lossless" in method.summary) is method.lossless
    assert methods.find("") is methods.find("SD") is methods.find("nonsense") is None


def test_a_method_in_lockstep_takes_a_static_window() -> None:
    method = methods.find("sd:6")
    assert method is not None
    assert method.name == "sd:6"
    assert method.acceptance is methods.sd.METHOD.acceptance
    assert method.pace.flow(view(window=4)) == Flow(6, budget=6, awaits=True)


@pytest.mark.parametrize(
    "name", ["sd:", "sd:0", "sd:33", "sd:-1", "sd:04", "sd:x", "plc:4", "no:4"]
)
def test_other_static_windows_are_unknown(name: str) -> None:
    assert methods.find(name) is None


@pytest.mark.parametrize(
    ("name", "threshold", "fixed", "message"),
    [
        ("fsd:0.25", 0.25, 0.25, 4), ("fsd:0.4:6", 0.4, 0.4, 6), ("fsd:6", None, None, 6),
        ("e2sci-fixed:0.05", 0.05, 0.05, 4), ("e2sci:0.1", 0.1, None, 4),
        ("e2sci-no-plc:0.1:8", 0.1, None, 8), ("fsd:0.0", 0.0, 0.0, 4),
    ],
)  # fmt: skip
def test_a_lossy_method_takes_a_threshold(
    name: str, threshold: float | None, fixed: float | None, message: int
) -> None:
    method = methods.find(name)
    assert method is not None
    assert (method.name, method.threshold, method.fixed_threshold) == (name, threshold, fixed)
    assert method.pace.flow(view(window=4)).message == message


@pytest.mark.parametrize(
    "name", ["sd:0.1", "plc:0.1", "fsd:0.7", "fsd:1.0", "fsd:.1", "fsd:0.1:", "fsd:6:0.1",
             "fsd-plc:6", "e2sci:0.1:4", "e2sci-no-threshold:0.1", "fsd:0.1:2:3", "fsd:0.1234567"],
)  # fmt: skip
def test_other_thresholds_are_unknown(name: str) -> None:
    assert methods.find(name) is None


def test_each_ablation_lacks_one_part() -> None:
    def parts(method: methods.Method) -> tuple[object, ...]:
        return type(method.acceptance), type(method.pace), method.control

    whole = parts(methods.e2sci.METHOD)
    for ablation in methods.e2sci.ABLATIONS:
        assert sum(a != b for a, b in zip(whole, parts(ablation), strict=True)) == 1


def test_method_names_can_travel() -> None:
    for name in (*methods.names(), "sd:16", "e2sci-no-plc:0.123456:32"):
        assert decode(encode(msgspec.structs.replace(OPENING, method=name))) is not None
        assert len(name) <= 64


def test_sd_is_exact_in_lockstep_under_fixed_control() -> None:
    sd = methods.sd.METHOD
    assert sd.lossless
    assert sd.pace.name == "lockstep"
    assert sd.control is Control.FIXED


def test_fr_spec_is_sd_by_a_draft_with_a_ranked_head() -> None:
    method = methods.find("fr-spec:6")
    assert method is not None
    assert method.lossless
    assert not method.needs_rows(SamplingParams(0.8))
    assert method.pace.flow(view(window=4)) == Flow(6, budget=6, awaits=True)
    assert method.missing_of_drafter(DrafterCapabilities()) == ["ranked_head"]
    assert method.missing_of_drafter(DrafterCapabilities(ranked_head=True)) == []
    assert methods.sd.METHOD.missing_of_drafter(DrafterCapabilities()) == []


def test_what_a_method_needs_are_capabilities_that_there_are() -> None:
    for name in methods.names():
        method = methods.find(name)
        assert method is not None
        assert set(method.needs) <= set(Capabilities.__struct_fields__)
        assert set(method.drafter_needs) <= set(DrafterCapabilities.__struct_fields__)


def view(window: int) -> PaceView:
    return PaceView(window, ahead=False, growth=1.0, forecast=None)


@pytest.mark.parametrize("window", [1, 2, 8])
def test_lockstep_has_one_window_in_flight(window: int) -> None:
    pace = Lockstep()
    assert pace.flow(view(window)) == Flow(window, budget=window, awaits=True)


@pytest.mark.parametrize(
    ("name", "coupling", "needs", "lockstep"),
    [
        ("sd", SessionCoupling.GUMBEL, False, True),
        ("sd:4", SessionCoupling.RESIDUAL, True, True),
        ("plc", SessionCoupling.GUMBEL, False, False),
        ("plc", SessionCoupling.RESIDUAL, True, False),
        ("fsd", SessionCoupling.GUMBEL, True, True),
        ("e2sci", SessionCoupling.GUMBEL, True, False),
    ],
)
def test_what_a_method_sends_and_waits_for(
    name: str, coupling: SessionCoupling, needs: bool, lockstep: bool
) -> None:
    """Ids alone where the target's own choice decides."""
    method = methods.find(name)
    assert method is not None
    for temperature in (0.0, 0.8):
        assert method.needs_rows(SamplingParams(temperature, coupling=coupling)) is needs
    assert method.lockstep is lockstep


def test_strict_lockstep_baselines_never_run_on() -> None:
    assert [n for n in ("sd", "sd:4", "fsd") if getattr(methods.find(n), "runs_on", None)] == []


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 1.0])
def test_greedy_acceptance_is_equality_with_the_argmax(threshold: float) -> None:
    row = TargetRow(5, np.array([0.3, 0.3, 0.3]), np.empty(0), 0.5)
    rule = ExactRule()
    for token in (9, 2, 5):
        proposal = Proposal(token, IDS, PROBS, GREEDY)
        assert rule.accepts(proposal, row, GREEDY, 17, threshold) is (token == 5)


@pytest.mark.parametrize("token", [9, 2, 5])
def test_sampled_acceptance_compares_warped_p_with_warped_q(token: int) -> None:
    """p(x) stands at x's place in q₁; q is the warped one; the uniform is ACCEPT's."""
    index = {9: 0, 2: 1, 5: 2}[token]
    q = warp(Q1, SAMPLED)
    rule = ExactRule()
    for position in range(200):
        u = uniform(SAMPLED.seed, position, Purpose.ACCEPT)
        p = np.full(3, 0.01)
        for p_x, expected in (
            (u * q.prob(token) * 0.999, False),
            (u * q.prob(token) * 1.001, True),
        ):
            p[index] = p_x
            row = TargetRow(0, np.full(3, 0.99), p, 0.5)
            assert (
                rule.accepts(Proposal(token, IDS, PROBS, SAMPLED), row, SAMPLED, position, 1.0)
                is expected
            )


def test_recovery_draws_from_the_residual_of_the_warped_draft() -> None:
    target = np.zeros(12)
    target[[9, 2, 5, 11]] = 0.25
    q = warp(Q1, SAMPLED)
    tokens = set()
    for position in range(50):
        u = uniform(SAMPLED.seed, position, Purpose.RESIDUAL)
        token = ExactRule().recover(Proposal(9, IDS, PROBS, SAMPLED), target, SAMPLED, position)
        assert token == draw_residual(target, q, u)
        tokens.add(token)
    assert tokens == {2, 5, 11}  # of token 9 the draft has more than the target


@pytest.mark.parametrize("name", ["lookahead", "lookahead-similar"])
def test_methods_in_steps_verify_tokens_exactly_and_are_lossy_all_the_same(name: str) -> None:
    method = methods.find(name)
    assert method is not None
    assert method.steps is not None
    assert not method.lossless
    assert "lossy" in method.summary
    assert method.acceptance.lossless
    assert not method.needs_rows(SamplingParams(0.8))
    assert method.runs_on
    assert methods.find(f"{name}:0.1") is None, "there is no threshold"
    assert methods.find(f"{name}:4") is None
