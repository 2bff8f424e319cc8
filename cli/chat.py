"""`e2sci chat`: talk with the running system, one message after another.

A message is a line. The answer streams; Ctrl-C during it cancels this answer alone, and what came
of it stays in the chat.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import typer

from bus.client import Chunk, Client
from bus.protocol.chat import ChatMessage, Role
from bus.protocol.errors import E2SCIError, RequestFailedError
from bus.settings import BusSettings
from bus.store.entries import End, FinishReason
from cli import options
from cli.group import run, say
from cli.lines import Lines, lines_of_stdin
from cli.options import Sampling
from cli.state import settings_to_reach
from cli.submit import follow, warn_without_edges

__all__ = ["Conversation", "chat", "talk"]

HELP = """/system TEXT  set the system message; without TEXT, remove it
/reset        forget the messages so far, but for the system's
/help         show this
Ctrl-C        cancel the answer; at the prompt, leave
Ctrl-D        leave
Every other line is a message."""


@dataclass(slots=True)
class Conversation:
    """What has been said.

    Attributes:
        system: the system message; "" is none.
        turns: the user's and the assistant's messages, in turn.
    """

    system: str = ""
    turns: list[ChatMessage] = field(default_factory=list)

    def asked(self, text: str) -> list[ChatMessage]:
        """The chat with this message of the user's at its end; it is not kept yet."""
        system = [ChatMessage(role=Role.SYSTEM, content=self.system)] if self.system else []
        return [*system, *self.turns, ChatMessage(role=Role.USER, content=text)]

    def keep(self, text: str, answer: str) -> None:
        """Keep a message and its answer, whole or cut off."""
        self.turns += [
            ChatMessage(role=Role.USER, content=text),
            ChatMessage(role=Role.ASSISTANT, content=answer),
        ]

    def command(self, line: str) -> str | None:
        """Carry out a command; returns what to show, or None where the line is a message."""
        name, _, rest = line.strip().partition(" ")
        if name == "/system":
            self.system = rest.strip()
            return "system message set" if self.system else "no system message"
        if rest:
            return None
        if name == "/reset":
            self.turns = []
            return "the chat begins anew"
        return HELP if name == "/help" else None


def chat(
    system: Annotated[
        str | None, typer.Option(help="System message.", show_default="the template's own, if any")
    ] = None,
    method: options.Method = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    coupling: options.CoupledBy = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    client: options.ClientName = None,
    timeout: options.Timeout = None,
    redis_url: options.RedisUrl = None,
) -> None:
    """Chat with the running system; each answer knows the messages before it.

    A line is a message; piped lines work too. /help shows the commands. Ctrl-C cancels an answer,
    and at the prompt leaves, as Ctrl-D does.
    """
    sampling = Sampling(
        method, max_new_tokens, temperature, top_p, top_k, coupling, seed, tuple(stop or ()),
        client=client,
    )  # fmt: skip
    sampling.request("Hi")  # wrong options are reported before anybody types
    settings = settings_to_reach(redis_url)
    conversation = Conversation(system or "")
    run(lambda: talk(settings, sampling, conversation, lines_of_stdin(), timeout))


async def talk(
    settings: BusSettings,
    sampling: Sampling,
    conversation: Conversation,
    lines: Lines,
    timeout_s: float | None = None,
) -> None:
    """Answer lines until they end.

    Raises:
        E2SCIError: an answer to a piped line failed; at a terminal it is shown, and the chat goes
            on.
    """
    async with Client(settings=settings) as client:
        await warn_without_edges(settings)
        if lines.interactive:
            typer.echo("A line is a message; /help shows the commands, Ctrl-D leaves.")
        while (line := await lines.read()) is not None:
            if not line.strip():
                continue
            shown = conversation.command(line)
            if shown is not None:
                typer.echo(shown)
                continue
            try:
                await _answer(client, sampling, conversation, line, timeout_s)
            except E2SCIError as error:
                if not lines.interactive:
                    raise
                say(f"error: {error}")


async def _answer(
    client: Client,
    sampling: Sampling,
    conversation: Conversation,
    text: str,
    timeout_s: float | None,
) -> None:
    """Show one answer and keep it; Ctrl-C cancels it and keeps what has come."""
    request = sampling.request(messages=conversation.asked(text))
    pieces: list[str] = []

    def show(_request_id: str, chunk: Chunk) -> None:
        pieces.append(chunk.text)
        typer.echo(chunk.text, nl=False)

    task = asyncio.create_task(follow(client, request, show, timeout_s))
    with _interrupts(task) as interrupted:
        try:
            end = await task
        except asyncio.CancelledError:
            if not interrupted:
                raise
            end = End(FinishReason.CANCELLED)
        finally:
            typer.echo("")
    answer = "".join(pieces)
    if end.finish_reason is FinishReason.ERROR:
        raise RequestFailedError(end.error)
    if end.finish_reason is not FinishReason.CANCELLED or answer:
        conversation.keep(text, answer)
    say(summary(end, request.seed))


@contextlib.contextmanager
def _interrupts(task: asyncio.Task[End]) -> Iterator[list[bool]]:
    """While it is open, Ctrl-C cancels `task`, and afterwards this one again. The list is empty
    until then."""
    loop, current = asyncio.get_running_loop(), asyncio.current_task()
    assert current is not None
    interrupted: list[bool] = []

    def interrupt() -> None:
        interrupted.append(True)
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        loop.add_signal_handler(signal.SIGINT, current.cancel)


def summary(end: End, seed: int) -> str:
    """One line: how an answer ended and what it took."""
    if end.finish_reason is FinishReason.CANCELLED:
        return "[cancelled]"
    usage = end.usage
    parts = [f"{usage.completion_tokens} tokens", f"{usage.tokens_per_s:.1f} tokens/s"]
    if usage.drafted_tokens:
        parts.append(f"{usage.acceptance:.0%} of drafts accepted")
    if end.finish_reason is FinishReason.LENGTH:
        parts.append("cut off at max_new_tokens")
    return f"[{', '.join([*parts, f'seed {seed}'])}]"
