"""An oracle draft, to measure what a pace does at a given acceptance (`e2sci bench pace`).

It replays the target's own recorded answer by absolute position, wrong at positions drawn at a set
rate. The draft model behind it takes every step in full and only its word is replaced: a step
costs what a real one costs, and a message weighs as much. A wrong token is followed by right ones,
which fall with it. At temperature 0 it has second choices (`engines.second_choices`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
from torch import Tensor

from bus.protocol.arrays import Float16Array, Int32Array
from bus.protocol.errors import ConfigurationError, RequestError
from decoding.sampling import SamplingParams
from decoding.uniforms import Purpose, uniform
from engines.row import certain
from engines.second_choices import Choice, choice_at
from engines.torch.draft import LoadedDraft, load_draft
from engines.torch.drafter import DraftCache, ModelDrafter
from engines.torch.prefixes import Prefix

Tokens = tuple[int, ...]


class RecordedAnswer(msgspec.Struct, frozen=True):
    """One line of a file of answers: token ids of a prompt as it is run, and of what followed."""

    prompt: Tokens
    answer: Tokens


def write_answers(path: Path, answers: Sequence[RecordedAnswer]) -> None:
    """Write JSON Lines."""
    path.write_bytes(msgspec.json.Encoder().encode_lines(answers))


def read_answers(path: Path) -> dict[Tokens, Tokens]:
    """Prompt → answer.

    Raises:
        ConfigurationError: the file cannot be read or is none of answers.
    """
    try:
        found = msgspec.json.Decoder(RecordedAnswer).decode_lines(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path} is no file of recorded answers: {error}") from error
    return {recorded.prompt: recorded.answer for recorded in found}


@dataclass(slots=True)
class OracleCache(DraftCache):
    """A cache that knows the text that will stand behind the first `begin` tokens."""

    begin: int = 0
    answer: Tokens = ()


class OracleDraft(ModelDrafter):
    """A draft network whose proposals are replaced by recorded answers.

    Args:
        answers: prompt → the target's answer.
        error_rate: share of positions at which it is wrong, 0 … 1. Which ones depends on the
            request's seed and the position alone, so methods meet the same.
    """

    def __init__(
        self,
        loaded: LoadedDraft,
        num_sparse: int,
        answers: Mapping[Tokens, Tokens],
        error_rate: float,
    ) -> None:
        super().__init__(loaded, num_sparse)
        self._answers = answers
        self._error_rate = error_rate

    @classmethod
    def load_oracle(
        cls, spec: str, dtype: str, device: str, num_sparse: int, answers: Path, error_rate: float
    ) -> Self:
        """Load the network by spec and the answers; errors as of both."""
        recorded = read_answers(answers)
        return cls(load_draft(spec, dtype, device), num_sparse, recorded, error_rate)

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> OracleCache:
        """An empty cache for a session with this prompt.

        Raises:
            RequestError: no answer to it is recorded.
        """
        answer = self._answers.get(tuple(prompt))
        if answer is None:
            raise RequestError("the oracle draft has no recorded answer to this prompt")
        return OracleCache(Prefix(), sampling, begin=len(prompt), answer=answer)

    def _proposal(
        self, logits: Tensor, cache: DraftCache, position: int
    ) -> tuple[Int32Array, Float16Array]:
        """The recorded token, or a wrong one; beyond the answer what the network proposes."""
        row = super()._proposal(logits, cache, position)
        assert isinstance(cache, OracleCache)
        index = position - cache.begin
        if index >= len(cache.answer):
            return row
        token = cache.answer[index]
        seed = cache.sampling.seed
        right = not is_wrong(seed, position, self._error_rate)
        if not cache.sampling.greedy or row[0].shape[0] < 2:
            return certain(token if right else (token + 1) % self.vocab_size, row[0].shape[0])
        choice = choice_at(right, seed, position)
        first, second = token, (token + 2) % self.vocab_size
        if choice.rank:
            first, second = (token + 1) % self.vocab_size, token if choice.rank == 1 else second
        return likely(first, second, choice, row[0].shape[0])


def likely(first: int, second: int, choice: Choice, size: int) -> tuple[Int32Array, Float16Array]:
    """Two tokens by a choice's margin, as `size` entries: int32[K], float16[K]."""
    ids, probs = certain(first, size)
    ids[1], probs[:2] = second, choice.probs
    return ids, probs


def is_wrong(seed: int, position: int, error_rate: float) -> bool:
    """Whether the oracle errs at this absolute position."""
    return uniform(seed, position, Purpose.DRAFT) < error_rate
