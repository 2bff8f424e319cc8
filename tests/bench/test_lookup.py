"""`bench/lookup`: what it makes of measured answers."""

from __future__ import annotations

from msgspec.structs import replace

from bench.answers import TimedAnswer
from bench.lookup import WITH, WITHOUT, summarise
from bench.pace.summary import Spread
from bench.prompts import PROMPTS, REPEAT, SETS
from tests.bench.test_pace import usage


def answer(seconds: float, tokens: tuple[int, ...] = (1, 2, 3, 4)) -> TimedAnswer:
    return TimedAnswer(tokens, replace(usage(), seconds=seconds))


def test_ratios_are_of_the_same_repetition_over_all_prompts_of_a_set() -> None:
    answers = {
        ("repeat", 0, 0): {WITHOUT: answer(3.0), WITH: answer(1.0)},
        ("repeat", 1, 0): {WITHOUT: answer(1.0), WITH: answer(1.0, (1, 2, 3, 5))},
        ("repeat", 0, 1): {WITHOUT: answer(1.0), WITH: answer(1.0)},
        ("chat", 0, 0): {WITHOUT: answer(2.0), WITH: answer(4.0)},
    }
    repeat, chat = summarise(answers)
    assert (repeat.prompt_set, repeat.answers, repeat.identical) == ("repeat", 3, 2)
    assert repeat.without == Spread(3.0, 2.0, 4.0)
    assert repeat.ratio == Spread(1.5, 1.0, 2.0)
    assert chat.ratio.median == 0.5


def test_every_prompt_belongs_to_one_set() -> None:
    assert sorted(p for prompts in SETS.values() for p in prompts) == sorted((*PROMPTS, *REPEAT))
