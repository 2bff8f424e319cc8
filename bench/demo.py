"""`make demo`: the whole system on embedded defaults, three prompts through the Redis queue.

Starts Valkey, controller, cloud worker, edge worker and dashboard as real processes, streams the
answers as they come and prints a summary. Exits 0 if every prompt was answered.
"""

from __future__ import annotations

import asyncio
import sys

from rich.console import Console
from rich.table import Table

from bus.client import Client
from bus.errors import E2SCIError
from bus.store import End, FinishReason
from launch.stack import DEFAULT_DASHBOARD_PORT, Stack, StackOptions

PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Tom has 5 apples and buys 7 more, then gives away 4. How many are left?",
)
MAX_NEW_TOKENS = 64
TIMEOUT_S = 300.0


async def demo(console: Console) -> bool:
    """Run it; whether every prompt was answered."""
    console.print("[bold]Starting[/] Valkey, controller, cloud worker, edge worker, dashboard …")
    options = StackOptions(dashboard_port=DEFAULT_DASHBOARD_PORT, log_level="WARNING")
    stack = Stack(options, log=lambda line: console.print(line, style="dim", markup=False))
    await stack.start()
    try:
        console.print(f"Dashboard: {stack.dashboard_url}\n")
        async with Client(redis_url=stack.redis_url) as client:
            ends = [await _answer(client, prompt, console) for prompt in PROMPTS]
    finally:
        await stack.stop()
    console.print(_summary(ends))
    return all(end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for end in ends)


async def _answer(client: Client, prompt: str, console: Console) -> End:
    """Submit one prompt and print its text as it comes."""
    console.print(f"[bold cyan]› {prompt}[/]")
    request_id = await client.submit(prompt, max_new_tokens=MAX_NEW_TOKENS)
    async with asyncio.timeout(TIMEOUT_S):
        async for chunk in client.stream(request_id):
            console.print(chunk.text, end="", markup=False, highlight=False)
            if chunk.end is not None:
                console.print(f"\n[dim]{_line(chunk.end)}[/]\n")
                return chunk.end
    raise E2SCIError(f"request {request_id}: the stream ended without an end")


def _line(end: End) -> str:
    usage = end.usage
    error = f" {end.error}" if end.error else ""
    return (
        f"{end.finish_reason}{error}: {usage.completion_tokens} tokens in {usage.seconds:.1f} s, "
        f"{usage.acceptance:.0%} of {usage.drafted_tokens} drafted tokens accepted"
    )


def _summary(ends: list[End]) -> Table:
    usages = [end.usage for end in ends]
    tokens = sum(u.completion_tokens for u in usages)
    drafted = sum(u.drafted_tokens for u in usages)
    accepted = sum(u.accepted_tokens for u in usages)
    seconds = sum(u.seconds for u in usages)
    sent = sum(u.bytes_per_drafted_token * u.drafted_tokens for u in usages)
    table = Table(title="Summary (measured on this machine)", show_header=False)
    table.add_row("prompts answered through the queue", str(len(ends)))
    table.add_row("tokens", str(tokens))
    table.add_row("tokens per second", f"{tokens / seconds:.1f}")
    table.add_row("acceptance", f"{accepted / max(drafted, 1):.1%} of {drafted} drafted")
    table.add_row("rollbacks", f"{sum(u.rollbacks for u in usages)}")
    table.add_row("windows", f"{sum(u.windows for u in usages)}")
    table.add_row("bytes per drafted token", f"{sent / max(drafted, 1):.0f}")
    return table


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
