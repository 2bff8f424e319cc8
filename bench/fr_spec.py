"""`e2sci bench fr-spec`: what a draft's head of the most frequent tokens saves, and what it costs.

One draft in int8, its layers shared by all heads. *Agreement* is measured on the target's own
greedy answers, recorded once: the draft's token after each prefix of an answer against the next
token of the answer; *acceptance* by replaying windows of them in lockstep. *Steps* are timed on one
core after `CONTEXT` tokens, the heads interleaved, the parts of a step by the clock around each.
Nothing here is padded, paced or predicted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.progress import counting_bar
from bench.recorded import Tick, recorded_answers
from bench.steps import STEPS, timed, window_ms
from bus.protocol.arrays import Float16Array, Int32Array
from engines.torch.cache import KVCache
from engines.torch.draft import TrimmedDraft, described
from engines.torch.drafter import DraftCache, ModelDrafter
from engines.torch.heads import WideDraft, load_wide
from engines.torch.integer import IntegerProduct
from engines.torch.oracle import RecordedAnswer
from engines.torch.parts import Part, wanted_rows
from training.distill.evaluation import accepted_per_window

FULL = "full"
OWN = "own"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        sizes: of heads, beside the full one and the draft's own; those the vocabulary does not
            reach are left out.
        window: W, in which tokens are replayed as accepted or not.
        repeats: timings of each head, of `STEPS` steps each.
        answers: file of recorded answers: what is missing there is written, an answer at a time.
    """

    target: str
    draft: str
    sizes: tuple[int, ...]
    prompts: tuple[str, ...]
    max_new_tokens: int
    window: int
    repeats: int
    answers: Path | None = None


@dataclass(frozen=True, slots=True)
class HeadFigures:
    """One head.

    Attributes:
        head: `full`, `own` (the one the draft is used with), or its size as asked for.
        head_bytes: of its weights.
        num_tokens: of the answers. covered: share of them that the head can write.
        agreement: share of the answers' tokens that the draft writes, given those before; error:
            one standard error.
        acceptance: accepted ÷ drafted tokens of windows in lockstep.
        step_ms: of one draft step, median; head_ms: of that the product of the hidden state with
            the head; choosing_ms: softmax and choice over its logits.
        accepted_per_ms: drafted tokens accepted per millisecond of drafting.
    """

    head: str
    head_size: int
    head_bytes: int
    num_tokens: int
    covered: float
    agreement: float
    error: float
    acceptance: float
    step_ms: float
    head_ms: float
    choosing_ms: float
    accepted_per_ms: float

    @property
    def head_share(self) -> float:
        """Of the step."""
        return self.head_ms / self.step_ms

    @property
    def choosing_share(self) -> float:
        """Of the step."""
        return self.choosing_ms / self.step_ms


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians, as in `HeadFigures`."""

    step_ms: float
    head_ms: float
    choosing_ms: float


class TimedHead:
    """A head's product that adds up the time it takes, in `ms`."""

    def __init__(self, product: IntegerProduct) -> None:
        self._product = product
        self.num_bytes = product.num_bytes
        self.ms = 0.0

    def __call__(self, rows: Tensor, /) -> Tensor:
        began = time.perf_counter()
        logits = self._product(rows)
        self.ms += 1e3 * (time.perf_counter() - began)
        return logits


class HeadedDraft(ModelDrafter):
    """A draft with one of its heads, which adds up the time of a step's parts."""

    def __init__(self, name: str, wide: WideDraft, vocab: Int32Array) -> None:
        self.head = TimedHead(wide.head(vocab))
        network = TrimmedDraft(wide.body, self.head, vocab)
        super().__init__(described(wide.loaded, network))
        self.head_name = name
        self.vocab = vocab
        self.choosing_ms = 0.0

    def choice(self, logits: Tensor) -> int:
        """The token that a step drafts at temperature 0, from float[H]."""
        return int(self._top_probabilities(logits)[0][0])

    def timed_window(self, cache: DraftCache) -> StepTimes:
        """Draft `STEPS` tokens after `CONTEXT` and forget them; of one step."""
        self.head.ms = self.choosing_ms = 0.0
        step_ms = window_ms(self, cache)
        return StepTimes(step_ms, self.head.ms / STEPS, self.choosing_ms / STEPS)

    def _proposal(
        self, logits: Tensor, cache: DraftCache, position: int
    ) -> tuple[Int32Array, Float16Array]:
        began = time.perf_counter()
        row = super()._proposal(logits, cache, position)
        self.choosing_ms += 1e3 * (time.perf_counter() - began)
        return row


