"""The pages besides Live, as a viewer meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from bus.protocol.requests import new_request, session_id
from bus.settings import BusSettings
from bus.store import (
    DraftSpan,
    End,
    FinishReason,
    InUse,
    Store,
    TimelineEntry,
    Tuning,
    Usage,
    WindowSpan,
    decode_wish,
)
from dashboard.coloured import DRAFT_COLOUR, TARGET_COLOUR
from tests.dashboard.conftest import AT_MS, window

Page = Callable[[str], AppTest]


def script(name: str) -> None:
    """What Streamlit runs; it sees nothing of this module."""
    import importlib

    from dashboard.settings import DashboardSettings

    importlib.import_module(f"dashboard.views.{name}").draw(DashboardSettings.load())


@pytest.fixture
def page(
    bus_settings: BusSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Page]:
    monkeypatch.setenv("E2SCI_REDIS_URL", bus_settings.redis_url)
    monkeypatch.setenv("E2SCI_KEY_PREFIX", bus_settings.key_prefix)
    monkeypatch.setenv("E2SCI_EVIDENCE", str(tmp_path / "runs"))
    yield lambda name: AppTest.from_function(script, args=(name,), default_timeout=60)
    st.cache_resource.clear()


def html(page: AppTest) -> str:
    return "".join(str(element.proto.body) for element in page.get("html"))


# --- trade-offs -------------------------------------------------------------------------------


def test_without_a_run_the_page_says_how_to_make_one(page: Page) -> None:
    found = page("tradeoffs").run()
    assert not found.exception
    assert "e2sci bench --quick" in found.info[0].value


def line(method: str, dataset: str, speed: float, **values: object) -> dict[str, object]:
    interval = {"value": speed, "low": speed - 1, "high": speed + 1}
    ratio = {"value": speed / 10, "low": speed / 10 - 0.1, "high": speed / 10 + 0.1}
    return {
        "method": method, "ran": method, "dataset": dataset, "rtt_ms": 40.0, "draft": "model",
        "variant": "", "speed": interval, "end_to_end": interval, "over_target": ratio,
        "over_sd": ratio, "nats_per_token": -0.4, "nats_below_target": 0.02, "agreement": 0.98,
        "regret": 0.01, "acceptance": 0.6, "accuracy": None, "mj_per_token": 900.0,
        "energy_source": "modelled", "source": "measured", **values,
    }  # fmt: skip


def test_a_run_is_drawn_and_a_broken_file_is_named(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    lines = [line("target", "all", 10.0), line("plc", "all", 12.0), line("e2sci:0.1", "all", 13.0)]
    (folder / "summary.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(lines))
    found = page("tradeoffs").run()
    assert not found.exception
    assert len(found.get("plotly_chart")) == 4
    (table,) = (frame.value for frame in found.dataframe)
    assert table["ran"].tolist() == ["target", "plc", "e2sci:0.1"]
    (folder / "summary.jsonl").write_text('{"a": 1}')
    assert "no summary" in found.run().error[0].value


def test_a_varied_setting_has_a_chart_of_its_own(page: Page, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    varied = ["calibration=/c/dear.safetensors", "calibration=/c/cheap.safetensors"]
    lines = [line("e2sci", "all", 10.0 + i, variant=name) for i, name in enumerate(varied)]
    (tmp_path / "runs" / "summary.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(lines))
    found = page("tradeoffs").run()
    assert not found.exception
    charts = found.get("plotly_chart")
    assert len(charts) == 5
    drawn = charts[0].proto.spec
    assert "dear" in drawn
    assert "cheap" in drawn
    assert found.selectbox[1].value == varied[0]  # the others show one setting


def test_a_run_on_two_devices_shows_one_of_them(page: Page, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    devices = ["as it is", "padded to contended times: 9 ms a step"]
    lines = [
        line(method, "all", 10.0, device=device)
        for method in ("target", "edge-target", "colocated")
        for device in devices
    ]
    (tmp_path / "runs" / "summary.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(lines))
    found = page("tradeoffs").run()
    assert not found.exception
    assert found.selectbox[1].options == devices
    (table,) = (frame.value for frame in found.dataframe)
    assert table["ran"].tolist() == ["target", "edge-target", "colocated"]
    drawn = "".join(chart.proto.spec for chart in found.get("plotly_chart"))
    assert "target on the edge" in drawn
    assert "co-located SD" in drawn


# --- session ----------------------------------------------------------------------------------


async def test_an_unknown_request_and_none_at_all(page: Page) -> None:
    found = page("session").run()
    assert "No requests in the last hour" in found.info[0].value
    found.query_params["request"] = "nobody"
    assert "nobody knows this request" in found.run().info[0].value


async def test_a_request_is_shown_window_by_window(page: Page, store: Store) -> None:
    """Three of four drafted tokens stand, then the target's own; behind them one was refused."""
    await store.queue.submit(new_request("Why?", method="e2sci"))
    claim = await store.queue.take("edge-1", block_ms=1000)
    assert claim is not None
    entry = window(claim.request_id, method="e2sci", at_ms=AT_MS)
    flags = (True, True, True, False)
    await store.commit_window(claim, 0, (1, 2, 3, 4), flags, "a <b> c", entry, (1, 2, 3, 1))
    await store.queue.finish(claim, End(FinishReason.LENGTH, usage=Usage(completion_tokens=4)))
    events = (DraftSpan(0.0, 40.0, 1, 4), WindowSpan(40.0, 1, 1, 4, 140.0, "partial", 3, 80.0))
    await store.telemetry.add(
        TimelineEntry(
            at_ms=AT_MS, request=claim.request_id, session="s", client="c", edge="edge-1",
            cloud="cloud-1", method="e2sci", events=events,
        )
    )  # fmt: skip
    found = page("session")
    found.query_params["request"] = claim.request_id
    found.run()
    assert not found.exception
    shown = html(found)
    assert f'background:{DRAFT_COLOUR};border-radius:3px">a &lt;b&gt; </span>' in shown
    assert f'background:{TARGET_COLOUR};border-radius:3px">c</span>' in shown
    assert "✗1" in shown
    assert len(found.get("plotly_chart")) == 1
    (table,) = (frame.value for frame in found.dataframe)
    assert table["why"].tolist() == [
        "token 4 of 4 refused: the exact test, and more than 0.15 nats apart"
    ]


