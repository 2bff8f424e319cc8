"""What is measured, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

from bench.paced import NONE
from bench.prompts import PROMPTS
from bench.turns import in_turn

SWEEP_PROMPTS = 10
MAX_NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Setting:
    """One draft over one link.

    Attributes:
        draft: its spec, as `engines.torch.draft.load_draft` takes it.
        error_rate: of an oracle on top of it; None is the draft itself.
        rtt_ms: round trip of the link.
    """

    draft: str
    error_rate: float | None
    rtt_ms: float

    def __str__(self) -> str:
        oracle = "" if self.error_rate is None else f" as oracle, {self.error_rate:.0%} wrong"
        return f"{self.draft}{oracle}, {self.rtt_ms:g} ms"


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run.

    Attributes:
        drafts: specs; oracles take the time of the first one's steps.
        error_rates: of the oracles; None among them stands for the drafts themselves.
        prompts: how many of `bench.prompts`.
        repeats: how often each method answers all prompts.
        dtype: number format of all models.
        device: whose times steps and passes take: one name of `bench.paced.split_paced`.
        methods: measured against `sd` with its best window, which is always there.
    """

    rtts_ms: tuple[float, ...] = (0.0, 10.0, 40.0, 80.0, 160.0)
    error_rates: tuple[float | None, ...] = (None, 0.05, 0.1, 0.2, 0.4)
    prompts: int = len(PROMPTS)
    max_new_tokens: int = MAX_NEW_TOKENS
    repeats: int = 5
    methods: tuple[str, ...] = ("plc",)
    target: str = "default"
    drafts: tuple[str, ...] = ("default",)
    dtype: str = "auto"
    device: str = NONE

    @property
    def settings(self) -> tuple[Setting, ...]:
        return tuple(
            Setting(draft, error, rtt)
            for error in self.error_rates
            for draft in (self.drafts if error is None else self.drafts[:1])
            for rtt in self.rtts_ms
        )

    def seed(self, prompt_id: int, repeat: int) -> int:
        """The request's seed: it decides where an oracle errs, so each repetition draws anew."""
        return 1_000 * (repeat + 1) + prompt_id

    def turns(self, repeat: int, prompt_id: int, sd: str) -> tuple[str, ...]:
        """The methods in the order in which they answer this prompt; who begins changes."""
        return in_turn((sd, *self.methods), repeat + prompt_id)
