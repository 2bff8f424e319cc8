"""The simulation: closed forms, and a device read off sessions that it has made itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.simulate.compare import oracle_answer
from bench.simulate.cores import Clock, Core
from bench.simulate.device import Device, fit_device, read_device
from bench.simulate.pair import Outcome, SimulatedSession, Trouble
from bench.simulate.predict import (
    ALONE,
    Hits,
    alone,
    best_static,
    ceiling,
    named,
    predict,
    random_answers,
)
from bus.protocol.errors import ConfigurationError
from bus.store import PassSpan, TimelineEntry
from decoding import methods
from engines.torch.oracle import RecordedAnswer, is_wrong

DEVICE = Device(step_ms=10.0, pass_ms=100.0, pass_token_ms=5.0)
RIGHT: Hits = (True,) * 60
AUTO = dataclasses.replace(methods.plc.METHOD, name="auto", runs_on=True)


def session(
    method: str, answer: Hits, rtt_ms: float = 40.0, device: Device = DEVICE,
    trouble: Trouble | None = None,
) -> Outcome:  # fmt: skip
    found = AUTO if method == "auto" else named(method)
    return SimulatedSession(found, answer, rtt_ms, device, trouble=trouble).run()


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


@pytest.mark.parametrize("method", ["sd:3", "plc", "plc-literal", "auto"])
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
    near, far = (
        predict(methods.plc.METHOD, [RIGHT * 5] * 2, rtt, fast).tokens_per_s for rtt in (0.0, 80.0)
    )
    assert far > 0.93 * near
    assert near > 0.9 * 100.0  # the draft's own speed


def test_no_method_beats_the_ceiling_of_a_single_chain() -> None:
    answers = random_answers(0.1, 6, 100, seed=2)
    share = 1 - sum(map(sum, answers)) / 600
    for rtt_ms in (0.0, 40.0, 160.0):
        assert predict(methods.plc.METHOD, answers, rtt_ms, DEVICE).tokens_per_s < ceiling(
            share, rtt_ms, DEVICE
        )


@pytest.mark.parametrize(
    ("error_rate", "rtt_ms"),
    [
        (0.05, 160.0),
        *(pytest.param(*at, marks=pytest.mark.long) for at in ((0.2, 40.0), (0.4, 0.0))),
    ],
)
def test_plc_does_not_lose_to_the_best_static_window(error_rate: float, rtt_ms: float) -> None:
    answers = random_answers(error_rate, 4, 64, seed=1)
    sd = best_static(answers, rtt_ms, DEVICE)
    assert (
        predict(methods.plc.METHOD, answers, rtt_ms, DEVICE).tokens_per_s > 0.97 * sd.tokens_per_s
    )


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
    pieces = SimulatedSession(methods.plc.METHOD, RIGHT, 0.0, slow, learnt).run().pieces
    first_ms = pieces[0][0]
    assert first_ms == pytest.approx(80.0 + 100.0, abs=1.0)
    assert 4 <= sum(count for at_ms, count in pieces if at_ms == first_ms) <= 5


def test_the_next_session_begins_with_what_the_last_has_learnt() -> None:
    first, second = (session("plc", RIGHT) for _ in range(2))
    taught = SimulatedSession(methods.plc.METHOD, RIGHT, 40.0, DEVICE, first.measures).run()
    assert taught.pieces[-1][0] < second.pieces[-1][0]


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no 'nonsense'"):
        named("nonsense")


# --- a target that goes on by itself ----------------------------------------------------------


@pytest.mark.parametrize("rtt_ms", [0.0, 40.0, 300.0])
def test_a_thin_client_gets_a_token_a_pass_over_any_link(rtt_ms: float) -> None:
    outcome = SimulatedSession(ALONE, RIGHT * 3, rtt_ms, DEVICE, drafts=False).run()
    gaps = [b - a for (a, _), (b, _) in zip(outcome.pieces, outcome.pieces[1:], strict=False)]
    assert [tokens for _, tokens in outcome.pieces] == [1] * 180
    assert gaps == pytest.approx([100.0] * 179)
    assert outcome.drafted_tokens == 0


@pytest.mark.parametrize("rtt_ms", [40.0, 300.0])
def test_a_draft_that_is_always_wrong_costs_a_target_that_goes_on_little(rtt_ms: float) -> None:
    """What its useless tokens cost the passes that run them, and no round trip."""
    wrong = [(False,) * 150]
    slow = alone(wrong, rtt_ms, DEVICE).tokens_per_s
    assert predict(AUTO, wrong, rtt_ms, DEVICE).tokens_per_s > 0.8 * slow
    assert predict(methods.plc.METHOD, wrong, rtt_ms, DEVICE).tokens_per_s < 0.8 * slow


@pytest.mark.parametrize("error_rate", [0.2, 0.4])
def test_over_a_long_link_a_target_that_goes_on_wins(error_rate: float) -> None:
    answers = random_answers(error_rate, 4, 100, seed=5)
    waits, goes_on = (predict(m, answers, 160.0, DEVICE) for m in (methods.plc.METHOD, AUTO))
    assert goes_on.tokens_per_s > 1.1 * waits.tokens_per_s
    assert goes_on.tokens_per_s > 0.97 * alone(answers, 160.0, DEVICE).tokens_per_s


def test_the_target_has_no_gap_between_two_passes() -> None:
    (answer,) = random_answers(0.3, 1, 120, seed=6)
    outcome = session("auto", answer, 160.0)
    millis = outcome.pieces[-1][0] - outcome.pieces[0][0]
    assert outcome.timeline.shares().cloud_idle < 0.1
    assert outcome.passes == pytest.approx(millis / 105.0, abs=8)
    assert any(isinstance(event, PassSpan) for event in outcome.timeline.events())


@pytest.mark.parametrize("method", ["sd:4", "plc", "auto"])
@pytest.mark.parametrize("paused", [True, False])
def test_after_a_pause_and_after_an_outage_the_answer_goes_on(method: str, paused: bool) -> None:
    trouble = Trouble(1000.0, 2000.0, paused)
    (answer,) = random_answers(0.2, 1, 150, seed=7)
    outcome = session(method, answer, 40.0, trouble=trouble)
    assert sum(tokens for _, tokens in outcome.pieces) == 150
    assert not [at for at, _ in outcome.pieces if 1020.0 + 20.0 * (not paused) < at < 2000.0]


def test_a_target_that_goes_on_loses_nothing_to_a_paused_edge() -> None:
    """Within its lease; after the pause all that it has written arrives at once."""
    quiet, paused = (
        session("auto", (False,) * 80, 40.0, trouble=trouble)
        for trouble in (None, Trouble(1000.0, 2000.0, paused=True))
    )
    assert paused.pieces[-1][0] < 1.03 * quiet.pieces[-1][0]
    assert sum(tokens for at, tokens in paused.pieces if at == 2000.0) >= 8


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
        12.0, 90.0, 6.0, 1.2, 1.3, start_ms=0.5, message_ms=1.0, window_ms=1.5, feedback_ms=2.0,
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
    assert fitted.feedback_ms == pytest.approx(2.0, abs=0.7)


def test_passes_that_no_window_began_count_too() -> None:
    answers = random_answers(0.3, 6, 80, seed=3)
    recorded = [
        (entry(name, session(name, answer, 40.0)), 40.0)
        for answer in answers
        for name in ("sd:4", "sd:8", "auto")
    ]
    fitted = fit_device(recorded)
    assert fitted.pass_ms == pytest.approx(100.0, rel=0.02)
    assert fitted.pass_slowdown == pytest.approx(1.0, abs=0.05)


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


def test_a_method_with_a_middle_worker_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'pipespec' has a middle worker, which"):
        named("pipespec")
    assert named("pipespec-2").name == "pipespec-2"
