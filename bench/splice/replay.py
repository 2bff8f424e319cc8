"""The control law over measured windows, and what its thresholds would have let through.

Replayed, not measured: each window is judged at the threshold that the windows before it gave; a
token is accepted where draft and target agree, or by the divergence rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.splice.measure import Token, Window
from decoding.credit import CreditLaw

AFTER = 8
"""Windows after a change in which an old threshold is looked for [ours]."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some windows of a text, under one law.

    Attributes:
        lenient: windows judged at a threshold above T_base. threshold: sum over windows, in nats.
        regret: nats of the tokens accepted by divergence alone. standing: tokens accepted.
        alarms: how often the memory was emptied.
    """

    windows: int = 0
    tokens: int = 0
    lenient: int = 0
    threshold: float = 0.0
    regret: float = 0.0
    standing: int = 0
    alarms: int = 0

    def __add__(self, other: Stretch) -> Stretch:
        return Stretch(
            self.windows + other.windows, self.tokens + other.tokens,
            self.lenient + other.lenient, self.threshold + other.threshold,
            self.regret + other.regret, self.standing + other.standing,
            self.alarms + other.alarms,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Replay:
    """One text under one law: windows right after a change from high credit, and all others."""

    changed: Stretch
    others: Stretch


def replay(windows: Sequence[Window], law: CreditLaw) -> Replay:
    """Let `law` follow the windows of a text, credit carried over from prompt to prompt.

    A change counts where credit was above neutral before it: elsewhere there is nothing to save.
    """
    state = law.initial()
    changed, others = Stretch(), Stretch()
    left, part = 0, 0
    for window in windows:
        if window.part != part:
            part, left = window.part, AFTER if law.excess_credit(state.history) > 0.0 else 0
        after = law.after(state, window.expected_accepted, len(window.tokens))
        seen = _judged(window.tokens, state.threshold, law.base)
        if state.history and not after.history:
            seen += Stretch(alarms=1)
        if left:
            changed, left = changed + seen, left - 1
        else:
            others += seen
        state = after
    return Replay(changed, others)


def _judged(tokens: Sequence[Token], threshold: float, base: float) -> Stretch:
    agreed = [token.regret == 0.0 for token in tokens]
    alike = [token.divergence <= threshold for token in tokens]
    return Stretch(
        windows=1,
        tokens=len(tokens),
        lenient=int(threshold > base),
        threshold=threshold,
        regret=sum(token.regret for token, near in zip(tokens, alike, strict=True) if near),
        standing=sum(same or near for same, near in zip(agreed, alike, strict=True)),
    )
