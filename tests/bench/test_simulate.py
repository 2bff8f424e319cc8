"""The simulation: closed forms, and a device read off sessions that it has made itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.simulate.compare import oracle_answer
from bench.simulate.cores import Clock, Core
from bench.simulate.device import Device, fit_device, read_device
from bench.simulate.pair import Outcome, SimulatedSession
from bench.simulate.predict import (
    Hits,
    best_static,
    ceiling,
    predict,
    random_answers,
)
from bus.protocol.errors import ConfigurationError
from bus.store import TimelineEntry
from decoding import methods
from engines.torch.oracle import RecordedAnswer, is_wrong

DEVICE = Device(step_ms=10.0, pass_ms=100.0, pass_token_ms=5.0)
RIGHT: Hits = (True,) * 60


def session(method: str, answer: Hits, rtt_ms: float = 40.0, device: Device = DEVICE) -> Outcome:
    found = methods.find(method)
    assert found is not None
    return SimulatedSession(found, answer, rtt_ms, device).run()


# --- sessions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4, 9])
def test_a_right_draft_in_lockstep_commits_a_window_and_a_bonus_each_cycle(window: int) -> None:
    pieces = session(f"sd:{window}", RIGHT).pieces
    cycle_ms = 10.0 * window + 40.0 + DEVICE.target_ms(window + 1)
    whole = pieces[1:-1]
    assert [tokens for _, tokens in whole] == [window + 1] * len(whole)
    gaps = [b - a for (a, _), (b, _) in zip(pieces, whole, strict=False)]
    assert gaps == pytest.approx([cycle_ms] * len(gaps))


def test_a_wrong_token_ends_its_window_and_the_target_gives_the_next() -> None:
    answer = (*RIGHT[:10], False, *RIGHT[:20])
    pieces = session("sd:4", answer).pieces
    assert [tokens for _, tokens in pieces] == [5, 5, 1, 5, 5, 5, 5]


@pytest.mark.parametrize("method", ["sd:3", "plc", "plc-literal"])
@pytest.mark.parametrize("rtt_ms", [0.0, 40.0, 300.0])
def test_every_token_of_the_answer_is_committed_once(method: str, rtt_ms: float) -> None:
    (answer,) = random_answers(0.3, 1, 90, seed=4)
    outcome = session(method, answer, rtt_ms)
    assert sum(tokens for _, tokens in outcome.pieces) == 90
    assert outcome.accepted_tokens <= sum(answer)
    assert outcome.drafted_tokens >= outcome.accepted_tokens


def test_drafting_ahead_hides_the_round_trip_of_a_right_draft() -> None:
    """The target is never without work: each pass takes in what came during the one before."""
    fast = Device(step_ms=10.0, pass_ms=100.0, pass_token_ms=0.0)
    near, far = (predict("plc", [RIGHT * 5] * 2, rtt, fast).tokens_per_s for rtt in (0.0, 80.0))
    assert far > 0.93 * near
    assert near > 0.9 * 100.0  # the draft's own speed


def test_no_method_beats_the_ceiling_of_a_single_chain() -> None:
    answers = random_answers(0.1, 6, 100, seed=2)
    share = 1 - sum(map(sum, answers)) / 600
    for rtt_ms in (0.0, 40.0, 160.0):
        assert predict("plc", answers, rtt_ms, DEVICE).tokens_per_s < ceiling(share, rtt_ms, DEVICE)


@pytest.mark.parametrize(("error_rate", "rtt_ms"), [(0.05, 160.0), (0.2, 40.0), (0.4, 0.0)])
def test_plc_does_not_lose_to_the_best_static_window(error_rate: float, rtt_ms: float) -> None:
    answers = random_answers(error_rate, 4, 64, seed=1)
    sd = best_static(answers, rtt_ms, DEVICE)
    assert predict("plc", answers, rtt_ms, DEVICE).tokens_per_s > 0.97 * sd.tokens_per_s


def test_a_rollback_cuts_a_draft_off_after_the_token_it_is_at() -> None:
    answer = (True, True, True, False, *RIGHT[:40])
    outcome = session("plc-literal", answer, rtt_ms=0.0)
    cut = [d for d in outcome.timeline._drafts if d.num_tokens == 1]
    assert any(d.end_ms - d.at_ms == pytest.approx(10.0) for d in cut)


def test_all_that_is_drafted_while_the_prompt_runs_goes_through_the_first_pass() -> None:
    """What an earlier session has learnt lets it draft ahead from the beginning: 5 steps in 50 ms,
    behind 30 for the draft's own prompt."""
    learnt = session("plc", RIGHT).measures
    slow = Device(step_ms=10.0, pass_ms=100.0, step_prompt_ms=30.0, pass_prompt_ms=80.0)
    method = methods.find("plc")
    assert method is not None
    pieces = SimulatedSession(method, RIGHT, 0.0, slow, learnt).run().pieces
    first_ms = pieces[0][0]
    assert first_ms == pytest.approx(80.0 + 100.0, abs=1.0)
    assert 4 <= sum(count for at_ms, count in pieces if at_ms == first_ms) <= 5


