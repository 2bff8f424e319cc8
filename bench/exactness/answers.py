"""Token ids of all prompts: by the target alone, and in each cell by real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import groupby

import msgspec

from bench.exactness.design import SEED, DesignCell, Disturbance, Installation, sampling_at
from bench.reference import generate_alone
from bus.client import Client
from bus.protocol.errors import LocalError, RequestFailedError
from bus.protocol.messages import FinishReason
from bus.settings import BusSettings
from bus.store import Store
from decoding import methods
from engines.catalog.speculators import chosen_speculators
from engines.chat import encode_prompt
from engines.torch.speculators.file import SpeculatorFile
from engines.torch.target import TargetModel
from launch.stack import Stack, StackOptions

_PASSIVE = {"OMP_WAIT_POLICY": "passive"}
"""Threads sleep while they wait: where there are more of them than cores, spinning takes many times
as long."""
_LEASE_S = 3.0
"""A killed edge's answer goes on elsewhere after so long."""
_PAUSE_S = 1.5
_EVERY = 4
"""Of the answers of a disturbed cell one in so many is disturbed, the first among them."""
_TUNING_S = 10.0
_POLL_S = 0.05

Tokens = tuple[int, ...]
Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """What every cell answers, by which models.

    Attributes:
        target, draft, dtype, speculator: as the workers take them.
    """

    prompts: tuple[str, ...]
    max_new_tokens: int
    target: str = "default"
    draft: str = "default"
    dtype: str = "float32"
    speculator: str | None = None


@dataclass(frozen=True, slots=True)
class CellAnswers:
    """Of one cell.

    Attributes:
        answers: token ids of each prompt's answer.
        seconds: for all of them.
        dtype: number format the cloud worker says it runs in.
    """

    cell: DesignCell
    answers: tuple[Tokens, ...]
    seconds: float
    dtype: str


def speculators_of(asked: Asked) -> tuple[str, ...]:
    """Kinds of speculators that the target is given.

    Raises:
        ModelError: a directory holds none.
    """
    held = chosen_speculators(asked.speculator or "", asked.target)
    return tuple(SpeculatorFile.open(directory).config.kind for directory in held)


def answers_alone(
    asked: Asked, temperatures: Sequence[float], tick: Tick
) -> dict[float, tuple[Tokens, ...]]:
    """The target's own at each temperature, in this process, one pass a token.

    The model is let go afterwards: the cells' processes need the memory.

    Raises:
        ModelError: the target cannot be loaded.
    """
    target = TargetModel.load(asked.target, asked.dtype)
    found = {}
    for temperature in temperatures:
        answers, sampling = [], sampling_at(temperature)
        for text in asked.prompts:
            prompt = encode_prompt(target.tokenizer, text, raw=False)
            stream = generate_alone(
                target, prompt, sampling, asked.max_new_tokens, target.eos_tokens
            )
            answers.append(tuple(stream))
            tick()
        found[temperature] = tuple(answers)
    return found


def installations(cells: Sequence[DesignCell]) -> Iterator[tuple[Installation, list[DesignCell]]]:
    """Neighbouring cells that the same processes answer."""
    for installation, group in groupby(cells, key=lambda cell: cell.installation):
        yield installation, list(group)


async def answers_together(
    asked: Asked, installation: Installation, cells: Sequence[DesignCell], tick: Tick
) -> list[CellAnswers]:
    """Start one installation and answer all prompts in each of its cells.

    Raises:
        ConfigurationError: the processes cannot be started.
        RequestFailedError: an answer ended with an error.
    """
    options = StackOptions(
        target=asked.target, draft=asked.draft, dtype=asked.dtype, link=installation.link,
        drafter=installation.drafter, threads=installation.threads,
        middle=int(methods.need_middle(cell.method for cell in cells)),
        speculator=asked.speculator,
    )  # fmt: skip
    async with AsyncExitStack() as exits:
        env = _PASSIVE | {"E2SCI_LEASE_S": str(_LEASE_S)}
        stack = Stack(options, log=lambda _: None, quiet=True, env=env)
        await exits.enter_async_context(stack)
        client = await exits.enter_async_context(Client(redis_url=stack.redis_url))
        store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
        exits.push_async_callback(store.close)
        dtype = (await stack.records())["cloud-1"].dtype
        found = []
        for cell in cells:
            await _tune(store, cell)
            began = time.perf_counter()
            answers = []
            for index, text in enumerate(asked.prompts):
                disturbed = cell.disturbance if index % _EVERY == 0 else Disturbance.NONE
                answers.append(
                    await _answer(client, cell, asked, text, _Disturber(stack, disturbed))
                )
                tick()
            seconds = time.perf_counter() - began
            found.append(CellAnswers(cell, tuple(answers), seconds, dtype))
        return found


@dataclass(slots=True)
class _Disturber:
    """Disturbs an answer once, in its middle."""

    stack: Stack
    kind: Disturbance

    async def __call__(self) -> None:
        action, _, role = self.kind.value.partition("-")
        if action == "none":
            return
        self.kind = Disturbance.NONE
        process = self.stack.process(f"{role}-1")
        await process.wait_started()  # answers go on without a middle worker that was killed
        pid = process.pid
        if action == "kill":
            os.kill(pid, signal.SIGKILL)
            return
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(_PAUSE_S)
        os.kill(pid, signal.SIGCONT)


async def _answer(
    client: Client, cell: DesignCell, asked: Asked, text: str, disturb: _Disturber
) -> Tokens:
    """Raises RequestFailedError where it ends with an error."""
    request = await client.submit(
        text, method=cell.request_method, max_new_tokens=asked.max_new_tokens,
        temperature=cell.temperature, top_p=cell.sampling.top_p, seed=SEED,
    )  # fmt: skip
    tokens: list[int] = []
    async for chunk in client.stream(request):
        tokens += chunk.token_ids
        if chunk.end is not None and chunk.end.finish_reason is FinishReason.ERROR:
            raise RequestFailedError(f"{cell}, the answer to {text[:40]!r}: {chunk.end.error}")
        if len(tokens) >= asked.max_new_tokens // 4:
            await disturb()
    return tuple(tokens)


async def _tune(store: Store, cell: DesignCell) -> None:
    """Have the controller set the cell's window, where it is the controller's to set, and its own
    one otherwise.

    Raises:
        LocalError: the controller does not take it over.
    """
    deadline = asyncio.get_running_loop().time() + _TUNING_S
    asked = False
    while asyncio.get_running_loop().time() < deadline:
        in_use = await store.tunings.in_use()
        if in_use is not None:
            wanted = in_use.own
            if cell.tuned and cell.window is not None:
                wanted = msgspec.structs.replace(wanted, window=cell.window)
            if in_use.tuning == wanted:
                return
            if not asked:
                asked = await store.tunings.ask(wanted, await store.tunings.wish())
        await asyncio.sleep(_POLL_S)
    raise LocalError(
        f"the controller did not set the window of {cell} within {_TUNING_S:g} s; expected it to "
        "take over every wish: see its log with E2SCI_LOG_LEVEL=info"
    )
