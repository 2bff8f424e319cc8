"""The dashboard in a real browser, on a real stack: every page, a prompt, a phone, the dark.

Needs Debian's Chromium (scripts/install-debian-packages.sh). Screenshots lie in the folder that
E2SCI_SCREENSHOTS names, else in pytest's.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from bench.telemetry import read_telemetry
from bus.client import Client
from bus.store import WindowEntry
from launch.stack import Stack, StackOptions
from tests.dashboard.test_pages import line

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)
Open = Callable[..., Awaitable[Page]]


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("E2SCI_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(
    tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """All workers on tiny models, and the dashboard beside a small run of `e2sci bench`."""
    evidence = tmp_path_factory.mktemp("runs")
    (evidence / "small").mkdir()
    lines = [
        line("target", "all", 10.0, nats_below_target=0.0, agreement=1.0),
        line("plc", "all", 12.0, nats_below_target=0.0, agreement=1.0),
        *(line(f"e2sci:{t}", "all", 12 + 10 * t, nats_below_target=t / 5) for t in (0.1, 0.2)),
    ]
    (evidence / "small" / "summary.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(lines))
    target, draft = map(str, tiny_pair)
    options = StackOptions(
        target=target, draft=draft, dtype="float32", threads=1, dashboard_port=8501
    )
    env = {"E2SCI_EVIDENCE": str(evidence), "E2SCI_TIMELINE": "1", "E2SCI_REFRESH_S": "1"}
    async with Stack(options, log=lambda _: None, quiet=True, env=env) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    path = shutil.which("chromium")
    assert path is not None, "no chromium here: run scripts/install-debian-packages.sh"
    async with async_playwright() as playwright:
        found = await playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield found
        await found.close()


@pytest_asyncio.fixture(loop_scope="module")
async def open_page(stack: Stack, browser: Browser) -> AsyncIterator[Open]:
    """Opens a page of the dashboard; at the end, nothing may have gone wrong in the console."""
    problems: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        # Streamlit looks for its server below the page's own path first, then above it.
        if message.type == "error" and "/_stcore/" not in message.location.get("url", ""):
            problems.append(f"{message.text} ({message.location.get('url')})")

    contexts = []

    async def open_at(path: str, width: int = 1280, dark: bool = False) -> Page:
        context = await browser.new_context(
            viewport={"width": width, "height": 1500}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", heard)
        page.on("pageerror", lambda error: problems.append(str(error)))
        await page.goto(f"{stack.dashboard_url}{path}")
        await expect(page.locator("h1").first).to_be_visible(timeout=PATIENCE_MS)
        return page

    yield open_at
    for context in contexts:
        await context.close()
    assert problems == []


async def settled(page: Page) -> None:
    """Nothing is being computed, and no exception is shown."""
    running = page.locator("[data-testid='stStatusWidget']")
    await expect(running).to_have_count(0)
    await expect(page.locator("[data-testid='stSkeleton']")).to_have_count(0)
    await expect(page.locator("[data-testid='stException']")).to_have_count(0)


async def picture(page: Page, path: Path) -> None:
    await settled(page)
    await asyncio.sleep(0.5)  # plotly draws
    await page.screenshot(path=path, full_page=True)


async def test_a_prompt_is_answered_in_the_playground_by_two_methods(
    open_page: Open, screenshots: Path
) -> None:
    page = await open_page("/playground")
    await page.get_by_role("spinbutton", name="Most tokens").fill("24")
    await page.get_by_role("combobox", name="Compare with").click()
    await page.get_by_role("option", name=re.compile(r"^sd \(lossless\)$")).click()
    await page.get_by_role("button", name="Generate").click()
    ended = page.get_by_text(re.compile("Ended: (length|stop)"))
    await expect(ended).to_have_count(2)
    await expect(page.get_by_text("Tokens per s")).to_have_count(2)
    await picture(page, screenshots / "playground.png")


async def test_a_session_shows_its_timeline_and_its_windows(
    open_page: Open, stack: Stack, screenshots: Path
) -> None:
    async with Client(redis_url=stack.redis_url) as client:
        request = await client.submit("Hello there", method="plc", max_new_tokens=40)
        await client.result(request, timeout_s=60)
    page = await open_page(f"/session?request={request}")
    await expect(page.get_by_text("Who did what, when")).to_be_visible()
    await expect(page.locator(".js-plotly-plot")).to_have_count(1)
    await expect(page.get_by_text("drafted at the edge, accepted")).to_be_visible()
    await picture(page, screenshots / "session.png")


async def test_live_draws_what_happened(open_page: Open, stack: Stack, screenshots: Path) -> None:
    async with Client(redis_url=stack.redis_url) as client:
        await client.generate("Hello", method="e2sci", max_new_tokens=60, timeout_s=60)
    page = await open_page("/")
    await expect(page.get_by_text("Tokens per s, now")).to_be_visible()
    await expect(page.locator(".js-plotly-plot")).to_have_count(6)
    await picture(page, screenshots / "live.png")


async def test_trade_offs_draws_a_bench(open_page: Open, screenshots: Path) -> None:
    page = await open_page("/trade-offs")
    await expect(page.locator(".js-plotly-plot")).to_have_count(4)
    await picture(page, screenshots / "trade-offs.png")


async def test_a_setting_is_seen_in_the_thresholds_of_the_next_windows(
    open_page: Open, stack: Stack, screenshots: Path
) -> None:
    page = await open_page("/settings")
    fixed = page.get_by_role("spinbutton", name="Fixed threshold, nats")
    await fixed.fill("0.25")
    await fixed.press("Tab")
    await page.get_by_role("button", name="Use these").click()
    await expect(page.get_by_text("0.25 (was 0.15)")).to_be_visible()
    await picture(page, screenshots / "settings.png")
    async with Client(redis_url=stack.redis_url) as client:
        await client.generate("Hello", method="fsd", max_new_tokens=30, timeout_s=60)
    told = await read_telemetry(stack.redis_url)
    used = [e.threshold for e in told if isinstance(e, WindowEntry) and e.method == "fsd"]
    assert len(used) > 3
    assert used[-1] == pytest.approx(0.25)


@pytest.mark.parametrize("path", ["/", "/session", "/playground", "/trade-offs", "/settings"])
async def test_a_phone_in_the_dark_needs_no_sideways_scrolling(
    open_page: Open, screenshots: Path, path: str
) -> None:
    page = await open_page(path, width=390, dark=True)
    await picture(page, screenshots / f"phone-{path.strip('/') or 'live'}.png")
    wide = await page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
