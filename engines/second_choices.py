"""Second choices of a draft that has none: an oracle's, and a simulated one's.

Where the draft is right or wrong is decided elsewhere. Here: which rank the target's token has
among the draft's choices, and by what margin the first leads, drawn from what was recorded of a
real pair: Qwen2.5-Coder 0.5 B on answers of the 1.5 B, 2,000 tokens, 265 of them wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from decoding.uniforms import Purpose, uniform

OTHER = 2
"""Rank of a token that is neither choice."""
SECOND = 0.61
"""Share of the wrong tokens at which the target's is the second choice; recorded."""
MARGINS = (
    (.117, .392, .652, .885, .971, .995, .999, 1.0, 1.0, 1.0),
    (.019, .052, .085, .125, .182, .239, .334, .463, .598, .752),
    (.01, .023, .046, .064, .111, .209, .259, .363, .523, .774),
)  # fmt: skip
"""Of each rank, the quantiles 5 % … 95 %; recorded."""


@dataclass(frozen=True, slots=True)
class Choice:
    """At one token of an answer.

    Attributes:
        rank: of the answer's token in the draft's row: 0, 1, or `OTHER`.
        margin: p(first) − p(second) in [0, 1], at temperature 1.
    """

    rank: int
    margin: float

    @property
    def probs(self) -> tuple[float, float]:
        """Of first and second choice, where there are no others."""
        return (1.0 + self.margin) / 2.0, (1.0 - self.margin) / 2.0


def choice_at(right: bool, seed: int, position: int) -> Choice:
    """The choice at an absolute position, the same whenever it is asked for."""
    second = uniform(seed, position, Purpose.ACCEPT) < SECOND
    rank = 0 if right else 1 if second else OTHER
    margins = MARGINS[rank]
    drawn = uniform(seed, position, Purpose.RESIDUAL)
    return Choice(rank, margins[int(drawn * len(margins))])
