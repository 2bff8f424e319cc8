"""Speculative decoding with both models in one process, in lockstep, greedy and exact.

The textbook loop: draft W tokens, judge them in one target pass, commit the accepted ones and the
target's own token after them. It knows no network: a window costs W draft steps and one pass, one
after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from bus.protocol.arrays import TOKEN_DTYPE
from decoding.engine import DraftedWindow, Drafter
from decoding.methods.base import Proposal
from decoding.methods.exact import ExactRule
from decoding.sampling import SamplingParams
from engines.thread import PREFILL_CHUNK
from engines.torch.target import TargetModel

_GREEDY = SamplingParams()
_NO_IDS = np.empty(0, dtype=TOKEN_DTYPE)
_RULE = ExactRule()


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that one target pass brings, and what was drafted for it."""

    tokens: tuple[int, ...]
    num_drafted: int = 0
    num_accepted: int = 0


def generate_colocated(
    target: TargetModel,
    draft: Drafter[Any],
    prompt: Sequence[int],
    window: int,
    max_new_tokens: int,
    eos: frozenset[int],
) -> Iterator[Piece]:
    """Yield the target's own greedy answer, a piece for each pass.

    The last token may be one of `eos`, which ends the answer.

    Args:
        prompt: token ids, at least one.
        window: tokens drafted before each pass (W), at least 1; fewer at the end of the answer.
    """
    tokens, end = list(prompt), len(prompt) + max_new_tokens
    judge, scout = target.open(_GREEDY), draft.open(_GREEDY, prompt)
    for begin in range(0, len(prompt) - 1, PREFILL_CHUNK):
        chunk = tokens[begin : min(begin + PREFILL_CHUNK, len(prompt) - 1)]
        target.prefill(judge, chunk)
        draft.prefill(scout, chunk)
    while len(tokens) < end:
        count = min(window, end - len(tokens) - 1)  # the target's own token follows them
        drafted = None
        if count:
            missing = tokens[draft.length(scout) :]
            drafted = draft.draft(scout, missing, count, eos, stop=lambda: False)
        proposed = () if drafted is None else drafted.tokens
        feed = [*tokens[judge.length :], *proposed]
        rows, _ = target.forward(judge, feed, [_NO_IDS] * (len(proposed) + 1))
        accepted = 0
        if drafted is not None:
            while accepted < len(proposed) and _RULE.accepts(
                _proposal(drafted, accepted), rows[accepted], _GREEDY, len(tokens) + accepted, 0.0
            ):
                accepted += 1
        committed = _until((*proposed[:accepted], rows[accepted].argmax), eos)
        target.keep(judge, len(tokens) + accepted)
        draft.keep(scout, min(draft.length(scout), len(tokens) + accepted))
        tokens += committed
        yield Piece(committed, len(proposed), accepted)
        if committed[-1] in eos:
            return


def _proposal(drafted: DraftedWindow, index: int) -> Proposal:
    return Proposal(drafted.tokens[index], drafted.q_ids[index], drafted.q_probs[index], _GREEDY)


def _until(tokens: tuple[int, ...], eos: frozenset[int]) -> tuple[int, ...]:
    """The tokens up to the first of `eos`, that one included."""
    at = next((index for index, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[: at + 1]