async def test_trees_of_a_request_are_counted_and_shown(page: Page, store: Store) -> None:
    await store.queue.submit(new_request("Why?", method="medusa"))
    claim = await store.queue.take("edge-1", block_ms=1000)
    assert claim is not None
    entry = window(
        claim.request_id, method="medusa", at_ms=AT_MS, number=0, proposed=8, num_drafted=4,
        rollback=False,
    )  # fmt: skip
    flags = (True, True, True, False)
    await store.commit_window(claim, 0, (1, 2, 3, 4), flags, "a b c", entry, (1, 1, 1, 2))
    usage = Usage(windows=2, proposed=16, drafted_tokens=8, accepted_tokens=5)
    await store.queue.finish(claim, End(FinishReason.LENGTH, usage=usage))
    found = page("session")
    found.query_params["request"] = claim.request_id
    found.run()
    assert not found.exception
    said = [caption.value for caption in found.caption]
    assert any(
        "Trees: 2 proposed by the target's speculator, 8.0 tokens and depth 4.0 each; 2.50 "
        "accepted in a pass." in text
        for text in said
    )
    (table,) = (frame.value for frame in found.dataframe)
    assert table["proposed"].tolist() == [8]
    assert table["why"].tolist() == ["tree of 8 tokens, depth 4: 3 accepted"]
    assert table["threshold"].isna().all()


@pytest.mark.parametrize("begun", [True, False])
async def test_a_session_s_story_is_shown_even_before_its_first_token(
    page: Page, store: Store, begun: bool
) -> None:
    """It matters most where nothing comes."""
    await store.queue.submit(new_request("Why?"))
    claim = await store.queue.take("edge-1", block_ms=1000)
    assert claim is not None
    if begun:
        await store.results.append(claim, 0, (1,), (True,), "a", (1,))
    lines = ["0 ms  begun", "100 ms  FaultArrived Fault code=overloaded  opening → seeking"]
    await store.stories.save(session_id(claim.request_id), "edge-1", lines)
    found = page("session")
    found.query_params["request"] = claim.request_id
    found.run()
    assert not found.exception
    assert [block.value for block in found.code] == ["\n".join(lines)]


# --- settings ---------------------------------------------------------------------------------


OWN = Tuning(
    threshold=0.15, window=4, base_threshold=0.15, least_threshold=0.02, greatest_threshold=0.3,
    credit_gain=1.0, credit_smoothing=0.3, credit_memory=5, threshold_band=0.01, threshold_hold=2,
)  # fmt: skip


