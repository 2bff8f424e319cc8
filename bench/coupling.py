"""`e2sci bench coupling`: how often a draft's token is the target's own, with either coupling.

Teacher-forced: the target answers by itself at each temperature, token by token with its seed, and
before each token of the answer the draft proposes, its row cut to what an edge sends. Of each
position are known

- `gumbel`: whether the draft's choice is the target's (docs/method.md, Coupling),
- `residual`: 1 − TV(p, q), the chance that rejection sampling accepts,
- the bound (1 − TV) ÷ (1 + TV), below which the share of the first cannot lie in expectation,

p and q after temperature, top-k and top-p.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.exactness.answers import Asked, Tokens
from bench.exactness.design import TEMPERATURES, sampling_at
from bench.progress import counting_bar
from bench.reference import generate_alone, replay_logits
from bus.protocol.arrays import Float64Array
from decoding.acceptance import overlap
from decoding.sampling import SamplingParams, from_wire, warp, warp_dense
from engines.chat import encode_prompt
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Position:
    """One token of an answer. `overlap` is 1 − TV(p, q)."""

    agrees: bool
    overlap: float

    @property
    def bound(self) -> float:
        """(1 − TV) ÷ (1 + TV), in expectation over seeds."""
        return self.overlap / (2.0 - self.overlap)


@dataclass(frozen=True, slots=True)
class CouplingFigures:
    """Means over all positions of all answers at one temperature.

    Attributes:
        gumbel: share of positions at which both choose the same token; error: its standard error.
        residual: mean 1 − TV. bound: mean (1 − TV) ÷ (1 + TV).
    """

    temperature: float
    top_p: float
    num_answers: int
    num_tokens: int
    gumbel: float
    error: float
    residual: float
    bound: float


def run(asked: Asked, as_json: bool) -> list[CouplingFigures]:
    """Measure and print: a table for people, one JSON object a temperature for programs.

    Raises:
        ModelError: a model cannot be loaded.
    """
    target = TargetModel.load(asked.target, asked.dtype)
    draft = ModelDrafter.load(asked.draft, asked.dtype)
    with counting_bar() as progress:
        task = progress.add_task("answers", total=len(TEMPERATURES) * len(asked.prompts))
        tick = lambda: progress.advance(task)  # noqa: E731 - a name for one argument
        figures = [
            measure(target, draft, asked, sampling_at(temperature), tick)
            for temperature in TEMPERATURES
        ]
    if as_json:
        for row in figures:
            models = {"target": asked.target, "draft": asked.draft, "dtype": asked.dtype}
            print(json.dumps(models | asdict(row) | {"source": "measured"}))
    else:
        _print(figures, asked)
    return figures


def measure(
    target: TargetModel, draft: ModelDrafter, asked: Asked, sampling: SamplingParams,
    tick: Tick = lambda: None,
) -> CouplingFigures:  # fmt: skip
    """Both couplings on the target's own answers to some prompts."""
    found: list[Position] = []
    for text in asked.prompts:
        prompt = encode_prompt(target.tokenizer, text, raw=False)
        answer = tuple(
            generate_alone(target, prompt, sampling, asked.max_new_tokens, target.eos_tokens)
        )
        found += positions(target, draft, prompt, answer, sampling)
        tick()
    return summarise(found, len(asked.prompts), sampling)


def positions(
    target: TargetModel, draft: ModelDrafter, prompt: Tokens, answer: Tokens,
    sampling: SamplingParams,
) -> list[Position]:  # fmt: skip
    """One for each token of an answer that the target wrote by itself."""
    cache = draft.open(sampling, prompt)
    found, feed = [], prompt
    for logits, token in zip(replay_logits(target, prompt, answer), answer, strict=True):
        drafted = draft.draft(cache, feed, 1, frozenset(), stop=lambda: False)
        p = _distribution(logits, sampling)
        q = warp(from_wire(drafted.q_ids[0], drafted.q_probs[0]), sampling)
        found.append(Position(drafted.tokens[0] == token, overlap(p[q.ids], q.probs)))
        feed = (token,)
    return found


def _distribution(logits: Float64Array, sampling: SamplingParams) -> Float64Array:
    """float64[V]; one-hot at temperature 0."""
    if not sampling.greedy:
        return warp_dense(logits, sampling)
    probs = np.zeros(logits.size)
    probs[int(np.argmax(logits))] = 1.0
    return probs


def summarise(
    found: Sequence[Position], num_answers: int, sampling: SamplingParams
) -> CouplingFigures:
    """Means over positions, of which there is at least one."""
    gumbel = float(np.mean([position.agrees for position in found]))
    return CouplingFigures(
        sampling.temperature, sampling.top_p, num_answers, len(found),
        gumbel, (gumbel * (1.0 - gumbel) / len(found)) ** 0.5,
        float(np.mean([position.overlap for position in found])),
        float(np.mean([position.bound for position in found])),
    )  # fmt: skip


def _print(figures: Sequence[CouplingFigures], asked: Asked) -> None:
    table = Table(
        title=f"{asked.target} ← {asked.draft}, {asked.dtype}, {figures[0].num_answers} prompts "
        "(measured)"
    )
    for heading in ("temperature", "top-p", "tokens", "gumbel", "at least", "residual (1 − TV)"):
        table.add_column(heading, justify="right")
    for row in figures:
        table.add_row(
            f"{row.temperature:g}", f"{row.top_p:g}", str(row.num_tokens),
            f"{row.gumbel:.3f} ± {row.error:.3f}", f"{row.bound:.3f}", f"{row.residual:.3f}",
        )  # fmt: skip
    Console().print(table)
