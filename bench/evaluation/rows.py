"""What is kept of each answer: one JSON object a line."""

from __future__ import annotations

import msgspec

from bench.paced import AS_IT_IS
from bus.store import TimelineEntry, Usage, WindowEntry
from engines.padding import Tally


class AnswerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, answered by one method in one setting, measured.

    Attributes:
        method: as it was asked for. ran: as it ran, with the window that a sweep found.
        dataset, prompt_id: which question. rtt_ms, draft, variant, device: which setting.
        dtype: number format of the models.
        clients: prompts answered at once. batch: names those that were. batch_seconds: from the
            first of them submitted to the last one's end.
        tokens, seconds: of the whole answer, from its submission to its last piece, as its reader
            saw them.
        decode_tokens, decode_seconds: those after the first target pass, in which the prompt and
            all that was drafted meanwhile is run. tokens_per_s: the ratio of the two.
        first_token_ms: from submission to the first piece. gap_p50_ms, gap_p95_ms: between pieces.
        usage: as the edge counted, or the server of co-located SD; None for the target alone.
        right: whether the answer is; None where that is not known.
        nats_per_token: mean ln p₁ of the answer's tokens under the target, each given those before
            it. agreement: share of them that are the target's first choice. regret: mean
            ln p₁(first choice) − ln p₁(token).
        energy_j: of the whole answer, edge and cloud; energy_source says whether it is measured or
            modelled (`bench.energy`).
    """

    method: str
    ran: str
    dataset: str
    prompt_id: int
    rtt_ms: float
    draft: str
    variant: str
    clients: int
    tokens: int
    seconds: float
    batch_seconds: float
    decode_tokens: int
    decode_seconds: float
    tokens_per_s: float
    first_token_ms: float
    gap_p50_ms: float
    gap_p95_ms: float
    usage: Usage | None
    right: bool | None
    nats_per_token: float
    agreement: float
    regret: float
    energy_j: float
    energy_source: str
    text: str
    token_ids: tuple[int, ...]
    device: str
    dtype: str = "float32"
    batch: str = ""
    source: str = "measured"

    @property
    def key(self) -> Key:
        return Key(
            self.method, self.dataset, self.prompt_id, self.rtt_ms, self.draft, self.variant,
            self.device,
        )  # fmt: skip


class Key(msgspec.Struct, frozen=True):
    """Which answer: no cell is measured twice."""

    method: str
    dataset: str
    prompt_id: int
    rtt_ms: float
    draft: str
    variant: str
    device: str = AS_IT_IS


class WindowRow(msgspec.Struct, frozen=True, kw_only=True):
    """The windows of one answer, in the order of their feedback, and its timeline if kept."""

    key: Key
    windows: tuple[WindowEntry, ...]
    expected: tuple[float, ...]
    """E[L_acc] ÷ W of the windows that the controller heard of."""
    timeline: TimelineEntry | None = None


class SweepRow(msgspec.Struct, frozen=True, kw_only=True):
    """The best static window of a method in a setting, and the tokens a second of those tried."""

    method: str
    rtt_ms: float
    draft: str
    variant: str
    best: int
    tried: dict[int, float]
    device: str = AS_IT_IS


class PaddingRow(msgspec.Struct, frozen=True, kw_only=True):
    """Padded steps and passes of one method in answers of one batch."""

    method: str
    rtt_ms: float
    draft: str
    variant: str
    device: str
    steps: Tally
    passes: Tally
