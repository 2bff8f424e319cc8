"""The speed that `e2sci doctor` expects: times read off windows, measured on tiny models, and what
is predicted from them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console

from bench.contention import Contention, Timing
from bench.doctor import measure
from bench.doctor.checks import Status, failed, ok, warning
from bench.doctor.expect import (
    ALONE,
    METHODS,
    Expectation,
    PairCosts,
    Way,
    check_expectation,
    costs_of,
    num_predictions,
    pass_times,
    predict_all,
    rising,
)
from bench.doctor.report import Report, show
from bench.simulate.device import Device
from bus.store import WindowEntry
from engines.catalog.registry import Specs
from tests.bench.test_doctor_system import WINDOW
from tests.engines.tiny import byte_fallback_tokenizer, save_tiny

FAST = Device(step_ms=2.0, pass_ms=60.0, pass_token_ms=0.5)
WAYS = (Way(5.0, "measured", True), Way(40.0, "assumed", False))


def windows(num_drafted: int, num_accepted: int, count: int, session: str) -> list[WindowEntry]:
    """In lockstep, of a draft of 3 ms a step and a target of 10 + n ms; passes differ a little."""
    return [
        replace(
            WINDOW, session=session, num_drafted=num_drafted, num_accepted=num_accepted,
            draft_ms=3.0 * num_drafted, verify_ms=10.0 + (1 + num_drafted) + 1e-3 * index,
        )
        for index in range(count)
    ]  # fmt: skip


# --- a running system -------------------------------------------------------------------------


def test_times_and_acceptance_are_read_off_windows() -> None:
    costs = costs_of(windows(1, 1, 41, "a") + windows(7, 4, 41, "b"))
    assert costs is not None
    assert costs.device.step_ms == pytest.approx(3.0)
    for length in (2, 5, 8):
        assert costs.device.target_ms(length) == pytest.approx(10.0 + length, abs=0.1)
    # 40 windows of each: the first of a session waits for its prompt and does not count.
    assert costs.acceptance == pytest.approx((40 + 160) / (40 + 200))
    assert costs.round_trip_ms == WINDOW.rtt_ms
    assert (costs.target, costs.draft, costs.source) == ("cloud-1", "edge-1", "measured")


def test_the_first_window_of_a_session_a_lossy_method_and_other_workers_do_not_count() -> None:
    right = windows(4, 4, 41, "a") + windows(1, 1, 9, "b")
    slow = [
        replace(entry, session=session, verify_ms=late_ms, draft_ms=late_ms)
        for session in map(str, range(60))
        for entry, late_ms in ((right[0], 9e3), (right[1], 12.0))
    ]
    lossy = [replace(entry, method="fsd", num_accepted=0) for entry in windows(4, 0, 5, "d")]
    others = [replace(entry, edge="edge-2") for entry in windows(4, 0, 9, "e")]
    costs, same = costs_of([*slow, *right, *lossy, *others]), costs_of(right)
    assert costs is not None
    assert same is not None
    assert costs.acceptance == same.acceptance == 1.0
    assert costs.device.step_ms == same.device.step_ms
    assert costs.device.target_ms(5) < 20.0


def test_windows_of_one_pass_are_counted_as_one() -> None:
    """Two windows of one token that the same feedback judged; where one was rejected, more may have
    been in the pass."""
    pair = [replace(entry, method="plc") for entry in windows(1, 1, 2, "a")]
    passes = [replace(entry, verify_ms=13.0 + 1e-3 * index) for index in range(6) for entry in pair]
    wrong = [replace(passes[0], num_accepted=0, verify_ms=99.0 + i) for i in range(6)]
    own = [
        replace(passes[0], outcome="own", num_drafted=0, num_accepted=0, verify_ms=11.0 + 1e-3 * i)
        for i in range(6)
    ]
    long = [replace(passes[0], num_drafted=4, num_accepted=4, verify_ms=20.0 + i) for i in range(5)]
    found = dict(pass_times([[*passes, *wrong, *own, *long]]))
    assert found == pytest.approx({1: 11.0, 3: 13.0, 5: 22.0}, abs=0.1)


def test_too_few_windows_say_nothing() -> None:
    assert costs_of([]) is None
    assert costs_of(windows(4, 4, 10, "a") + windows(1, 1, 10, "b")) is None
    own = [replace(WINDOW, num_drafted=0, num_accepted=0, outcome="own")] * 100
    assert costs_of(own) is None


def test_passes_of_one_length_do_not_show_what_one_token_takes() -> None:
    assert costs_of(windows(4, 4, 100, "a")) is None
    assert costs_of(windows(1, 1, 100, "a")) is None


def test_a_pass_that_chance_made_fast_takes_as_long_as_a_shorter_one() -> None:
    assert rising({4: 9.0, 1: 10.0, 8: 12.0}) == ((1, 10.0), (4, 10.0), (8, 12.0))


# --- predictions ------------------------------------------------------------------------------


def expectation(device: Device, acceptance: float) -> Expectation:
    costs = PairCosts("on this machine", "big", "small", device, acceptance, 200)
    return predict_all(costs, WAYS)


@pytest.mark.long
def test_a_fast_draft_pays_and_the_sentences_say_how_much() -> None:
    found = expectation(FAST, 0.8)
    for link in found.links:
        assert set(link.tokens_per_s) == {ALONE, *METHODS}
        assert link.tokens_per_s[ALONE] == pytest.approx(1000 / 60, rel=0.05)
        assert link.gain("auto") > 1.2
        assert link.source == "predicted"
    times, near, far = check_expectation(found)
    assert (times.status, near.status, far.status) == (Status.OK,) * 3
    assert "a draft step takes 2.0 ms" in times.sentence
    assert "right at 80% of 200 tokens (measured)" in times.sentence
    auto, own = found.links[0].tokens_per_s["auto"], found.links[0].tokens_per_s[ALONE]
    assert (
        f"At the measured round trip of 5.0 ms, both models on one machine, auto is predicted to "
        f"give {auto:.0f} tokens/s, {auto / own:.2f} × the target alone ({own:.0f})"
    ) in near.sentence
    assert "At a round trip of 40 ms auto is predicted" in far.sentence


def test_where_speculation_does_not_pay_that_is_said_plainly() -> None:
    found = expectation(Device(step_ms=50.0, pass_ms=60.0, pass_token_ms=10.0), 0.1)
    _, near, far = check_expectation(found)
    for check in (near, far):
        assert check.status is Status.WARNING
        assert "speculation does not pay here" in check.sentence
        assert check.advice


def test_two_machines_do_not_slow_each_other_down() -> None:
    slowed = Device(step_ms=15.0, pass_ms=30.0, step_slowdown=2.0, pass_slowdown=2.0)
    costs = PairCosts("on this machine", "big", "small", slowed, 0.9, 200)
    shared, apart = predict_all(costs, (Way(5.0, "none", True), Way(5.0, "none", False))).links
    assert shared.tokens_per_s["plc"] < 0.8 * apart.tokens_per_s["plc"]
    assert shared.tokens_per_s[ALONE] == pytest.approx(apart.tokens_per_s[ALONE])


@pytest.mark.long
def test_what_workers_do_to_a_message_slows_lockstep_over_every_link() -> None:
    plain = PairCosts("", "", "", FAST, 0.8, 200)
    handled = replace(plain, round_trip_ms=25.0)  # of which 5 are the link
    for before, after in zip(
        predict_all(plain, WAYS).links, predict_all(handled, WAYS).links, strict=True
    ):
        assert after.tokens_per_s["sd"] < 0.95 * before.tokens_per_s["sd"]


def test_recorded_hits_are_used_where_there_are_any() -> None:
    right = PairCosts("", "", "", FAST, 0.1, 96, hits=((True,) * 96,))
    wrong = PairCosts("", "", "", FAST, 0.9, 96, hits=((False,) * 96,))
    way = (Way(0.0, "none", False),)
    speeds = [predict_all(c, way).links[0].tokens_per_s["plc"] for c in (right, wrong)]
    assert speeds[0] > 2 * speeds[1]


def test_every_prediction_ticks() -> None:
    ticks = []
    costs = PairCosts("", "", "", FAST, 0.8, 96, hits=((True,) * 30,))
    predict_all(costs, WAYS, lambda: ticks.append(1))
    assert len(ticks) == num_predictions(WAYS)


# --- measured here ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_a_draft_that_is_the_target_is_right(tiny: Path) -> None:
    pair = measure.Pair(Specs(str(tiny), str(tiny)), "float32")
    assert pair.check().status is Status.OK
    ticks: list[int] = []
    hits = pair.hits(lambda: ticks.append(1), prompts=("the cat", "the dog"), num_tokens=12)
    assert hits
    assert len(ticks) == 2
    costs = measure.costs_here(pair.specs, FAST, hits)
    assert costs.acceptance > 0.9  # float16 makes ties
    assert costs.num_tokens == sum(map(len, hits))


def test_a_draft_of_other_weights_is_sometimes_wrong(tiny: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=7)
    pair = measure.Pair(Specs(str(tiny), str(other)), "float32")
    hits = pair.hits(lambda: None, prompts=("the cat",), num_tokens=24)
    assert not all(hits[0])


def test_a_draft_of_another_tokenizer_fails(tiny: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", byte_fallback_tokenizer())
    check = measure.Pair(Specs(str(tiny), str(other)), "float32").check()
    assert check.status is Status.FAILED
    assert "do not share a tokenizer" in check.sentence


def test_an_interrupted_measurement_ends(tiny: Path) -> None:
    pair = measure.Pair(Specs(str(tiny), str(tiny)), "float32")
    pair.stopping.set()
    assert pair.hits(lambda: None, prompts=("the cat",)) == []


def test_one_core_is_shared_by_turns(tiny: Path) -> None:
    device = measure.Pair(Specs(str(tiny), str(tiny)), "float32").times_here(
        lambda: None, repeats=2
    )
    assert (device.step_slowdown, device.pass_slowdown) == (2.0, 2.0)
    assert [n for n, _ in device.passes] == list(measure.PASS_SIZES)
    assert all(a <= b for (_, a), (_, b) in zip(device.passes, device.passes[1:], strict=False))


def test_a_device_of_contended_times() -> None:
    found = Contention(
        target="t", draft="d", dtype="int8", step=Timing(4.0, 6.0), repeats=3,
        passes={1: Timing(20.0, 25.0), 2: Timing(19.0, 25.0), 8: Timing(40.0, 50.0)},
    )  # fmt: skip
    device = measure.device_of(found)
    assert (device.step_ms, device.step_slowdown, device.pass_slowdown) == (4.0, 1.5, 1.25)
    assert device.passes == ((1, 20.0), (2, 20.0), (8, 40.0))


@pytest.mark.slow
@pytest.mark.long
async def test_times_are_measured_in_processes_of_their_own(tiny: Path) -> None:
    if not measure.has_two_cores():
        pytest.skip("needs two cores")
    ticks: list[int] = []
    device = await measure.measure_times(
        Specs(str(tiny), str(tiny)), "float32", lambda: ticks.append(1), repeats=1
    )
    assert device.step_ms > 0
    assert device.target_ms(1) > 0
    assert len(ticks) == 2


# --- the report -------------------------------------------------------------------------------


def shown(report: Report) -> str:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        show(report, console)
    return captured.get()


def test_a_report_ends_with_what_to_think_of_it() -> None:
    fine, poor, bad = ok("a", "A [x]."), warning("b", "B.", "Do b."), failed("c", "C.", "Do c.")
    assert Report((fine, poor)).ok
    assert not Report((fine, bad)).ok
    assert shown(Report((fine,))).endswith("Nothing is wrong.\n")
    assert "Nothing is wrong; 1 warning." in shown(Report((fine, poor)))
    text = shown(Report((fine, poor, bad)))
    assert "1 check failed, 1 warning." in text
    assert "✓ A [x]." in text
    assert "→ Do c." in text


@pytest.mark.long
def test_the_report_shows_predictions_as_such() -> None:
    text = shown(Report((), expectation=expectation(FAST, 0.8)))
    assert "Tokens/s (predicted)" in text
    assert "5.0 ms, measured" in text
    assert "40.0 ms, assumed" in text
