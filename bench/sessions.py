"""`e2sci bench sessions`: many sessions on one cloud worker, against another checkout of ours.

*Measured*: real cloud workers, each pinned to the last core, spoken to over ZeroMQ by a client on
the first. The sessions' windows are drafted by nobody: they are the target's own answers, recorded
before, so that all is accepted and the target is what limits. No window awaits its feedback, so
that a pass runs as many tokens as a window has. Two workers, of this checkout and of another, take
turns, and only one is busy at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cores import pin_process
from bench.progress import counting_bar
from bench.prompts import PROMPTS
from bus.protocol.arrays import pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.codec import AnyMessage
from bus.protocol.errors import ConfigurationError
from bus.protocol.messages import (
    Ack,
    CloseSession,
    DraftWindow,
    Feedback,
    OpenSession,
    SessionReady,
)
from bus.settings import BusSettings
from bus.store import Store, WorkerRecord
from bus.transport.sockets import Sockets
from decoding.prefix_hash import chain, prompt_hash
from engines.chat import encode_prompt
from engines.thread import now_ms
from engines.torch.loading import load_model
from launch.embedded import EmbeddedServer
from launch.python import module_command, module_env
from launch.supervisor import ProcessSpec, ProcessTree

HERE, THERE = "here", "there"
_EDGE = "bench"
_LONG_PROMPT = 1500

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round came to.

    Attributes:
        version: `here` or `there`. window: tokens of each window.
        tokens_per_s: committed tokens of all sessions a second.
        gap_ms: p95 of the time between two feedbacks of a session.
        gap_beside_prompt_ms: the same while another session's prompt of 1,500 tokens runs.
        identical: sessions whose answer is the one it gives alone.
    """

    version: str
    window: int
    tokens_per_s: float
    gap_ms: float
    gap_beside_prompt_ms: float
    identical: int


@dataclass(slots=True)
class _Session:
    """One answer: `text` grows; windows come from `answer`, or guess where it is not known.

    Attributes:
        handle: what the worker addresses it by, once it has said so. number: of the next message.
    """

    name: str
    prompt: Tokens
    window: int
    most: int
    answer: Tokens = ()
    text: Tokens = ()
    handle: int | None = None
    number: int = 1
    arrivals: list[float] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def length(self) -> int:
        """Of prompt and text."""
        return len(self.prompt) + len(self.text)

    def opening(self, digest: str) -> OpenSession:
        return OpenSession(
            session=self.name, client="bench", edge=_EDGE, incarnation=1, method="sd",
            prompt=pack_tokens(self.prompt), committed=b"", seed=0,
            max_new_tokens=self.most + self.window + 1, temperature=0.0, top_p=1.0, top_k=0,
            coupling=SessionCoupling.GUMBEL,
            tokenizer_digest=digest,
        )  # fmt: skip

    def next_window(self) -> DraftWindow:
        """The same until its feedback has come."""
        assert self.handle is not None
        begin = len(self.text)
        *_, follows = chain(prompt_hash(self.prompt), self.text)
        tokens = self.answer[begin : begin + self.window] or (0,)
        return DraftWindow(
            handle=self.handle, number=self.number, acknowledged=self.length, start=self.length,
            follows=follows, tokens=pack_tokens(tokens),
        )  # fmt: skip

    def take(self, feedback: Feedback) -> DraftWindow | Ack | None:
        """What to send after feedback: the next window, or where some was lost a question."""
        if feedback.handle != self.handle or self.done.is_set():
            return None
        if feedback.start > self.length:
            self.number += 1
            return Ack(feedback.handle, self.number, self.length, again=True)
        new = feedback.token_ids[self.length - feedback.start :]
        if not new:
            return None
        self.text += new
        self.number += 1
        self.arrivals.append(now_ms())
        if len(self.text) >= self.most:
            self.done.set()
            return None
        return self.next_window()


def _raised(_message: AnyMessage, error: Exception) -> None:
    raise error


