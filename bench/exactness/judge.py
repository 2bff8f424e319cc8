"""Are answers what they must be? Pure: what models say comes from `Evidence`.

The target alone is the reference, at each temperature with the same seed. What a difference may be
excused by depends on the number format:

- int8: nothing.
- float32: a first difference where the target's choice leads by less than 1e-3 (in logits at
  temperature 0, in log p + noise above), or where top-p's border lies within 1e-4 of a sum of
  probabilities: sums in another order.
- bfloat16, at temperature 0: ε = max |Δlogit| between windows and single tokens is measured on the
  answers, and every token must lie within 2ε of the maximum. Above: as in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from bench.exactness.answers import CellAnswers, Tokens
from bench.exactness.design import DesignCell
from decoding.common import common_length

EXCUSED_LEAD = 1e-3
EXCUSED_MARGIN = 1e-4


class Allowance(Enum):
    """What differences are excused."""

    NONE = "none"
    NEAR_TIES = "near-ties"
    EPSILON = "2ε"


def allowance_of(dtype: str) -> Allowance:
    """Of a number format by name; one that is not known here has no excuse."""
    known = {"float32": Allowance.NEAR_TIES, "bfloat16": Allowance.EPSILON}
    return known.get(dtype, Allowance.NONE)


class Evidence(Protocol):
    """What models say about an answer; `prompt` counts from 0."""

    def lead(self, prompt: int, tokens: Tokens, cell: DesignCell) -> float:
        """By how much the target's choice leads at the last of `tokens`."""
        ...

    def margin(self, prompt: int, tokens: Tokens, cell: DesignCell) -> float:
        """How near top-p's border is to a sum of probabilities at the last of `tokens`."""
        ...

    def epsilon(self, prompt: int, answer: Tokens) -> float:
        """max |Δlogit| between single tokens and windows, in logits."""
        ...

    def shortfall(self, prompt: int, answer: Tokens) -> float:
        """Farthest that a token's logit lies below the maximum."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an answer first parts from its reference.

    Attributes:
        prompt, position: from 0, the latter within the answer.
        expected, got: token ids; None where that answer has ended.
        lead: in logits, above temperature 0 in log p + noise; margin: of top-p's border, a
            probability. None where nobody asked.
    """

    prompt: int
    position: int
    expected: int | None
    got: int | None
    lead: float | None
    margin: float | None
    excused: bool


@dataclass(frozen=True, slots=True)
class CellResult:
    """Of one cell.

    Attributes:
        num_identical: answers with the reference's token ids.
        num_excused: of the others, those whose first difference is excused.
        difference: the first one that is not excused, else the first one.
        epsilon, worst_shortfall: in logits; None where no answer is replayed for them.
    """

    cell: DesignCell
    seconds: float
    num_prompts: int
    num_identical: int
    num_excused: int
    difference: Difference | None
    epsilon: float | None = None
    worst_shortfall: float | None = None

    @property
    def holds(self) -> bool:
        """Whether all answers are what they must be."""
        if self.epsilon is not None and self.worst_shortfall is not None:
            return self.worst_shortfall <= 2 * self.epsilon
        return self.num_identical + self.num_excused == self.num_prompts

    @property
    def identical(self) -> bool:
        return self.num_identical == self.num_prompts


def judge(
    measured: Sequence[CellAnswers], alone: Mapping[float, Sequence[Tokens]], allowance: Allowance,
    evidence: Evidence,
) -> list[CellResult]:  # fmt: skip
    """A result for each cell, in order.

    Args:
        alone: the target's own answers at each temperature.
    """
    return [_judge_cell(one, alone[one.cell.temperature], allowance, evidence) for one in measured]


def _judge_cell(
    one: CellAnswers, reference: Sequence[Tokens], allowance: Allowance, evidence: Evidence
) -> CellResult:
    pairs = list(enumerate(zip(reference, one.answers, strict=True)))
    differences = [
        _difference(prompt, expected, got, one.cell, allowance, evidence)
        for prompt, (expected, got) in pairs
        if expected != got
    ]
    by_excuse = sorted(differences, key=lambda difference: difference.excused)
    epsilon = shortfall = None
    if allowance is Allowance.EPSILON and one.cell.greedy:
        epsilon = max(evidence.epsilon(prompt, got) for prompt, (_, got) in pairs)
        shortfall = max(evidence.shortfall(prompt, got) for prompt, (_, got) in pairs)
    return CellResult(
        one.cell, one.seconds, len(pairs), len(pairs) - len(differences),
        sum(difference.excused for difference in differences),
        by_excuse[0] if by_excuse else None, epsilon, shortfall,
    )  # fmt: skip


def _difference(
    prompt: int, expected: Tokens, got: Tokens, cell: DesignCell, allowance: Allowance,
    evidence: Evidence,
) -> Difference:  # fmt: skip
    """Where two answers that differ part. A missing token is never excused."""
    at = common_length(expected, got)
    lead = margin = None
    if at < len(expected):
        tokens = expected[: at + 1]
        lead = evidence.lead(prompt, tokens, cell)
        if cell.sampling.top_p < 1.0:
            margin = evidence.margin(prompt, tokens, cell)
    both = at < min(len(expected), len(got))
    near = (lead is not None and lead < EXCUSED_LEAD) or (
        margin is not None and margin < EXCUSED_MARGIN
    )
    return Difference(
        prompt, at, _token(expected, at), _token(got, at), lead, margin,
        excused=both and near and allowance is not Allowance.NONE,
    )  # fmt: skip


def _token(tokens: Tokens, at: int) -> int | None:
    return tokens[at] if at < len(tokens) else None
