"""What the models say about answers that differ: loaded only where somebody asks."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

from bench.exactness.answers import SEED, Asked, Tokens
from bench.exactness.design import DesignCell
from bench.margins import decision_margin
from bench.reference import replay_gaps, replay_shortfalls, replay_windows
from decoding.engine import Drafter
from decoding.sampling import SamplingParams
from engines.kinds import DrafterKind, drafter_of
from engines.tokenizer import encode_prompt
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

_REPLAY_WINDOW = 5


class ModelEvidence:
    """`bench.exactness.judge.Evidence` of real models, in this process.

    Raises ModelError, when first asked, where one cannot be loaded.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self.lead = cache(self._lead)
        self.margin = cache(self._margin)
        self.epsilon = cache(self._epsilon)
        self.shortfall = cache(self._shortfall)
        self._draft = cache(self._load_draft)

    @cached_property
    def _target(self) -> TargetModel:
        return TargetModel.load(self._asked.target, self._asked.dtype)

    def _load_draft(self, drafter: str) -> Drafter[Any]:
        model = ModelDrafter.load(self._asked.draft, self._asked.dtype)
        return drafter_of(DrafterKind(drafter), model)

    def _encoded(self, prompt: int) -> Tokens:
        return encode_prompt(self._target.tokenizer, self._asked.prompts[prompt], raw=False)

    def _lead(self, prompt: int, tokens: Tokens) -> float:
        return replay_gaps(self._target, self._encoded(prompt), tokens)[-1][1]

    def _margin(self, prompt: int, tokens: Tokens, cell: DesignCell) -> float:
        params = SamplingParams(cell.temperature, seed=SEED)
        draft = self._draft(cell.installation.drafter)
        return decision_margin(self._target, draft, self._encoded(prompt) + tokens[:-1], params)

    def _epsilon(self, prompt: int, answer: Tokens) -> float:
        return replay_windows(self._target, self._encoded(prompt), answer, _REPLAY_WINDOW)

    def _shortfall(self, prompt: int, answer: Tokens) -> float:
        return max(replay_shortfalls(self._target, self._encoded(prompt), answer), default=0.0)
