"""`e2sci bench lookup`: what lookup in front of the draft model brings, on each set of prompts.

Two installations at once, one with lookup and one without, on the same cores; each prompt goes to
one and then to the other, and who comes first changes. Only one of them works at a time.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from bench.answers import TimedAnswer, read_answer
from bench.cores import pin
from bench.pace.summary import Spread
from bench.progress import counting_bar
from bench.prompts import SETS
from bus.client import Client
from launch.stack import Stack, StackOptions

WITHOUT, WITH = "model", "lookup+model"
SEED = 1


@dataclass(frozen=True, slots=True)
class SetFigures:
    """One set of prompts, measured.

    Attributes:
        without, with_lookup: tokens a second of a repetition, over all prompts of the set.
        ratio: the same repetition's with ÷ without.
        identical: answers with the same token ids, of `answers`.
    """

    prompt_set: str
    answers: int
    without: Spread
    with_lookup: Spread
    ratio: Spread
    identical: int


Answers = dict[tuple[str, int, int], dict[str, TimedAnswer]]
"""(set, prompt, repetition) → drafter → answer."""


def run(method: str, repeats: int, max_new_tokens: int, as_json: bool) -> list[SetFigures]:
    """Measure and print: a table for people, one JSON object a set for programs."""
    with counting_bar() as progress:
        total = 2 * repeats * sum(map(len, SETS.values()))
        task = progress.add_task("answers", total=total)
        tick = lambda: progress.advance(task)  # noqa: E731 - a name for one argument
        answers = asyncio.run(_measure(method, repeats, max_new_tokens, tick))
    figures = summarise(answers)
    if as_json:
        for row in figures:
            print(json.dumps(asdict(row) | {"source": "measured"}))
    else:
        _print(figures, method)
    return figures


async def _measure(
    method: str, repeats: int, max_new_tokens: int, tick: Callable[[], None]
) -> Answers:
    answers: Answers = defaultdict(dict)
    async with AsyncExitStack() as exits:
        clients: dict[str, Client] = {}
        for drafter in (WITHOUT, WITH):
            options = StackOptions(drafter=drafter, dtype="float32", threads=1)
            # speeds are of whole answers: a repeated prompt must be run again
            env = {"E2SCI_PREFIX_CACHE_MB": "0"}
            stack = await exits.enter_async_context(Stack(options, log=lambda _: None, env=env))
            pin(stack)
            clients[drafter] = await exits.enter_async_context(Client(redis_url=stack.redis_url))
            await clients[drafter].generate(SETS["chat"][0], method=method, max_new_tokens=8)
        for repeat in range(repeats):
            for name, prompts in SETS.items():
                for index, prompt in enumerate(prompts):
                    order = (WITHOUT, WITH) if (repeat + index) % 2 else (WITH, WITHOUT)
                    for drafter in order:
                        answers[name, index, repeat][drafter] = await read_answer(
                            clients[drafter], prompt, method=method, seed=SEED,
                            max_new_tokens=max_new_tokens, temperature=0.0,
                        )  # fmt: skip
                        tick()
    return answers


def summarise(answers: Answers) -> list[SetFigures]:
    """One row a set, in the order they were asked."""
    rows = []
    for name in dict.fromkeys(prompt_set for prompt_set, _, _ in answers):
        own = {key: pair for key, pair in answers.items() if key[0] == name}
        repeats = sorted({repeat for _, _, repeat in own})
        speeds = {
            drafter: [
                _speed([p[drafter] for key, p in own.items() if key[2] == r]) for r in repeats
            ]
            for drafter in (WITHOUT, WITH)
        }
        pairs = zip(speeds[WITH], speeds[WITHOUT], strict=True)
        rows.append(
            SetFigures(
                name,
                len(own),
                Spread.of(speeds[WITHOUT]),
                Spread.of(speeds[WITH]),
                Spread.of(a / b for a, b in pairs),
                sum(pair[WITH].token_ids == pair[WITHOUT].token_ids for pair in own.values()),
            )
        )
    return rows


def _speed(answers: Sequence[TimedAnswer]) -> float:
    """Whole answers, from their first draft on, so that a first piece of many tokens counts."""
    return sum(len(a.token_ids) for a in answers) / sum(a.usage.seconds for a in answers)


def _print(figures: Sequence[SetFigures], method: str) -> None:
    table = Table(title=f"{method} with and without lookup (measured, median and range)")
    for heading in ("prompts", "answers", "without, tokens/s", "with", "ratio", "same tokens"):
        table.add_column(heading, justify="left" if heading == "prompts" else "right")
    for row in figures:
        table.add_row(
            row.prompt_set, str(row.answers), str(row.without), str(row.with_lookup),
            str(row.ratio), f"{row.identical} of {row.answers}",
        )  # fmt: skip
    Console().print(table)
