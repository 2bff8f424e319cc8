"""How far int8 is from float32 of the same weights, at every token of given answers.

Both read the same text in one pass (teacher-forced). At each position of an answer

    KL(p ‖ q) = Σ_v p_v (ln p_v − ln q_v)      p: float32, q: int8, over the rows of the head

in nats; whether both have the same first choice; and |ln q_t − ln p_t| of the answer's token t,
where the head has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench.int8.answers import TargetAnswer
from bench.int8.reference import Reference, float_draft, float_model
from bus.protocol.arrays import Float64Array, Int32Array
from bus.protocol.errors import ConfigurationError
from engines.catalog.registry import Specs
from engines.torch.cache import KVCache
from engines.torch.draft import DraftNetwork, WholeDraft, load_draft
from engines.torch.linears import integer
from engines.torch.loading import load_model
from engines.torch.network import CausalNetwork

ALL = "all"
_CHUNK = 16  # positions whose float64 logits are held at a time


@dataclass(frozen=True, slots=True)
class FormatQuality:
    """Of one model over the answers to one set of prompts.

    Attributes:
        role: `target` or `draft`. prompt_set: its name, or "all".
        num_tokens: positions compared.
        mean_kl, median_kl, p99_kl: KL(float32 ‖ int8) in nats.
        same_first: share of positions at which both have the same most likely token.
        mean_shift: of |Δ ln p| of the answer's tokens that the head has; None where it has none.
    """

    role: str
    prompt_set: str
    num_tokens: int
    mean_kl: float
    median_kl: float
    p99_kl: float
    same_first: float
    mean_shift: float | None


@dataclass(slots=True)
class Positions:
    """What was found at each position: KL in nats, same first choice, |Δ ln p| or NaN."""

    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    shift: list[float] = field(default_factory=list)

    def add(self, plain: Tensor, rounded: Tensor, rows: Sequence[int | None]) -> None:
        """Compare float[n, H] logits of float32 and int8.

        Args:
            rows: n head rows of the answer's tokens, None for one that the head lacks.
        """
        p, q = (x.double().log_softmax(dim=-1) for x in (plain, rounded))
        self.kl += (p.exp() * (p - q)).sum(-1).tolist()
        self.same += (plain.argmax(-1) == rounded.argmax(-1)).tolist()
        for index, row in enumerate(rows):
            difference = float("nan") if row is None else abs(float(q[index, row] - p[index, row]))
            self.shift.append(difference)

    def summary(self, role: str, prompt_set: str) -> FormatQuality:
        """Raises ConfigurationError where nothing was compared."""
        if not self.kl:
            raise ConfigurationError(
                f"no answer of {prompt_set!r} to compare; expected prompts that fit the context"
            )
        kl: Float64Array = np.array(self.kl)
        shift = [value for value in self.shift if not math.isnan(value)]
        return FormatQuality(
            role, prompt_set, len(self.kl), float(kl.mean()), float(np.median(kl)),
            float(np.quantile(kl, 0.99)), float(np.mean(self.same)),
            float(np.mean(shift)) if shift else None,
        )  # fmt: skip


def compare(
    specs: Specs, answers: Sequence[TargetAnswer], begin: Callable[[str, int], Callable[[], None]]
) -> list[FormatQuality]:
    """Target, then draft: over all answers, then by set.

    Args:
        begin: is passed what begins and its number of steps, and returns what to call after each.

    Raises:
        ModelError, ConfigurationError: a model cannot be read or loaded.
    """
    found = []
    for role, spec in zip(("target", "draft"), specs, strict=True):
        model = float_model(spec) if role == "target" else float_draft(spec)
        layers = begin(f"{role}: float32", model.config.num_hidden_layers)
        states = _answer_states(model, answers, layers)
        head = model.head()  # before the int8 model is there: reading it takes the most memory
        del model
        network = int8_target(spec) if role == "target" else load_draft(spec, "int8").network
        texts = begin(f"{role}: int8", len(answers))
        found += _summaries(role, against(network, states, head, answers, texts), answers)
        del network, head
    return found


def int8_target(spec: str) -> DraftNetwork:
    """A target in int8, as a network with the size of its head."""
    loaded = load_model(spec, "int8")
    network = CausalNetwork(loaded.model, loaded.vocab_size, integer)
    return WholeDraft(network, loaded.vocab_size)


@torch.inference_mode()
def against(
    network: DraftNetwork,
    states: Sequence[Tensor],
    head: Tensor,
    answers: Sequence[TargetAnswer],
    tick: Callable[[], None] = lambda: None,
) -> list[Positions]:
    """Compare an int8 network with a reference, answer by answer.

    Args:
        states: float32[answer, hidden] of the reference at each answer's positions.
        head: float32[rows, hidden] of the reference, all rows or those of the network's head.
    """
    head = _head_rows(head, network)
    compared = []
    for answer, hidden in zip(answers, states, strict=True):
        positions = Positions()
        rounded = network.logits(_fed(answer), KVCache(), len(answer.answer))
        rows = head_rows(answer.answer, network.vocab, network.head_size)
        for at in range(0, len(rows), _CHUNK):
            part = slice(at, at + _CHUNK)
            positions.add(hidden[part] @ head.T, rounded[part], rows[part])
        compared.append(positions)
        tick()
    return compared


def head_rows(tokens: Sequence[int], vocab: Int32Array | None, head_size: int) -> list[int | None]:
    """Each token's row in a head of the rising tokens `vocab`, or of the first `head_size`."""
    if vocab is None:
        return [token if token < head_size else None for token in tokens]
    known = {int(token): row for row, token in enumerate(vocab)}
    return [known.get(token) for token in tokens]


def _head_rows(head: Tensor, network: DraftNetwork) -> Tensor:
    if network.vocab is None or head.shape[0] == network.head_size:
        return head[: network.head_size]
    return head[torch.from_numpy(network.vocab).long()]


def _fed(answer: TargetAnswer) -> Tensor:
    """int64[n], what is read: all but the last token, whose successor is not compared."""
    return torch.tensor([*answer.prompt, *answer.answer[:-1]])


def _answer_states(
    model: Reference, answers: Sequence[TargetAnswer], tick: Callable[[], None]
) -> list[Tensor]:
    states = model.hidden_states([_fed(answer) for answer in answers], tick)
    return [
        rows[-len(answer.answer) :].clone() for rows, answer in zip(states, answers, strict=True)
    ]


def _summaries(
    role: str, compared: Sequence[Positions], answers: Sequence[TargetAnswer]
) -> list[FormatQuality]:
    pooled: dict[str, Positions] = {ALL: Positions()}
    for positions, answer in zip(compared, answers, strict=True):
        for name in (ALL, answer.dataset):
            into = pooled.setdefault(name, Positions())
            into.kl += positions.kl
            into.same += positions.same
            into.shift += positions.shift
    return [positions.summary(role, name) for name, positions in pooled.items()]
