"""What the controller is told about a judged window."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from bus.protocol.arrays import pack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.messages import DraftWindow, Feedback, Outcome, WindowReport
from decoding.acceptance import jensen_shannon
from decoding.engine import TargetRow
from decoding.methods.base import Proposal
from decoding.sampling import SamplingParams
from decoding.verification import (
    Arrived,
    Verification,
    committed_quality,
    window_report,
)

PROBS = np.array([0.5, 0.5], dtype="<f2")
WINDOW = DraftWindow(
    "s1", 1, 0, 0, 3, pack_tokens((7, 9)), pack_tokens((0, 7, 0, 9)), np.tile(PROBS, 2).tobytes(),
    0.1, 0, 6.0, 26.0, 3.0, 9.0, True,
)  # fmt: skip
FEEDBACK = Feedback("s1", 1, 0, 0, 5, Outcome.PARTIAL, 1, 8, 0.1, 10.0, 5.0, 3)
HALVES = [np.array([0.5, 0.25]), np.array([0.25, 0.25])]


def verification(num_rows: int) -> Verification:
    proposals = tuple(
        Proposal(token, np.array([0, token], np.int32), PROBS, SamplingParams(1.0))
        for token in (7, 9)
    )
    rows = [TargetRow(7, p1, np.zeros(2), 0.5) for p1 in HALVES]
    rows.append(TargetRow(7, np.empty(0), np.empty(0), 0.5))
    return Verification(
        Arrived(WINDOW, 100.0), proposals, tuple(rows[:num_rows]), verify_ms=10.0, done_ms=117.5
    )


@pytest.mark.parametrize("num_rows", [2, 3])
def test_a_report_has_the_verdict_the_divergences_and_the_costs(num_rows: int) -> None:
    """q₁ and temperature-1 p, over all positions judged or not, and not the bonus row."""
    report = window_report(verification(num_rows), FEEDBACK, "edge-1", "c1", "sd")
    half = np.array([0.5, 0.5])
    assert report == WindowReport(
        feedback=FEEDBACK,
        edge="edge-1",
        client="c1",
        method="sd",
        expected_accepted=0.75 + 0.75 * 0.5,
        mean_jsd=(jensen_shannon(HALVES[0], half) + jensen_shannon(HALVES[1], half)) / 2,
        num_drafted=2,
        edge_ms=26.0,
        cloud_ms=17.5,
        rework_ms=3.0,
        energy_j=None,
        num_scored=1,
        log_likelihood=math.log(0.25),
        num_greedy=1,
        regret=math.log(0.5 / 0.25),
    )
    decoded = decode(encode(report))
    assert isinstance(decoded, WindowReport)
    assert decoded.expected_accepted == 1.125


@pytest.mark.parametrize(
    ("temperature", "scored"), [(0.0, (1, math.log(0.5), 1, 0.0)), (1.0, (0, 0.0, 0, 0.0))]
)
def test_without_the_draft_s_probabilities_accepted_tokens_are_counted(
    temperature: float, scored: tuple[float, ...]
) -> None:
    """There is no divergence; at temperature 0 what was accepted is the argmax."""
    nothing = np.empty(0)
    message = msgspec.structs.replace(WINDOW, q_ids=b"", q_probs=b"")
    proposals = tuple(
        Proposal(token, np.empty(0, np.int32), np.empty(0, "<f2"), SamplingParams(temperature))
        for token in (7, 9)
    )
    rows = tuple(TargetRow(token, nothing, nothing, 0.5) for token in (7, 8, 3))
    judged = Verification(Arrived(message, 100.0), proposals, rows, verify_ms=10.0, done_ms=117.5)
    feedback = msgspec.structs.replace(FEEDBACK, next_token=None)
    report = window_report(judged, feedback, "edge-1", "c1", "sd")
    assert (report.expected_accepted, report.mean_jsd) == (1.0, None)
    assert (report.num_drafted, report.cloud_ms) == (2, 17.5)
    assert (
        report.num_scored, report.log_likelihood, report.num_greedy, report.regret
    ) == pytest.approx(scored)  # fmt: skip
    assert isinstance(decode(encode(report)), WindowReport)


@pytest.mark.parametrize(("done_ms", "queue_ms"), [(117.5, 7.5), (110.0, 0.0), (109.0, 0.0)])
def test_waiting_is_never_negative(done_ms: float, queue_ms: float) -> None:
    judged = verification(2)
    judged = Verification(judged.arrived, judged.proposals, judged.rows, 10.0, done_ms)
    assert judged.queue_ms == queue_ms
    assert msgspec.structs.replace(FEEDBACK, queue_ms=queue_ms).queue_ms >= 0


GREEDY_PROPOSALS = tuple(
    Proposal(token, np.array([token, 0], np.int32), PROBS, SamplingParams()) for token in (7, 9)
)


@pytest.mark.parametrize(
    ("num_accepted", "next_token", "probs", "num_greedy"),
    [
        (0, 7, [0.5], 1),  # the argmax in place of the first
        (1, 7, [0.5, 0.5], 2),
        (2, None, [0.5, 0.25], 1),  # 9 stands though it is not the argmax: a lossy rule
        (2, 7, [0.5, 0.25, 0.5], 2),  # and a bonus
    ],
)
def test_quality_is_of_what_the_window_commits(
    num_accepted: int, next_token: int | None, probs: list[float], num_greedy: int
) -> None:
    judged = verification(3)
    judged = Verification(judged.arrived, GREEDY_PROPOSALS, judged.rows)
    feedback = msgspec.structs.replace(FEEDBACK, num_accepted=num_accepted, next_token=next_token)
    quality = committed_quality(judged, feedback)
    assert quality.num_tokens == len(probs)
    assert quality.log_likelihood == pytest.approx(sum(map(math.log, probs)), abs=1e-12)
    assert quality.num_greedy == num_greedy
    assert quality.regret == pytest.approx(sum(math.log(0.5 / p) for p in probs), abs=1e-12)


def test_a_probability_that_was_rounded_to_zero_is_a_number() -> None:
    judged = verification(1)
    row = TargetRow(1, np.zeros(2), np.empty(0), 1.0)
    judged = Verification(judged.arrived, GREEDY_PROPOSALS, (row,))
    feedback = msgspec.structs.replace(FEEDBACK, num_accepted=1, next_token=None)
    assert committed_quality(judged, feedback).log_likelihood == pytest.approx(math.log(1e-30))
