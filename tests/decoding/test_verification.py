"""What the controller receives about a judged window, and about passes without one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from bus.protocol.arrays import pack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.messages import DraftRows, Outcome, WindowReport
from decoding.acceptance import jensen_shannon
from decoding.engine import NO_IDS, NO_PROBS, Choice, TargetRow
from decoding.sampling import SamplingParams
from decoding.verification import (
    Judged,
    OwnPasses,
    Reported,
    arrived,
    committed_quality,
    own_report,
    own_token,
    window_report,
)
from tests.sessions import PROMPT, drafted_window

WHOSE = Reported("s1", 1, "edge-1", "c1", "fsd")
PROBS = np.array([0.5, 0.5], dtype="<f2")
ROWS = DraftRows(pack_tokens((0, 7, 0, 9)), np.tile(PROBS, 2).tobytes(), 0.1, 0, 26.0, 3.0)
GREEDY_ROWS = replace(ROWS, q_ids=pack_tokens((7, 8, 8, 9)))
WINDOW = drafted_window(PROMPT, (7, 9), rows=ROWS)
HALVES = [np.array([0.5, 0.25]), np.array([0.25, 0.25])]
SAMPLED = SamplingParams(1.0)


def judged(num_rows: int, sampling: SamplingParams = SAMPLED, **changes: Any) -> Judged:
    """A window of 7 and 9, of which the first is accepted; the target's argmax is 7 everywhere."""
    rows = [TargetRow(7, p1, np.zeros(2), 0.5) for p1 in HALVES]
    rows.append(TargetRow(7, NO_PROBS, NO_PROBS, 0.5))
    plain = Judged(
        window=arrived(WINDOW, 100.0, sampling), reached=0, num_accepted=1,
        outcome=Outcome.PARTIAL, threshold=0.1, done_ms=117.5, rows=tuple(rows[:num_rows]), own=8,
        verify_ms=10.0, pass_tokens=3,
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.mark.parametrize("num_rows", [2, 3])
def test_a_report_has_the_outcome_the_divergences_and_the_costs(num_rows: int) -> None:
    """q₁ and temperature-1 p, over all positions judged or not, and not the bonus row."""
    report = window_report(judged(num_rows), WHOSE)
    half = np.array([0.5, 0.5])
    assert report == WindowReport(
        session="s1",
        incarnation=1,
        number=1,
        edge="edge-1",
        client="c1",
        method="fsd",
        outcome=Outcome.PARTIAL,
        num_drafted=2,
        num_accepted=1,
        num_own=1,
        threshold=0.1,
        expected_accepted=0.75 + 0.75 * 0.5,
        mean_jsd=(jensen_shannon(HALVES[0], half) + jensen_shannon(HALVES[1], half)) / 2,
        edge_ms=26.0,
        cloud_ms=17.5,
        rework_ms=3.0,
        verify_ms=10.0,
        queue_ms=7.5,
        energy_j=None,
        num_scored=1,
        log_likelihood=math.log(0.25),
        num_greedy=1,
        regret=math.log(0.5 / 0.25),
    )
    decoded = decode(encode(report))
    assert isinstance(decoded, WindowReport)
    assert decoded.expected_accepted == 1.125
    assert window_report(judged(num_rows), WHOSE, 0.5).energy_j == 0.5


@pytest.mark.parametrize(
    ("changes", "expected", "scored"),
    [
        ({"reached": 1, "num_accepted": 1}, 1 + 0.75, 0),
        ({"reached": 1, "num_accepted": 2}, 1 + 0.75, 1),
        ({"reached": 2, "num_accepted": 2, "rows": ()}, 2.0, 0),
        ({"num_accepted": 0, "outcome": Outcome.PREHIT_REJECTED}, 0.0, 0),
        ({"reached": 1, "num_accepted": 1, "outcome": Outcome.PREHIT_REJECTED}, 1.0, 0),
    ],
)
def test_what_the_target_had_reached_counts_as_accepted(
    changes: dict[str, Any], expected: float, scored: int
) -> None:
    """Its rows begin after that; of what failed at the kept row, nothing more is expected."""
    given = {"rows": (judged(1).rows[0],), "own": None} | changes
    report = window_report(judged(1, **given), WHOSE)
    assert report.expected_accepted == expected
    assert report.num_scored == scored
    assert (report.mean_jsd is None) is (not given["rows"])


def test_without_distributions_the_accepted_tokens_count() -> None:
    bare = arrived(replace(WINDOW, rows=None), 100.0, SAMPLED)
    rows = (TargetRow(7, NO_PROBS, NO_PROBS, 0.5),) * 2
    report = window_report(judged(2, window=bare, rows=rows, num_accepted=1), WHOSE)
    assert (report.expected_accepted, report.mean_jsd) == (1.0, None)
    assert (report.edge_ms, report.rework_ms, report.num_scored) == (0.0, 0.0, 0)
    assert bare.proposals[0].ids.size == 0


@pytest.mark.parametrize(("done_ms", "queue_ms"), [(117.5, 7.5), (110.0, 0.0), (109.0, 0.0)])
def test_waiting_is_never_negative(done_ms: float, queue_ms: float) -> None:
    made = judged(2, done_ms=done_ms)
    assert made.queue_ms == queue_ms
    assert window_report(made, WHOSE).queue_ms == queue_ms


@pytest.mark.parametrize(
    ("num_accepted", "own", "probs", "num_greedy"),
    [
        (0, 7, [0.5], 1),  # the argmax in place of the first
        (1, 7, [0.5, 0.5], 2),
        (2, None, [0.5, 0.25], 1),  # 9 stands though it is not the argmax: a lossy rule
        (2, 7, [0.5, 0.25, 0.5], 2),  # and a bonus
    ],
)
def test_quality_is_of_what_the_window_commits(
    num_accepted: int, own: int | None, probs: list[float], num_greedy: int
) -> None:
    window = arrived(replace(WINDOW, rows=GREEDY_ROWS), 100.0, SamplingParams())
    made = judged(3, window=window, num_accepted=num_accepted, own=own)
    quality = committed_quality(made)
    assert quality.num_tokens == len(probs)
    assert quality.log_likelihood == pytest.approx(sum(map(math.log, probs)), abs=1e-12)
    assert quality.num_greedy == num_greedy
    assert quality.regret == pytest.approx(sum(math.log(0.5 / p) for p in probs), abs=1e-12)


def test_a_probability_that_was_rounded_to_zero_is_a_number() -> None:
    row = TargetRow(1, np.zeros(2), NO_PROBS, 1.0)
    quality = committed_quality(judged(1, rows=(row,), own=None))
    assert quality.log_likelihood == pytest.approx(math.log(1e-30))


def test_passes_without_drafts_add_up() -> None:
    row = TargetRow(7, NO_PROBS, NO_PROBS, 0.5)
    own = OwnPasses().added(row, 4.0, greedy=True).added(row, 6.0, greedy=False)
    assert own == OwnPasses(2, 10.0, 1, math.log(0.5))
    report = own_report(own, WHOSE, energy_j=0.25)
    assert (report.outcome, report.num_drafted, report.num_own) == (Outcome.OWN, 0, 2)
    assert (report.verify_ms, report.cloud_ms, report.energy_j) == (10.0, 10.0, 0.25)
    assert (report.num_scored, report.num_greedy, report.regret) == (1, 1, 0.0)
    assert decode(encode(report)) is not None


@pytest.mark.parametrize(("choice", "token"), [(None, 7), (Choice(3, 0.1), 3)])
def test_the_targets_own_token_is_its_choice_or_its_argmax(
    choice: Choice | None, token: int
) -> None:
    assert own_token(TargetRow(7, NO_PROBS, NO_PROBS, 0.5, choice=choice)) == token
    assert NO_IDS.size == 0