class _Worker:
    """A cloud worker of one version, and the sessions that this client has there."""

    def __init__(self, version: str, record: WorkerRecord, sockets: Sockets) -> None:
        self.version = version
        self._digest = record.tokenizer_digest
        self._outbox = sockets.outbox(record.endpoints["windows"])
        self._listener = sockets.listener(record.endpoints["feedback"], _EDGE)
        self._sessions: dict[str, _Session] = {}
        self._number = 0

    async def listen(self) -> None:
        await self._listener.deliver(self._arrived, _raised)

    def _arrived(self, message: AnyMessage, _: int) -> None:
        match message:
            case SessionReady():
                session = self._sessions.get(message.session)
                if session is not None and not session.arrivals:
                    session.handle = message.handle
                    self._outbox.send(session.next_window())
            case Feedback():
                for session in self._sessions.values():
                    answer = session.take(message)
                    if answer is not None:
                        self._outbox.send(answer)
            case _:
                pass

    async def run(self, *asked: tuple[Tokens, Tokens, int, int]) -> list[_Session]:
        """Sessions of (prompt, answer, window, most) at once, to their ends."""
        sessions = []
        for prompt, answer, window, most in asked:
            self._number += 1
            name = f"{self.version}-{self._number}"
            sessions.append(_Session(name, prompt, window, most, answer))
            self._sessions[name] = sessions[-1]
        for session in sessions:
            await self._open(session)
        for session in sessions:
            await asyncio.wait_for(session.done.wait(), 600)
            self._outbox.send(CloseSession(session.name, 1, "end"))
            del self._sessions[session.name]
        return sessions

    async def _open(self, session: _Session) -> None:
        """Repeated until it is heard: a subscription takes a moment."""
        self._outbox.send(session.opening(self._digest))
        if self._number == 1:
            while not session.arrivals:
                await asyncio.sleep(0.3)
                if not session.arrivals:
                    self._outbox.send(session.opening(self._digest))


def measure(
    sessions: int,
    windows: list[int],
    max_new_tokens: int,
    rounds: int,
    dtype: str,
    against: Path | None,
    tick: Callable[[], None],
) -> list[Round]:
    """Run it.

    Args:
        against: another checkout of this project, with the same protocol; None measures this one
            alone.

    Raises:
        ConfigurationError: a worker does not start.
    """
    tokenizer = load_model("default", dtype).tokenizer
    prompts = [encode_prompt(tokenizer, text, raw=False) for text in PROMPTS]
    chosen = [prompts[i % len(prompts)] for i in range(sessions)]
    return asyncio.run(_measure(chosen, windows, max_new_tokens, rounds, dtype, against, tick))


def num_ticks(windows: list[int], rounds: int, against: Path | None) -> int:
    """How often `measure` calls `tick`."""
    return len(windows) * rounds * (1 if against is None else 2)


async def _measure(
    prompts: list[Tokens], windows: list[int], most: int, rounds: int, dtype: str,
    against: Path | None, tick: Callable[[], None],
) -> list[Round]:  # fmt: skip
    async with _workers(dtype, against) as workers:
        answers = [await _alone(workers[0], prompt, most) for prompt in prompts]
        results = []
        for window in windows:
            for number in range(rounds):
                for worker in workers if number % 2 else reversed(workers):
                    results.append(await _round(worker, prompts, answers, window, most))
                    tick()
        return results


async def _alone(worker: _Worker, prompt: Tokens, most: int) -> Tokens:
    """The target's own answer: every guess is wrong or happens to be right, and it goes on."""
    (session,) = await worker.run((prompt, (), 1, most + 16))
    return session.text