async def test_without_a_controller_there_are_no_settings(page: Page) -> None:
    assert "No controller" in page("settings").run().info[0].value


def field(found: AppTest, name: str) -> Any:
    return found.number_input(key=f"tuning {name}")


async def test_a_setting_is_wished_for_and_what_is_in_use_shown(page: Page, store: Store) -> None:
    await store.tunings.say(InUse(OWN, OWN, at=1.0))
    found = page("settings").run()
    assert not found.exception
    assert "As it was started" in found.success[0].value
    field(found, "base_threshold").set_value(0.2)
    found.button[0].click().run()  # no controller is there to answer
    assert "has not answered yet" in found.warning[0].value
    wish = decode_wish(await store.tunings.wish())
    assert wish.tuning == msgspec.structs.replace(OWN, base_threshold=0.2)
    await store.tunings.say(InUse(wish.tuning, OWN, at=2.0))
    found = page("settings").run()
    assert "T_base, nats 0.2 (was 0.15)" in found.success[0].value
    back = next(button for button in found.button if "started with" in button.label)
    back.click().run()
    assert await store.tunings.wish() == b""


async def test_bounds_out_of_order_and_a_second_viewer_are_refused(
    page: Page, store: Store
) -> None:
    await store.tunings.say(InUse(OWN, OWN, at=1.0))
    found = page("settings").run()
    field(found, "least_threshold").set_value(0.25)
    found.button[0].click().run()
    assert "T_min ≤ T_base ≤ T_max" in found.error[0].value
    assert await store.tunings.wish() == b""
    found = page("settings").run()
    field(found, "window").set_value(3)
    await store.tunings.ask(msgspec.structs.replace(OWN, window=9), b"")
    found.button[0].click().run()
    assert "Somebody else" in found.error[0].value
    assert decode_wish(await store.tunings.wish()).tuning.window == 9


async def test_a_wish_that_was_not_taken_over_is_told(page: Page, store: Store) -> None:
    await store.tunings.say(InUse(OWN, OWN, at=1.0, problem="it makes no sense"))
    assert "it makes no sense" in page("settings").run().error[0].value


# --- playground -------------------------------------------------------------------------------


async def test_a_prompt_goes_through_the_queue_and_its_answer_comes_in_colour(
    page: Page, store: Store
) -> None:
    found = page("playground").run()
    assert not found.exception
    found.text_area[0].input("Why is the sky blue?")
    found.selectbox[1].set_value("sd")
    found.button[0].click().run()
    assert not found.exception
    assert [caption.value for caption in found.caption].count("Waiting for an edge worker …") == 2
    for method, text in (("auto", "Because"), ("sd", "It is")):
        claim = await store.queue.take("edge-1", block_ms=1000)
        assert claim is not None
        assert claim.request is not None
        assert (claim.request.method, claim.request.prompt) == (method, "Why is the sky blue?")
        await store.results.append(claim, 0, [7], [True], text, [len(text)])
        usage = Usage(completion_tokens=1, tokens_per_s=12.3, drafted_tokens=4, acceptance=0.25)
        await store.queue.finish(claim, End(FinishReason.STOP, usage=usage))
    found.run()
    assert "Because</span>" in html(found)
    assert "It is</span>" in html(found)
    tiles = {str(metric.label): str(metric.value) for metric in found.metric}
    assert tiles["Tokens per s"] == "12.3"
    assert tiles["Acceptance"] == "25 %"


async def test_nonsense_in_the_playground_is_explained(page: Page) -> None:
    found = page("playground").run()
    found.text_area[0].input("")
    found.button[0].click().run()
    assert not found.exception
    assert "prompt" in found.error[0].value


async def test_a_cancelled_answer_is_cancelled_in_the_queue(page: Page, store: Store) -> None:
    found = page("playground").run()
    found.button[0].click().run()
    cancel = next(button for button in found.button if button.label == "Cancel")
    cancel.click().run()
    found.run()
    assert not found.exception
    assert any("cancelled" in caption.value for caption in found.caption)
    assert await store.queue.take("edge-1", block_ms=50) is None


@pytest.mark.parametrize("name", ["playground", "session", "settings"])
def test_without_redis_the_page_says_so(
    page: Page, name: str, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2SCI_REDIS_URL", f"redis://:hunter2@127.0.0.1:{unused_tcp_port}/0")
    found = page(name).run()
    if name == "playground":
        found.button[0].click().run()
    assert not found.exception
    assert "does not answer" in found.error[0].value
    assert "hunter2" not in found.error[0].value
