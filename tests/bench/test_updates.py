"""What the demo shows of the controller's updates: lines, repeats, and text that stays whole."""

from __future__ import annotations

import asyncio
import io

import pytest
from msgspec.structs import replace
from rich.console import Console

from bench.demo import Screen, ShownUpdates, answer_by_credit
from bench.updates import Updates, describe, subscribed
from bus.client import Client
from bus.protocol.errors import ConfigurationError, E2SCIError
from bus.protocol.messages import ControlUpdate, SessionReady
from bus.settings import BusSettings
from bus.store import End, FinishReason, Store, Usage

FIRST = ControlUpdate("s1", 1, 1, 0.15, 4, 0.5, 0.0)
MOVED = ControlUpdate("s1", 1, 2, 0.172, 5, 0.61, 0.11)


@pytest.mark.parametrize(
    ("before", "update", "line"),
    [
        (None, FIRST, "controller: threshold 0.150, window 4 (credit 0.50)"),
        (FIRST, MOVED, "controller: threshold 0.150 → 0.172, window 4 → 5 (credit 0.61)"),
        (
            FIRST,
            replace(FIRST, version=2, window=3),
            "controller: threshold 0.150, window 4 → 3 (credit 0.50)",
        ),
        (
            FIRST,
            replace(FIRST, version=2, threshold=-1.0),
            "controller: threshold 0.150 → -1.000, window 4 (credit 0.50)",
        ),
        (FIRST, replace(FIRST, version=2, credit=0.7), None),
    ],
)
def test_a_line_says_what_changed(
    before: ControlUpdate | None, update: ControlUpdate, line: str | None
) -> None:
    assert describe(before, update) == line


READY = SessionReady("s1", 1, "cloud-1", 7)


async def test_repeats_older_updates_and_other_sessions_are_left_out() -> None:
    updates = Updates()
    other = replace(MOVED, session="s2", version=9)
    successor = replace(FIRST, term=2)
    for message in (FIRST, FIRST, other, MOVED, FIRST, READY, successor):
        updates.receive(message)
    heard = updates.of("s1")
    assert [await anext(heard) for _ in range(3)] == [FIRST, MOVED, successor]
    waiting = asyncio.ensure_future(anext(heard))
    await asyncio.sleep(0)
    assert not waiting.done()
    updates.receive(replace(successor, version=2))
    assert (await waiting).version == 2


def screen() -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(Console(file=out, width=20)), out


def test_an_update_between_two_pieces_of_text_gets_a_line_of_its_own() -> None:
    shown, out = screen()
    shown.text("Tom has 5")
    shown.line("controller: threshold 0.150 → 0.172, window 4 → 5")
    shown.text(" apples [red].\n")
    shown.line("controller: window 5 → 4")
    shown.text("")
    shown.line("length: 64 tokens")
    assert out.getvalue().splitlines() == [
        "Tom has 5",
        "controller: threshold 0.150 → 0.172, window 4 → 5",
        " apples [red].",
        "controller: window 5 → 4",
        "length: 64 tokens",
    ]


def test_only_changes_after_the_first_update_count() -> None:
    shown = ShownUpdates(screen()[0])
    shown.show(FIRST)
    assert shown.changes == 0
    shown.show(replace(FIRST, version=2, credit=0.7))
    assert shown.changes == 0
    shown.show(replace(MOVED, version=3))
    assert shown.changes == 1


async def test_without_an_edge_worker_there_is_nothing_to_subscribe_to(
    store: Store, bus_settings: BusSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2SCI_KEY_PREFIX", bus_settings.key_prefix)
    with pytest.raises(ConfigurationError, match="no edge worker is running"):
        async with subscribed(bus_settings.redis_url):
            pass


async def test_an_answer_without_updates_is_an_error(
    store: Store, bus_settings: BusSettings
) -> None:
    """An edge worker answers, and no controller is there."""

    async def answer() -> None:
        while (claim := await store.queue.take("edge-1", block_ms=100)) is None:
            pass
        await store.results.append(claim, 0, (11,), (True,), "Hello")
        await store.queue.finish(claim, End(FinishReason.STOP, usage=Usage(completion_tokens=1)))

    shown, out = screen()
    async with Client(settings=bus_settings) as client, asyncio.TaskGroup() as group:
        group.create_task(answer())
        with pytest.raises(E2SCIError, match="neither threshold nor window"):
            await answer_by_credit(client, "Hi", Updates(), shown)
    assert "Hello" in out.getvalue()
