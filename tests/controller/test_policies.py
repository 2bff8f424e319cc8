"""Which policy a method's sessions are under."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace

from bus.protocol.errors import ConfigurationError
from bus.protocol.messages import Outcome
from bus.store import Role, WorkerRecord
from controller.calibration import About, Calibration, load_calibration
from controller.policies import EXPLORED_THRESHOLDS, EXPLORED_WINDOWS, SHIPPED, Policies
from controller.settings import ControllerSettings
from decoding.control import FixedPolicy
from decoding.credit import CreditLaw, CreditPolicy, ExplorePolicy
from decoding.predictor import NeuralPredictor
from tests.controller import house
from tests.decoding.test_predictor import layers
from training.calibration.table import Price, Table

REPORT = replace(house.REPORT, method="e2sci", outcome=Outcome.PARTIAL, num_accepted=1)

NUMBERS = {"threshold": 0.25, "window": 6, "base_threshold": 0.1, "credit_memory": 7}
POLICIES = Policies(ControllerSettings.load(calibration="none", **NUMBERS))


@pytest.mark.parametrize(
    ("method", "threshold"),
    [("sd", 0.25), ("fsd", 0.25), ("fsd:0.4", 0.4), ("e2sci-fixed:0.05", 0.05), ("unknown", 0.25)],
)
def test_fixed_control_has_the_threshold_of_name_or_settings(method: str, threshold: float) -> None:
    assert POLICIES(method) == FixedPolicy(threshold, 6)


@pytest.mark.parametrize(
    ("method", "base"),
    [("e2sci", 0.1), ("e2sci-no-plc", 0.1), ("e2sci:0.2", 0.2), ("e2sci-no-threshold", 0.1)],
)
def test_credit_moves_about_the_base_of_name_or_settings(method: str, base: float) -> None:
    policy = POLICIES(method)
    assert isinstance(policy, CreditPolicy)
    assert (policy.law.base, policy.law.memory, policy.law.smoothing) == (base, 7, 0.3)
    assert policy.initial().threshold == pytest.approx(base)


def test_without_history_credit_is_the_last_window() -> None:
    policy = POLICIES("e2sci-no-history")
    assert isinstance(policy, CreditPolicy)
    assert (policy.law.memory, policy.law.smoothing) == (1, 1.0)


def test_credit_follows_what_is_expected_or_what_stood() -> None:
    """Of the report's 2 tokens 1.5 were expected, 1 stood."""
    found = []
    for signal in ("expected", "realised"):
        settings = ControllerSettings.load(calibration="none", credit_signal=signal)
        policy = Policies(settings)("e2sci")
        found.append(policy.after(policy.initial(), REPORT).credit)
    assert found[0] - found[1] == pytest.approx(0.3 * 0.5 / 2)


def test_a_method_has_one_policy() -> None:
    assert POLICIES("e2sci") is POLICIES("e2sci")


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="least_threshold ≤ base_threshold"):
        ControllerSettings.load(base_threshold=0.4)


def test_exploring_draws_evenly_from_the_grid_and_keeps_credit() -> None:
    policy, credit = POLICIES("e2sci-explore"), POLICIES("e2sci")
    assert isinstance(policy, ExplorePolicy)
    state, other = policy.initial(), credit.initial()
    seen: Counter[tuple[float, int]] = Counter()
    for _ in range(2000):
        state, other = policy.after(state, REPORT), credit.after(other, REPORT)
        assert state.credit == other.credit
        seen[state.threshold, state.window] += 1
    assert len(seen) == len(EXPLORED_THRESHOLDS) * len(EXPLORED_WINDOWS)
    assert max(seen.values()) < 3 * min(seen.values())


def test_a_repeated_exploration_draws_the_same() -> None:
    policy = POLICIES("e2sci-explore")
    assert policy.after(policy.initial(), REPORT) == policy.after(policy.initial(), REPORT)


# --- calibration ------------------------------------------------------------------------------

ABOUT = About(
    "big", "small", "digest", "data", "loopback", "2026-11-25", 9, {4: 0.7}, (0.5,), (0.05, 0.3),
    Table((0.5,), (), {}, Price(30.0)).to_json(),
)  # fmt: skip


def workers(draft: str = "small") -> list[WorkerRecord]:
    return [
        WorkerRecord(
            worker_id="c", role=Role.CLOUD, boot="1", model="big", tokenizer_digest="digest"
        ),
        WorkerRecord(
            worker_id="e", role=Role.EDGE, boot="1", model=draft, tokenizer_digest="digest"
        ),
    ]


@pytest.fixture
def calibrated(tmp_path: Path) -> Policies:
    path = tmp_path / "c.safetensors"
    Calibration(ABOUT, layers(seed=1, scale=0.3)).save(path)
    return Policies(ControllerSettings.load(calibration=str(path), **NUMBERS))


def test_a_calibration_brings_neutral_credit_predictor_and_safety(calibrated: Policies) -> None:
    policy = calibrated("e2sci")
    assert isinstance(policy, CreditPolicy)
    assert policy.law.neutral(4) == pytest.approx(0.7)
    assert isinstance(policy.law.predictor, NeuralPredictor)
    assert (policy.law.safe(0.9), policy.law.safe(0.4)) == (0.3, 0.05)
    assert policy.law.base == 0.1


def test_another_pair_gets_the_conservative_threshold_until_it_is_gone(
    calibrated: Policies, caplog: pytest.LogCaptureFixture
) -> None:
    calibrated.check(workers())
    assert isinstance(calibrated("e2sci"), CreditPolicy)
    for _ in range(3):
        calibrated.check(workers(draft="other"))
    assert calibrated("e2sci") == FixedPolicy(0.02, 6)
    assert calibrated("fsd") == FixedPolicy(0.25, 6)
    assert caplog.text.count("it was made for the draft small, here is other") == 1
    calibrated.check(workers())
    assert isinstance(calibrated("e2sci"), CreditPolicy)
    calibrated.check([])
    assert isinstance(calibrated("e2sci"), CreditPolicy)


def test_a_missing_calibration_is_said_and_the_conservative_threshold_holds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policies = Policies(ControllerSettings.load(calibration="/nowhere", **NUMBERS))
    assert policies("e2sci") == FixedPolicy(0.02, 6)
    assert "/nowhere is no calibration" in caplog.text
    policies.check(workers())
    assert policies("e2sci") == FixedPolicy(0.02, 6)


def test_the_shipped_calibration_can_be_used() -> None:
    calibration = load_calibration(SHIPPED)
    assert calibration.about.num_windows == sum(
        cell.num_windows for b in Table.from_json(calibration.about.table).bins for cell in b.cells
    )
    assert all(0.0 <= safe <= 0.3 for safe in calibration.about.safe)
    law = calibration.law(CreditLaw())
    state = law.initial()
    for _ in range(20):
        state = law.after(state, 4.0, 4)
        assert law.least <= state.threshold <= law.most
        assert state.window >= 1
    assert state.threshold > law.initial().threshold
