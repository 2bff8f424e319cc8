from __future__ import annotations

from decoding.control import ControlState, FixedPolicy
from tests.sessions import REPORT

POLICY = FixedPolicy(threshold=0.15, window=4)


def test_the_fixed_policy_says_what_its_settings_say() -> None:
    assert POLICY.initial() == ControlState(0.15, 4, credit=0.0, credit_delta=0.0, version=1)


def test_the_fixed_policy_does_not_care_what_is_reported() -> None:
    state = POLICY.initial()
    assert POLICY.after(state, REPORT) is state


def test_a_state_of_other_settings_takes_the_present_ones_over_in_a_newer_version() -> None:
    for kept in (ControlState(0.2, 4, version=7), ControlState(0.15, 8, version=7)):
        assert POLICY.after(kept, REPORT) == ControlState(0.15, 4, version=8)
