"""What the models say about answers that differ: loaded only where somebody asks."""

from __future__ import annotations

from functools import cache, cached_property

from bench.exactness.answers import Asked, Tokens
from bench.exactness.design import DesignCell
from bench.reference import replay_choices, replay_shortfalls, replay_windows
from engines.chat import encode_prompt
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

    @cached_property
    def _target(self) -> TargetModel:
        return TargetModel.load(self._asked.target, self._asked.dtype)

    def _encoded(self, prompt: int) -> Tokens:
        return encode_prompt(self._target.tokenizer, self._asked.prompts[prompt], raw=False)

    def _lead(self, prompt: int, tokens: Tokens, cell: DesignCell) -> float:
        encoded = self._encoded(prompt)
        return replay_choices(self._target, encoded, tokens, cell.sampling)[-1].lead

    def _margin(self, prompt: int, tokens: Tokens, cell: DesignCell) -> float:
        encoded = self._encoded(prompt)
        return replay_choices(self._target, encoded, tokens, cell.sampling)[-1].margin

    def _epsilon(self, prompt: int, answer: Tokens) -> float:
        return replay_windows(self._target, self._encoded(prompt), answer, _REPLAY_WINDOW)

    def _shortfall(self, prompt: int, answer: Tokens) -> float:
        return max(replay_shortfalls(self._target, self._encoded(prompt), answer), default=0.0)
