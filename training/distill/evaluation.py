"""How often a draft is right on the target's own answers, and how far it is off.

Teacher-forced: before every token of an answer the draft sees the answer so far. The target's
distribution p is known at its top K tokens, the draft's q is taken as a draft sends it: its own top
K, renormalised (docs/invariants.md, Sample from what is sent).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from decoding.acceptance import expected_accepted
from training.distill.answers import NUM_TOP
from training.distill.records import Record

Logits = Callable[[Record], Tensor]
"""A draft as evaluation sees it: float[A, H] logits before each answer token of a record."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one record; everything of length A, its answer tokens.

    Attributes:
        agrees: bool[A], the draft's most probable token is the target's.
        overlap: float32[A], 1 − TV(p, q) = Σ min(p, q) over the target's top K.
        divergence: float32[A], JSD(p ‖ q) in nats. What p holds outside its top K counts as mass
            where q has none, which can only make it larger.
    """

    agrees: Tensor
    overlap: Tensor
    divergence: Tensor


@dataclass(frozen=True, slots=True)
class DraftQuality:
    """Means over the tokens of a set of answers.

    Attributes:
        accepted: of the window sizes asked for, W → E[L_acc], drafted tokens accepted at
            temperature 0, windows in lockstep.
        accepted_sampled: the same at temperature 1: Σᵢ Πⱼ≤ᵢ overlapⱼ (docs/method.md, Credit) of
        the windows
            beginning at every W-th token.
    """

    num_answers: int
    num_tokens: int
    agreement: float
    overlap: float
    mean_jsd: float
    accepted: dict[int, float]
    accepted_sampled: dict[int, float]


def score(logits: Tensor, record: Record, vocab: Tensor, row_of_token: Tensor) -> Scores:
    """Compare one draft with one record.

    Args:
        logits: float[A, H]. vocab: int[H], token of each row. row_of_token: int64[V], the head's
            row of a token, −1 for none.
    """
    device = logits.device
    top_ids, p = record.top_ids.to(device).long(), record.top_probs.to(device).float()
    q = torch.zeros_like(logits, dtype=torch.float32)
    kept = logits.float().softmax(-1).topk(min(NUM_TOP, logits.shape[1]))
    q.scatter_(1, kept.indices, kept.values / kept.values.sum(1, keepdim=True))
    rows = row_of_token.to(device)[top_ids]
    q_at_p = q.gather(1, rows.clamp(min=0)) * (rows >= 0)
    middle = (p + q_at_p) / 2
    shared = torch.special.xlogy(p, p / middle) + torch.special.xlogy(q_at_p, q_at_p / middle)
    alone = (1 - p.sum(1)).clamp(min=0) + (1 - q_at_p.sum(1)).clamp(min=0)
    divergence = 0.5 * (shared.nan_to_num().sum(1) + math.log(2) * alone)
    agrees = vocab.to(device)[kept.indices[:, 0]] == top_ids[:, 0]
    return Scores(agrees.cpu(), torch.minimum(p, q_at_p).sum(1).cpu(), divergence.cpu())


@torch.inference_mode()
def evaluate(
    draft: Logits,
    vocab: Tensor,
    row_of_token: Tensor,
    records: Sequence[Record],
    windows: Sequence[int] = (4,),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, DraftQuality]:
    """Prompt set → quality, by name; under "all" the quality on every record."""
    scored = []
    for record in records:
        scored.append((record.prompt_set, score(draft(record), record, vocab, row_of_token)))
        tick()
    scored.sort(key=lambda pair: pair[0])
    found = {
        name: summarise([scores for _, scores in group], windows)
        for name, group in groupby(scored, key=lambda pair: pair[0])
    }
    return found | {"all": summarise([scores for _, scores in scored], windows)}


def summarise(scored: Sequence[Scores], windows: Sequence[int]) -> DraftQuality:
    """Means over all tokens of all answers."""
    agrees = torch.cat([scores.agrees for scores in scored]).float()
    return DraftQuality(
        num_answers=len(scored),
        num_tokens=agrees.numel(),
        agreement=float(agrees.mean()),
        overlap=float(torch.cat([scores.overlap for scores in scored]).mean()),
        mean_jsd=float(torch.cat([scores.divergence for scores in scored]).mean()),
        accepted={w: accepted_per_window([s.agrees.tolist() for s in scored], w) for w in windows},
        accepted_sampled={
            w: _expected_per_window([s.overlap.tolist() for s in scored], w) for w in windows
        },
    )


def accepted_per_window(answers: Sequence[Sequence[bool]], window: int) -> float:
    """E[L_acc] of lockstep at temperature 0, replayed: a window stands up to its first wrong
    token, the target adds one token, and the next window begins behind that. A window that would
    reach beyond the answer's end is left out."""
    accepted = num_windows = 0
    for agrees in answers:
        begin = 0
        while begin + window <= len(agrees):
            part = agrees[begin : begin + window]
            stand = part.index(False) if False in part else window
            accepted, num_windows, begin = accepted + stand, num_windows + 1, begin + stand + 1
    return accepted / num_windows if num_windows else 0.0


def _expected_per_window(answers: Sequence[list[float]], window: int) -> float:
    lengths = [
        expected_accepted(overlaps[begin : begin + window])
        for overlaps in answers
        for begin in range(0, len(overlaps) - window + 1, window)
    ]
    return sum(lengths) / len(lengths) if lengths else 0.0
