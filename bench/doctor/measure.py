"""Times and acceptance of a pair, measured on this machine; loads the models."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from bench.contention import Contention, measure_contention
from bench.doctor.checks import Check, failed, ok
from bench.doctor.expect import PairCosts, rising
from bench.passes import CONTEXT, GREEDY, DraftStep, TargetPass, alternate
from bench.prompts import ARITHMETIC, CHAT, CODE
from bench.reference import generate_alone
from bench.simulate.device import Device
from bench.simulate.predict import Hits
from engines.catalog.registry import Specs
from engines.chat import encode_prompt
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel
from launch.stack import StackOptions

REPEATS = 3
PASS_SIZES = (1, 2, 4, 8, 16)
PROMPTS = (CHAT[0], CODE[0], ARITHMETIC[0], CHAT[2])
ANSWER_TOKENS = 48


def num_ticks() -> int:
    """How often `tick` is called by `measure_pair`."""
    return REPEATS + 1 + len(PROMPTS)


async def measure_times(
    specs: Specs, dtype: str, tick: Callable[[], None], repeats: int = REPEATS
) -> Device:
    """c and t(n), each model in a process of its own as workers are, alone and while the other one
    runs (`bench.contention`), medians of `repeats`.

    Raises:
        ConfigurationError: a model cannot be loaded.
    """
    threads = StackOptions().threads_each
    found = await measure_contention(specs.target, specs.draft, dtype, repeats, tick, threads)
    return device_of(found)


def device_of(found: Contention) -> Device:
    """Times alone, and by how much both grow while the other model runs."""
    one = found.passes[1]
    return Device(
        step_ms=found.step.alone_ms,
        pass_ms=one.alone_ms,
        step_slowdown=max(1.0, found.step.slowdown),
        pass_slowdown=max(1.0, one.slowdown),
        passes=rising({size: timing.alone_ms for size, timing in found.passes.items()}),
    )


class Pair:
    """Target and draft in this process.

    Raises:
        ModelError, ConfigurationError: one cannot be loaded.
    """

    def __init__(self, specs: Specs, dtype: str) -> None:
        self.specs = specs
        self.target = TargetModel.load(specs.target, dtype)
        self.draft = ModelDrafter.load(specs.draft, dtype)
        self.stopping = threading.Event()

    def check(self) -> Check:
        """Whether draft and target share a tokenizer (`edge_worker.peers`)."""
        target, draft = self.target, self.draft
        if target.tokenizer_digest != draft.tokenizer_digest:
            return failed("tokenizers", f"{draft.name} and {target.name} do not share a "
                          "tokenizer.", "Use a draft of the target's family.")  # fmt: skip
        if target.vocab_size > draft.vocab_size:
            return failed("tokenizers", f"{draft.name} knows {draft.vocab_size} tokens, "
                          f"{target.name} writes {target.vocab_size}.",
                          "Use a draft with a row for every token.")  # fmt: skip
        return ok("tokenizers", f"{draft.name} and {target.name} share a tokenizer.",
                  digest=target.tokenizer_digest)  # fmt: skip

    def times_here(self, tick: Callable[[], None], repeats: int = REPEATS) -> Device:
        """c and t(n) in this process, where there is one core: two models take turns on it."""
        context = list(range(CONTEXT))
        runs = {n: TargetPass(self.target, context, context[:n]).run for n in PASS_SIZES}
        times = alternate([DraftStep(self.draft, context).run, *runs.values()], repeats, tick)
        tick()  # for the round that warms up
        step_ms, *passes_ms = (sorted(samples)[len(samples) // 2] for samples in times)
        points = rising(dict(zip(PASS_SIZES, passes_ms, strict=True)))
        return Device(step_ms, points[0][1], step_slowdown=2.0, pass_slowdown=2.0, passes=points)

    def hits(
        self,
        tick: Callable[[], None],
        prompts: Sequence[str] = PROMPTS,
        num_tokens: int = ANSWER_TOKENS,
    ) -> list[Hits]:
        """For each token of the target's greedy answers, whether the draft writes the same, given
        the text so far."""
        found = []
        for prompt in prompts:
            if self.stopping.is_set():
                break
            found.append(self._hits(prompt, num_tokens))
            tick()
        return [hits for hits in found if len(hits) > 1]

    def _hits(self, prompt: str, num_tokens: int) -> Hits:
        tokenizer = self.target.tokenizer
        ids = list(encode_prompt(tokenizer, prompt, raw=not tokenizer.chat_template))
        eos, hits = frozenset(self.target.eos_tokens), list[bool]()
        cache = self.draft.open(GREEDY)
        self.draft.prefill(cache, ids[:-1])
        for token in generate_alone(self.target, ids, GREEDY, num_tokens, eos):
            window = self.draft.draft(cache, ids[-1:], 1, frozenset(), self.stopping.is_set)
            if not window.tokens:  # interrupted
                break
            hits.append(window.tokens[0] == token)
            ids.append(token)
            self.draft.keep(cache, len(ids) - 1)
        self.draft.close(cache)
        return tuple(hits)


def costs_here(specs: Specs, device: Device, hits: Sequence[Hits]) -> PairCosts:
    """What was measured here."""
    num_tokens = sum(map(len, hits))
    return PairCosts(
        where="on this machine", target=specs.target, draft=specs.draft, device=device,
        acceptance=sum(map(sum, hits)) / max(num_tokens, 1), num_tokens=num_tokens,
        hits=tuple(hits),
    )  # fmt: skip


def has_two_cores() -> bool:
    return len(os.sched_getaffinity(0)) > 1