def test_the_next_session_begins_with_what_the_last_has_learnt() -> None:
    first, second = (session("plc", RIGHT) for _ in range(2))
    method = methods.find("plc")
    assert method is not None
    taught = SimulatedSession(method, RIGHT, 40.0, DEVICE, first.measures).run()
    assert taught.pieces[-1][0] < second.pieces[-1][0]


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no method 'nonsense'"):
        predict("nonsense", [RIGHT], 0.0, DEVICE)


# --- two models on one machine ----------------------------------------------------------------


def test_an_interruption_lengthens_what_is_being_done() -> None:
    clock, ended = Clock(), list[float]()
    core, other = Core(clock), Core(clock)
    core.beside(other)
    core.interrupt(5.0)  # nothing is
    core.work(10.0, 1.0, lambda: ended.append(clock.now_ms))
    other.work(20.0, 1.0, lambda: ended.append(clock.now_ms))
    clock.after(4.0, lambda: core.interrupt(3.0))
    while len(ended) < 2:
        clock.advance()
    assert ended == [13.0, 20.0]


def test_work_slows_down_from_the_moment_the_other_begins() -> None:
    clock, ended = Clock(), list[tuple[str, float]]()
    a, b = Core(clock), Core(clock)
    a.beside(b)
    a.work(30.0, 2.0, lambda: ended.append(("a", clock.now_ms)))
    clock.after(10.0, lambda: b.work(15.0, 1.5, lambda: ended.append(("b", clock.now_ms))))
    while len(ended) < 2:
        clock.advance()
    # a: 10 alone, then 22.5 at half speed until b ends (11.25), then the remaining 8.75 alone.
    assert [name for name, _ in ended] == ["b", "a"]
    assert [at_ms for _, at_ms in ended] == pytest.approx([32.5, 41.25])


# --- devices ----------------------------------------------------------------------------------


def entry(method: str, outcome: Outcome) -> TimelineEntry:
    return TimelineEntry(
        at_ms=0, request="r", session="s", client="c", edge="e", cloud="d", method=method,
        events=outcome.timeline.events(),
    )  # fmt: skip


def test_a_device_is_read_off_its_sessions() -> None:
    device = Device(
        12.0, 90.0, 6.0, 1.2, 1.3, start_ms=0.5, message_ms=1.0, window_ms=1.5, verdict_ms=2.0,
        step_prompt_ms=40.0, pass_prompt_ms=200.0,
    )  # fmt: skip
    answers = random_answers(0.15, 12, 80, seed=3)
    recorded = [
        (entry(method, session(method, answer, 40.0, device)), 40.0)
        for answer in answers
        for method in ("sd:4", "sd:8", "plc")
    ]
    fitted = fit_device(recorded)
    for name in ("step_ms", "pass_ms", "pass_token_ms", "start_ms", "message_ms"):
        assert getattr(fitted, name) == pytest.approx(getattr(device, name), rel=0.02), name
    assert fitted.step_prompt_ms == pytest.approx(40.0, abs=4.0)
    assert fitted.pass_prompt_ms == pytest.approx(200.0, abs=4.0)
    assert fitted.step_slowdown == pytest.approx(1.2, abs=0.05)
    assert fitted.pass_slowdown == pytest.approx(1.3, abs=0.1)
    assert fitted.window_ms == pytest.approx(1.5, abs=0.5)
    assert fitted.verdict_ms == pytest.approx(2.0, abs=0.7)


def test_whatever_waits_for_its_feedback_counts_as_lockstep_by_whatever_name() -> None:
    answers = random_answers(0.15, 6, 60, seed=3)
    recorded = [(entry("fsd:4", session("sd:4", answer, 40.0, DEVICE)), 40.0) for answer in answers]
    assert fit_device(recorded).step_ms == pytest.approx(DEVICE.step_ms, rel=0.05)


def test_without_lockstep_there_is_nothing_to_read_off() -> None:
    with pytest.raises(ConfigurationError, match="too few sessions"):
        fit_device([(entry("plc", session("plc", RIGHT)), 40.0)])


def test_a_device_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text('{"step_ms": 8, "pass_ms": 60, "pass_token_ms": 1}')
    assert read_device(path) == Device(8.0, 60.0, 1.0)
    for text in ('{"step_ms": 8}', '{"step_ms": 0, "pass_ms": 60}', "8", '{"steps": 8}'):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=r"device\.json is no device"):
            read_device(path)


def test_an_oracles_errors_are_those_of_its_seed() -> None:
    answer = oracle_answer(RecordedAnswer((1, 2, 3), (4,) * 50), seed=9, error_rate=0.3)
    assert answer == tuple(not is_wrong(9, 3 + index, 0.3) for index in range(50))
    assert 5 < answer.count(False) < 26
