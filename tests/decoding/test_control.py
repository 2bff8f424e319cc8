from __future__ import annotations

from bus.protocol.messages import Feedback, Outcome, WindowReport
from decoding.control import ControlState, FixedPolicy

FEEDBACK = Feedback("s1", 1, 0, 0, 5, Outcome.PARTIAL, 1, 8, 0.25, 10.0, 0.5, 3)
REPORT = WindowReport(
    FEEDBACK, "edge-1", "c1", "sd", 1.5, 0.25, 2, 1.0, 2.0, 3.0, None, 1, -0.5, 1, 0.25
)
POLICY = FixedPolicy(threshold=0.15, window=4)


def test_the_fixed_policy_says_what_its_settings_say() -> None:
    assert POLICY.initial() == ControlState(0.15, 4, credit=0.0, credit_delta=0.0, version=1)


def test_the_fixed_policy_does_not_care_what_is_reported() -> None:
    state = POLICY.initial()
    assert POLICY.after(state, REPORT) is state


def test_a_state_of_other_settings_takes_the_present_ones_over_in_a_newer_version() -> None:
    for kept in (ControlState(0.2, 4, version=7), ControlState(0.15, 8, version=7)):
        assert POLICY.after(kept, REPORT) == ControlState(0.15, 4, version=8)
