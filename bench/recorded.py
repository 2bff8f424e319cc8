"""The target's own greedy answers, recorded once and read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.passes import GREEDY
from bench.reference import generate_alone
from engines.chat import encode_prompt
from engines.torch.oracle import RecordedAnswer, read_answers, write_answers
from engines.torch.target import TargetModel

Tick = Callable[[], None]
Tokens = tuple[int, ...]


def recorded_answers(
    target: str | TargetModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    path: Path | None = None,
    tick: Tick = lambda: None,
) -> list[RecordedAnswer]:
    """The target's answers to these prompts: those of the file, and where it has fewer than there
    are prompts, the missing ones, each written there at once.

    Args:
        target: loaded, or its spec, which is loaded in int8 only where an answer is missing.

    Raises:
        ModelError: the target cannot be loaded.
        ConfigurationError: the file cannot be read.
    """
    known = read_answers(path) if path is not None and path.exists() else {}
    if len(known) >= len(prompts):
        return _recorded(known)
    model = TargetModel.load(target, "int8") if isinstance(target, str) else target
    for text in prompts:
        prompt = tuple(encode_prompt(model.tokenizer, text, raw=False))
        if prompt not in known:
            own = generate_alone(model, prompt, GREEDY, max_new_tokens, model.eos_tokens)
            known[prompt] = tuple(own)
            if path is not None:
                write_answers(path, _recorded(known))
        tick()
    return _recorded(known)


def _recorded(answers: Mapping[Tokens, Tokens]) -> list[RecordedAnswer]:
    return [RecordedAnswer(prompt, answer) for prompt, answer in answers.items()]