async def _round(
    worker: _Worker, prompts: list[Tokens], answers: list[Tokens], window: int, most: int
) -> Round:
    asked = [(p, a, window, most) for p, a in zip(prompts, answers, strict=True)]
    began_ms = now_ms()
    ran = await worker.run(*asked)
    took_s = (now_ms() - began_ms) / 1e3
    long_prompt = (prompts[0] * (_LONG_PROMPT // len(prompts[0]) + 1))[:_LONG_PROMPT]
    beside = await worker.run(*asked[1:], (long_prompt, (), 1, 1))
    until = beside[-1].arrivals[0]
    identical = sum(s.text[:most] == a[:most] for s, a in zip(ran, answers, strict=True))
    return Round(
        worker.version, window, sum(len(s.text) for s in ran) / took_s,
        _p95(gap for s in ran for gap in _gaps(s.arrivals)),
        _p95(gap for s in beside[:-1] for gap in _gaps([t for t in s.arrivals if t <= until])),
        identical,
    )  # fmt: skip


def _gaps(arrivals: list[float]) -> Iterator[float]:
    return (after - before for before, after in itertools.pairwise(arrivals))


def _p95(gaps: Iterator[float]) -> float:
    listed = sorted(gaps)
    return statistics.quantiles(listed, n=20)[-1] if len(listed) > 1 else float("nan")


@asynccontextmanager
async def _workers(dtype: str, against: Path | None) -> AsyncIterator[list[_Worker]]:
    roots = {HERE: None, **({} if against is None else {THERE: against})}
    async with AsyncExitStack() as exits:
        server = await exits.enter_async_context(EmbeddedServer(lambda _: None))
        settings = BusSettings.load(redis_url=server.url)
        store = await Store.connect(settings)
        exits.push_async_callback(store.close)
        sockets = Sockets(settings)
        exits.callback(sockets.close)
        specs = [
            ProcessSpec(name, *_command(name, root, dtype, server.url), quiet=True)
            for name, root in roots.items()
        ]
        tree = ProcessTree(specs, log=lambda _: None, probe=partial(_ready, store))
        await exits.enter_async_context(tree)
        await tree.ready()
        records = {record.worker_id: record for record in await store.registry.workers("cloud")}
        workers = [_Worker(name, records[name], sockets) for name in roots]
        for name in roots:
            pin_process(tree.process(name).pid, last=True)
        tasks = [asyncio.create_task(worker.listen()) for worker in workers]
        try:
            yield workers
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def _command(
    name: str, root: Path | None, dtype: str, redis_url: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    env = {
        **module_env(), "E2SCI_REDIS_URL": redis_url, "E2SCI_WORKER_ID": name,
        "E2SCI_THREADS": "1", "E2SCI_DTYPE": dtype, "E2SCI_PREFIX_CACHE_MB": "0",
    }  # fmt: skip
    if root is not None:
        if not (root / "cloud_worker").is_dir():
            raise ConfigurationError(
                f"{root} is no checkout of this project; expected cloud_worker/"
            )
        env["PYTHONPATH"] = str(root)
    return module_command("cloud_worker"), env


async def _ready(store: Store) -> set[str]:
    return {record.worker_id for record in await store.registry.workers("cloud")}


def run(
    sessions: int, windows: list[int], max_new_tokens: int, rounds: int, dtype: str,
    against: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure and print: a table for people, one JSON object on one line for programs."""
    with counting_bar() as progress:
        task = progress.add_task("rounds", total=num_ticks(windows, rounds, against))
        results = measure(
            sessions, windows, max_new_tokens, rounds, dtype, against,
            lambda: progress.advance(task),
        )  # fmt: skip
    if as_json:
        print(json.dumps({"sessions": sessions, "rounds": [asdict(r) for r in results]}))
        return
    table = Table(
        title=f"{sessions} sessions on one cloud worker, one core (measured, medians of {rounds})",
        caption="gap: p95 of the time between two feedbacks of a session; identical: answers that "
        "are those of the session alone",
    )
    for heading in ("version", "window", "tokens/s", "gap ms", "beside a prompt ms", "identical"):
        table.add_column(heading, justify="left" if heading == "version" else "right")
    for window in windows:
        for version in (HERE, THERE):
            ran = [r for r in results if (r.version, r.window) == (version, window)]
            if ran:
                table.add_row(version, str(window), *_medians(ran))
    Console().print(table)


def _medians(ran: list[Round]) -> tuple[str, ...]:
    return (
        f"{statistics.median(r.tokens_per_s for r in ran):.1f}",
        f"{statistics.median(r.gap_ms for r in ran):.0f}",
        f"{statistics.median(r.gap_beside_prompt_ms for r in ran):.0f}",
        f"{min(r.identical for r in ran)}",
    )
