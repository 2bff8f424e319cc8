"""The target alone: its speed on the cloud's core, and its answers, which oracles replay."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.cores import one_core
from bench.pace.rows import ALONE, NO_DRAFT, PaceRow
from bench.paced import Device, paced
from bench.reference import generate_alone
from decoding.sampling import SamplingParams
from engines.chat import encode_prompt
from engines.padding import Padding
from engines.torch.oracle import RecordedAnswer
from engines.torch.target import TargetModel


class TargetAlone:
    """The target in this process, on the core that the cloud worker has while it is idle.

    Over a link its tokens would stream one after the other, each half a round trip late, so from
    the first token to the last the link costs nothing.
    """

    def __init__(
        self, spec: str, dtype: str, prompts: Sequence[str], max_new_tokens: int, device: Device
    ) -> None:
        self._target = TargetModel.load(spec, dtype)
        self._prompts = [encode_prompt(self._target.tokenizer, text, raw=False) for text in prompts]
        self._max_new_tokens = max_new_tokens
        self._padding = Padding(device.least_passes)

    def answer(self, prompt_id: int) -> tuple[RecordedAnswer, float]:
        """Its greedy answer, and the seconds from its first token to its last."""
        prompt = self._prompts[prompt_id]
        target, eos = self._target, self._target.eos_tokens
        with one_core(last=True):
            stream = generate_alone(target, prompt, SamplingParams(), self._max_new_tokens, eos)
            stream = paced(stream, self._padding)
            tokens = [next(stream)]
            began = time.perf_counter()
            tokens += stream
            seconds = time.perf_counter() - began
        return RecordedAnswer(prompt, tuple(tokens)), seconds


def alone_row(answer: RecordedAnswer, seconds: float, prompt_id: int) -> PaceRow:
    """One answer of the target, without draft and link."""
    return PaceRow(NO_DRAFT, None, 0.0, ALONE, 0, prompt_id, len(answer.answer) - 1, seconds)