def run(plan: Plan, as_json: bool) -> list[HeadFigures]:
    """Measure and print: a table for people, one JSON object a head for programs.

    Raises:
        ModelError: a model cannot be loaded, or no ranking has tokens enough.
        ConfigurationError: the file of answers cannot be read.
    """
    wide = load_wide(plan.draft)
    drafts = with_heads(wide, plan.sizes)  # what cannot be had is refused before anything is run
    with counting_bar() as progress:
        task = progress.add_task("the target's answers", total=len(plan.prompts))
        answers = recorded_answers(
            plan.target, plan.prompts, plan.max_new_tokens, plan.answers,
            lambda: progress.advance(task),
        )  # fmt: skip
        progress.reset(task, total=len(answers), description="agreement")
        agrees = agreements(wide, drafts, answers, lambda: progress.advance(task))
        progress.reset(task, total=plan.repeats, description="steps")
        times = step_times(drafts, plan.repeats, lambda: progress.advance(task))
    figures = [
        _figures(draft, answers, found, step, plan.window)
        for draft, found, step in zip(drafts, agrees, times, strict=True)
    ]
    if as_json:
        models = {"target": plan.target, "draft": plan.draft, "dtype": "int8"}
        for row in figures:
            shares = {"head_share": row.head_share, "choosing_share": row.choosing_share}
            line = models | asdict(row) | shares | {"window": plan.window, "source": "measured"}
            print(json.dumps(line))
    else:
        _print(figures, plan)
    return figures


def with_heads(wide: WideDraft, sizes: Sequence[int]) -> list[HeadedDraft]:
    """The draft with its widest head, with those of `sizes` tokens that are narrower, and with its
    own where that is none of them.

    Raises:
        ModelError: no ranking has tokens enough.
    """
    heads = {FULL: wide.widest}
    heads |= {str(size): wide.ranked(size) for size in sizes if size < len(wide.widest)}
    if not any(np.array_equal(wide.own, vocab) for vocab in heads.values()):
        heads[OWN] = wide.own
    return [HeadedDraft(name, wide, vocab) for name, vocab in heads.items()]


@torch.inference_mode()
def agreements(
    wide: WideDraft,
    drafts: Sequence[HeadedDraft],
    answers: Sequence[RecordedAnswer],
    tick: Tick = lambda: None,
) -> list[list[list[bool]]]:
    """For each head, of each answer, whether the draft writes each of its tokens, given those
    before. The layers run once for all heads."""
    found: list[list[list[bool]]] = [[] for _ in drafts]
    for recorded in answers:
        text = (*recorded.prompt, *recorded.answer)[:-1]
        part = Part.of(text, KVCache(), len(recorded.answer))
        states = wide.body.forward([part])[wanted_rows([part])]
        for draft, kept in zip(drafts, found, strict=True):
            rows = zip(draft.head(states), recorded.answer, strict=True)
            kept.append([draft.choice(logits) == token for logits, token in rows])
        tick()
    return found


def step_times(
    drafts: Sequence[HeadedDraft], repeats: int, tick: Tick = lambda: None
) -> list[StepTimes]:
    """Of one step of each, on one core: medians over `repeats` timings, interleaved."""
    samples = timed(drafts, repeats, HeadedDraft.timed_window, tick)
    return [_medians(kept) for kept in samples]


def _medians(samples: Sequence[StepTimes]) -> StepTimes:
    return StepTimes(
        statistics.median(sample.step_ms for sample in samples),
        statistics.median(sample.head_ms for sample in samples),
        statistics.median(sample.choosing_ms for sample in samples),
    )


def _figures(
    draft: HeadedDraft,
    answers: Sequence[RecordedAnswer],
    agrees: list[list[bool]],
    times: StepTimes,
    window: int,
) -> HeadFigures:
    tokens = np.array([token for recorded in answers for token in recorded.answer])
    agreement = float(np.mean([right for answer in agrees for right in answer]))
    acceptance = accepted_per_window(agrees, window) / window
    return HeadFigures(
        head=draft.head_name,
        head_size=len(draft.vocab),
        head_bytes=draft.head.num_bytes,
        num_tokens=len(tokens),
        covered=float(np.isin(tokens, draft.vocab).mean()),
        agreement=agreement,
        error=(agreement * (1.0 - agreement) / len(tokens)) ** 0.5,
        acceptance=acceptance,
        step_ms=times.step_ms,
        head_ms=times.head_ms,
        choosing_ms=times.choosing_ms,
        accepted_per_ms=acceptance / times.step_ms,
    )


def _print(figures: Sequence[HeadFigures], plan: Plan) -> None:
    full = figures[0]
    table = Table(
        title=f"{plan.target} ← {plan.draft}, int8, one core, {full.num_tokens} answer tokens "
        "(measured)"
    )
    headings = (
        "head", "tokens", "MB", "covers", "agreement", f"acceptance, W = {plan.window}", "step ms",
        "head ms", "softmax ms", "accepted/ms", "÷ full",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in figures:
        table.add_row(
            row.head, str(row.head_size), f"{row.head_bytes / 1e6:.1f}", f"{row.covered:.1%}",
            f"{row.agreement:.3f} ± {row.error:.3f}", f"{row.acceptance:.3f}",
            f"{row.step_ms:.2f}", f"{row.head_ms:.2f} ({row.head_share:.0%})",
            f"{row.choosing_ms:.2f} ({row.choosing_share:.0%})", f"{row.accepted_per_ms:.4f}",
            f"{row.accepted_per_ms / full.accepted_per_ms:.2f}",
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
