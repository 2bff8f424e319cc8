"""Draft and target side by side over a spliced text: what each window would have shown.

The text is the target's own: each prompt's greedy answer, given all that stands before it. Both
models read it (teacher-forced), through the very code that drafts and verifies, so that the
distributions are real and the text is the same whatever a threshold would have let through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.reference import generate_alone
from bench.splice.prompts import Spliced
from decoding.acceptance import expected_accepted, jensen_shannon, overlap
from decoding.sampling import SamplingParams, SparseDistribution, from_wire
from engines.chat import encode_prompt
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

WINDOW = 4
GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class Token:
    """What the draft would have written at one position.

    Attributes:
        overlap: 1 − TV(p₁, q₁). divergence: JSD(p₁ ‖ q₁) in nats.
        regret: ln p₁(target's first choice) − ln p₁(draft's), in nats; 0 where they agree.
    """

    overlap: float
    divergence: float
    regret: float


@dataclass(frozen=True, slots=True)
class Window:
    """`WINDOW` positions, or what was left. `part`: which of the text's prompts they answer."""

    part: int
    tokens: tuple[Token, ...]

    @property
    def expected_accepted(self) -> float:
        """E[L_acc]."""
        return expected_accepted([token.overlap for token in self.tokens])


def windows_of(
    target: TargetModel, draft: ModelDrafter, text: Spliced, max_new_tokens: int
) -> list[Window]:
    """The windows of the answers, in order."""
    tokens: list[int] = []
    found: list[Window] = []
    for part, (_, prompt) in enumerate(text):
        tokens += encode_prompt(target.tokenizer, prompt, raw=False)
        answer = list(generate_alone(target, tokens, GREEDY, max_new_tokens, target.eos_tokens))
        judged = _judged(target, draft, tokens, answer)
        found += [
            Window(part, tuple(judged[at : at + WINDOW])) for at in range(0, len(judged), WINDOW)
        ]
        tokens += answer
    return found


def _judged(
    target: TargetModel, draft: ModelDrafter, before: Sequence[int], answer: Sequence[int]
) -> list[Token]:
    """Each position of the answer."""
    proposals = _proposals(draft, before, answer)
    cache = target.open(GREEDY)
    target.prefill(cache, before[:-1])
    text = [before[-1], *answer[:-1]]
    found = []
    for at in range(0, len(answer), WINDOW):
        own = proposals[at : at + WINDOW]
        rows, _ = target.forward(cache, text[at : at + WINDOW], [q.ids for q in own])
        for q1, row in zip(own, rows, strict=True):
            first = float(row.p1_at_q[0])
            agrees = int(q1.ids[0]) == row.argmax
            regret = 0.0 if agrees else math.log(row.p1_max) - math.log(max(first, 1e-300))
            found.append(
                Token(overlap(row.p1_at_q, q1.probs), jensen_shannon(row.p1_at_q, q1.probs), regret)
            )
    return found


def _proposals(
    draft: ModelDrafter, before: Sequence[int], answer: Sequence[int]
) -> list[SparseDistribution]:
    """q₁ at each position of the answer, most probable token first."""
    cache = draft.open(GREEDY)
    draft.prefill(cache, before[:-1])
    found = []
    for token in [before[-1], *answer[:-1]]:
        length = cache.length
        window = draft.draft(cache, [token], 1, frozenset(), stop=lambda: False)
        found.append(from_wire(window.q_ids[0], np.asarray(window.q_probs[0])))
        draft.keep(cache, length + 1)
    return found
