"""`e2sci bench floor`: is a method ever slower than the target alone over the same link?

Real processes, edge and cloud on one core each. The target alone is a process that streams its
tokens over a link of the same kind, one reader at a time; everything else is on the edge's core.
Each prompt is answered by both in turn, several times; who begins changes. What counts is each
answer from its third second on, so that what the method has to find out about link and draft is
found out.

On a shared machine the same answer of the same process takes up to a tenth more or less time from
one minute to the next. So the ratio is that of medians of all, and its 95 % interval is by
bootstrap over pairs of answers (`scipy.stats.bootstrap`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.cores import pin, put_models_last
from bench.evaluation.baseline_server import BaselineServer, ServedModels
from bench.progress import counting_bar
from bench.ranges import paired_interval, with_range
from bench.turns import in_turn
from bus.client import Client
from bus.protocol.errors import ConfigurationError
from engines.chat import encode_prompt
from engines.torch.oracle import RecordedAnswer, write_answers
from engines.torch.thin import NoDrafter
from launch.stack import Stack, StackOptions

DRAFTS = ("model", "wrong", "paused")
"""The pair's own draft; an oracle that is always wrong; and the pair's own on an edge that is held
for a second in the middle of each answer."""
SKIP_S = 2.0
PAUSE_S = 1.0
LEAST_S = 1.0
"""A shorter rest says nothing."""
PROMPTS = (
    "Write a long story about a lighthouse keeper.",
    "Write a detailed essay about the history of bread.",
    "Explain in detail how a river shapes its valley.",
    "List thirty animals, with two sentences about each.",
    "Describe a journey by train through the mountains, hour by hour.",
    "Write a Python module that manages a library of books, with comments and tests.",
)
"""Which the default target answers at length."""
ALONE = "target"


@dataclass(frozen=True, slots=True)
class FloorRow:
    """One answer. `tokens_per_s` is that of the rest after `SKIP_S`; `round` counts how often the
    prompt was answered before."""

    rtt_ms: float
    draft: str
    prompt_id: int
    round: int
    method: str
    tokens: int
    tokens_per_s: float
    source: str = "measured"


@dataclass(frozen=True, slots=True)
class FloorCell:
    """A method over one link with one draft, against the target alone: medians over answers of
    their speeds, the ratio of these and its 95 % interval."""

    rtt_ms: float
    draft: str
    method: str
    ratio: float
    low: float
    high: float
    tokens_per_s: float
    alone_tokens_per_s: float
    num_pairs: int
    source: str = "measured"


@dataclass(frozen=True, slots=True)
class FloorPlan:
    """What is measured."""

    rtts_ms: tuple[float, ...]
    drafts: tuple[str, ...]
    method: str
    prompts: int
    rounds: int
    max_new_tokens: int
    target: str
    draft: str
    dtype: str


def rest_speed(came_s: Sequence[float], counts: Sequence[int]) -> float | None:
    """Tokens a second after `SKIP_S`; None where too little comes after it.

    Args:
        came_s: when each piece came, since the first. counts: tokens of each.
    """
    if not came_s or came_s[-1] - SKIP_S < LEAST_S:
        return None
    first = next(i for i, at in enumerate(came_s) if at >= SKIP_S)
    seconds = came_s[-1] - came_s[first]
    return sum(counts[first + 1 :]) / seconds if seconds > 0 else None


def run(plan: FloorPlan, as_json: bool) -> None:
    """Measure and print: a table for people, one JSON object a line for programs.

    Raises:
        ConfigurationError: a stack cannot be started, or answers are too short.
    """
    rows: list[FloorRow] = []
    with counting_bar() as progress:
        total = len(plan.rtts_ms) * len(plan.drafts) * plan.prompts * plan.rounds
        task = progress.add_task("the target alone", total=total)
        for rtt_ms in plan.rtts_ms:
            for draft in plan.drafts:
                progress.update(task, description=f"{draft}, {rtt_ms:g} ms")
                measured = _Measured(plan, rtt_ms, draft, lambda: progress.advance(task))
                rows += asyncio.run(measured.run())
    cells = summarise(rows)
    if as_json:
        for cell in cells:
            print(json.dumps(asdict(cell)))
    else:
        _print(cells)


def summarise(rows: Sequence[FloorRow]) -> list[FloorCell]:
    """A cell for each link and draft."""
    cells = []
    for rtt_ms, draft in dict.fromkeys((row.rtt_ms, row.draft) for row in rows):
        own = [row for row in rows if (row.rtt_ms, row.draft) == (rtt_ms, draft)]
        alone = {(r.prompt_id, r.round): r.tokens_per_s for r in own if r.method == ALONE}
        others = {(r.prompt_id, r.round): r.tokens_per_s for r in own if r.method != ALONE}
        both = sorted(alone.keys() & others.keys())
        if not both:
            raise ConfigurationError("all answers are too short; raise --max-new-tokens")
        method = next(row.method for row in own if row.method != ALONE)
        pairs = np.array([others[at] for at in both]), np.array([alone[at] for at in both])
        ratio = paired_interval(pairs, _ratio)
        cells.append(
            FloorCell(
                rtt_ms, draft, method, ratio.value, ratio.low, ratio.high,
                float(np.median(pairs[0])),
                float(np.median(pairs[1])), len(both),
            )
        )  # fmt: skip
    return cells


def _ratio(method: np.ndarray, alone: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(np.median(method, axis=axis) / np.median(alone, axis=axis))


class _Measured:
    """One link with one draft."""

    def __init__(
        self, plan: FloorPlan, rtt_ms: float, draft: str, tick: Callable[[], None]
    ) -> None:
        self._plan, self._rtt_ms, self._draft = plan, rtt_ms, draft
        self._tick = tick
        self._prompts = PROMPTS[: plan.prompts]

    async def run(self) -> list[FloorRow]:
        plan, link = self._plan, f"{self._rtt_ms:g}ms"
        tokenizer = NoDrafter.load(plan.draft).tokenizer
        ids = [encode_prompt(tokenizer, text, raw=False) for text in self._prompts]
        rows: list[FloorRow] = []
        models = ServedModels(plan.target, None, plan.dtype)
        with tempfile.TemporaryDirectory() as scratch:
            async with BaselineServer(models, link) as server:
                env = {"E2SCI_PREFIX_CACHE_MB": "0"}
                if self._draft == "wrong":
                    env |= await self._oracle(server, ids, Path(scratch))
                options = StackOptions(
                    target=plan.target, draft=plan.draft, dtype=plan.dtype, threads=1, link=link
                )
                stack = Stack(options, log=lambda _: None, quiet=True, env=env)
                async with stack, Client(redis_url=stack.redis_url) as client:
                    pin(stack, others=True)
                    put_models_last(stack)
                    await self._answer(stack, client, 0, pause=False)  # warms up
                    for number in range(plan.rounds * len(ids)):
                        turn, index = divmod(number, len(ids))
                        for method in in_turn((ALONE, plan.method), turn + index):
                            if method == ALONE:
                                pieces = [p async for p in self._alone(server, ids[index])]
                            else:
                                paused = self._draft == "paused"
                                pieces = await self._answer(stack, client, index, paused)
                            rows += self._row(index, turn, method, pieces)
                        self._tick()
        return rows

    async def _oracle(
        self, server: BaselineServer, ids: Sequence[tuple[int, ...]], scratch: Path
    ) -> dict[str, str]:
        """An oracle that knows the answers, and says something else."""
        answers = []
        for prompt in ids:
            tokens = [
                token
                async for piece in server.stream(prompt, self._plan.max_new_tokens)
                for token in piece.tokens
            ]
            answers.append(RecordedAnswer(prompt, tuple(tokens)))
        path = scratch / "answers.jsonl"
        write_answers(path, answers)
        return {"E2SCI_ORACLE": str(path), "E2SCI_ORACLE_ERROR_RATE": "1"}

    async def _alone(
        self, server: BaselineServer, prompt: tuple[int, ...]
    ) -> AsyncIterator[tuple[float, int]]:
        async for piece in server.stream(prompt, self._plan.max_new_tokens):
            yield time.monotonic(), len(piece.tokens)

    async def _answer(
        self, stack: Stack, client: Client, index: int, pause: bool
    ) -> list[tuple[float, int]]:
        """When tokens came, and how many. The edge is held once, after `SKIP_S`."""
        pieces: list[tuple[float, int]] = []
        holding: asyncio.Task[None] | None = None
        request = await client.submit(
            self._prompts[index], method=self._plan.method, temperature=0.0,
            max_new_tokens=self._plan.max_new_tokens,
        )  # fmt: skip
        async for chunk in client.stream(request):
            if chunk.token_ids:
                pieces.append((time.monotonic(), len(chunk.token_ids)))
                begun = pieces[-1][0] - pieces[0][0] > SKIP_S
                if pause and holding is None and begun:
                    holding = asyncio.create_task(_hold(stack.process("edge-1").pid))
        if holding is not None:
            await holding
        return pieces

    def _row(
        self, index: int, turn: int, method: str, pieces: Sequence[tuple[float, int]]
    ) -> list[FloorRow]:
        """Nothing where the answer is too short."""
        counts = [count for _, count in pieces]
        speed = rest_speed([at - pieces[0][0] for at, _ in pieces], counts)
        if speed is None:
            return []
        at = (self._rtt_ms, self._draft, index, turn, method, sum(counts))
        return [FloorRow(*at, tokens_per_s=speed)]


async def _hold(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(PAUSE_S)
    finally:
        os.kill(pid, signal.SIGCONT)


def _print(cells: Sequence[FloorCell]) -> None:
    table = Table(
        title="Tokens a second against the target alone over the same link, after the first "
        f"{SKIP_S:g} s (measured: medians, 95 % interval)"
    )
    for heading in ("round trip ms", "draft", "method", "tokens/s", "alone", "ratio", "pairs"):
        table.add_column(heading, justify="left" if heading in ("draft", "method") else "right")
    for cell in cells:
        table.add_row(
            f"{cell.rtt_ms:g}", cell.draft, cell.method, f"{cell.tokens_per_s:.1f}",
            f"{cell.alone_tokens_per_s:.1f}", with_range(cell.ratio, cell.low, cell.high),
            str(cell.num_pairs),
        )  # fmt: skip
    Console().print(table)
