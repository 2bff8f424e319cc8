"""`make demo`: the whole system on embedded defaults, three prompts through the Redis queue.

Starts Valkey, controller, cloud worker, edge worker and dashboard as real processes, streams the
answers as they come and prints a summary. The last prompt is answered by `e2sci`, whose acceptance
threshold follows credit; the controller's updates are shown as it publishes them. Exits 0 if every
prompt was answered and the controller changed threshold or window at least once.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.updates import Updates, describe, subscribed
from bus.client import Client
from bus.protocol.errors import E2SCIError
from bus.protocol.messages import ControlUpdate
from bus.protocol.requests import session_id
from bus.store import End, FinishReason, Usage
from launch.stack import DEFAULT_DASHBOARD_PORT, Stack, StackOptions

EXACT_PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
)
"""Answered by the default method, `auto`."""
CREDIT_PROMPT = "Tom has 5 apples and buys 7 more, then gives away 4. How many are left?"
CREDIT_METHOD = "e2sci"
MAX_NEW_TOKENS = 64
TIMEOUT_S = 300.0


class Screen:
    """Streamed text and whole lines on one console, so that neither breaks into the other."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._mid_line = False

    def text(self, piece: str) -> None:
        """Print a piece of an answer after the one before."""
        if piece:
            self._console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            self._mid_line = not piece.endswith("\n")

    def line(self, line: str, style: str = "") -> None:
        """Print a line of its own; text that follows begins on the next one."""
        if self._mid_line:
            self._console.print()
        self._mid_line = False
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


@dataclass(slots=True)
class ShownUpdates:
    """Prints a session's updates and counts those that changed its threshold or window."""

    screen: Screen
    changes: int = 0
    last: ControlUpdate | None = None

    def show(self, update: ControlUpdate) -> None:
        line = describe(self.last, update)
        if line is not None:
            self.screen.line(f"  {line}", style="dim")
            self.changes += self.last is not None
        self.last = update

    async def follow(self, updates: Updates, session: str) -> None:
        """Show the updates of `session` until cancelled."""
        async for update in updates.of(session):
            self.show(update)


async def demo(console: Console) -> bool:
    """Run it; whether every prompt was answered.

    Raises:
        E2SCIError: the stack did not start, or no update of the controller arrived.
    """
    console.print("[bold]Starting[/] Valkey, controller, cloud worker, edge worker, dashboard …")
    options = StackOptions(dashboard_port=DEFAULT_DASHBOARD_PORT, log_level="WARNING")
    stack = Stack(options, log=lambda line: console.print(line, style="dim", markup=False))
    await stack.start()
    try:
        console.print(f"Dashboard: {stack.dashboard_url}\n")
        async with (
            Client(redis_url=stack.redis_url) as client,
            subscribed(stack.redis_url) as updates,
        ):
            screen = Screen(console)
            ends = [await answer_exactly(client, prompt, screen) for prompt in EXACT_PROMPTS]
            end, changes = await answer_by_credit(client, CREDIT_PROMPT, updates, screen)
            ends.append(end)
    finally:
        await stack.stop()
    console.print(_summary(ends, changes))
    return all(end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for end in ends)


async def answer_exactly(client: Client, prompt: str, screen: Screen) -> End:
    """Submit one prompt to the default method and print its text as it comes."""
    screen.line(f"› {prompt}", style="bold cyan")
    request_id = await client.submit(prompt, max_new_tokens=MAX_NEW_TOKENS)
    return await _stream(client, request_id, screen)


async def answer_by_credit(
    client: Client, prompt: str, updates: Updates, screen: Screen
) -> tuple[End, int]:
    """The same by `e2sci`, with the controller's updates between the pieces of text.

    Returns the end and how often the threshold or the window changed.

    Raises:
        E2SCIError: neither changed while the answer was streamed.
    """
    screen.line(f"› {prompt}", style="bold cyan")
    screen.line(
        f"  method {CREDIT_METHOD}: lossy, the text may differ from the target's own", style="dim"
    )
    request_id = await client.submit(prompt, method=CREDIT_METHOD, max_new_tokens=MAX_NEW_TOKENS)
    shown = ShownUpdates(screen)
    following = asyncio.create_task(shown.follow(updates, session_id(request_id)))
    try:
        end = await _stream(client, request_id, screen)
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
    if end.finish_reason is not FinishReason.ERROR and not shown.changes:
        raise E2SCIError(
            f"request {request_id}: the controller changed neither threshold nor window of this "
            "answer; expected updates from its PUB socket. Look at its log: `e2sci up` shows it"
        )
    return end, shown.changes


async def _stream(client: Client, request_id: str, screen: Screen) -> End:
    async with asyncio.timeout(TIMEOUT_S):
        async for chunk in client.stream(request_id):
            screen.text(chunk.text)
            if chunk.end is not None:
                screen.line(f"{_line(chunk.end)}\n", style="dim")
                return chunk.end
    raise E2SCIError(f"request {request_id}: the stream ended without an end")


def _line(end: End) -> str:
    usage = end.usage
    error = f" {end.error}" if end.error else ""
    return (
        f"{end.finish_reason}{error}: {usage.completion_tokens} tokens in {usage.seconds:.1f} s, "
        f"{usage.acceptance:.0%} of {usage.drafted_tokens} drafted tokens accepted, "
        f"{'lossless' if usage.lossless else 'lossy'}"
    )


def _summary(ends: list[End], changes: int) -> Table:
    usages = [end.usage for end in ends]
    tokens = sum(u.completion_tokens for u in usages)
    drafted = sum(u.drafted_tokens for u in usages)
    accepted = sum(u.accepted_tokens for u in usages)
    seconds = sum(u.seconds for u in usages)
    table = Table(title="Summary (measured on this machine)", show_header=False)
    table.add_row("prompts answered through the queue", str(len(ends)))
    table.add_row("tokens", str(tokens))
    table.add_row("tokens per second", f"{tokens / seconds:.1f}")
    table.add_row("acceptance", f"{accepted / max(drafted, 1):.1%} of {drafted} drafted")
    table.add_row("rollbacks", f"{sum(u.rollbacks for u in usages)}")
    table.add_row("windows", f"{sum(u.windows for u in usages)}")
    table.add_row("bytes up per drafted token", _bytes_up(usages))
    table.add_row("changes of threshold or window (e2sci)", str(changes))
    return table


def _bytes_up(usages: list[Usage]) -> str:
    """Of windows and acknowledgements; a lossy method's windows carry probabilities too."""
    kinds = {"lossless": True, "lossy": False}
    found = []
    for kind, lossless in kinds.items():
        those = [usage for usage in usages if usage.lossless is lossless]
        drafted = sum(usage.drafted_tokens for usage in those)
        sent = sum(usage.bytes_per_drafted_token * usage.drafted_tokens for usage in those)
        if drafted:
            found.append(f"{sent / drafted:.0f} {kind}")
    return ", ".join(found)


def main() -> None:
    console = Console()
    try:
        answered = asyncio.run(demo(console))
    except E2SCIError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if answered else "error: not every prompt was answered")


if __name__ == "__main__":
    main()
