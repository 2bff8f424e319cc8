"""How answers are asked for and marked."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from bench.datasets import Kind, Question
from bench.tasks import found_letter, found_number, mark, program, prompt_of


def question(kind: Kind, **row: Any) -> Question:
    return Question("set", 0, "How many?", kind, row)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5, so she has 5 apples.", "5"),
        ("#### 42 and then 7 more", "7"),  # the last number behind the marker
        ("It costs $1,234.50.", "1234.5"),
        ("minus: -3", "-3"),
        ("#### none, but 8 before? no", "8"),
        ("12 #### unknown", "12"),  # nothing behind the marker: the last one at all
        ("no digits", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert found_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Thus the answer is (C).", "C"),
        ("The answer is **B**", "B"),
        ("the answer is: d", "D"),
        ("The answer is (A). No: the answer is (E).", "E"),
        ("Answer: D", "D"),
        ("I choose B, not A or C", "C"),
        ("nothing", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert found_letter(text) == letter


def test_answers_are_marked_by_kind() -> None:
    number = question(Kind.NUMBER, answer="2 + 3 = <<2+3=5>>5\n#### 1,005")
    assert mark(number, "so it is 1005.") is True
    assert mark(number, "so it is 5.") is False
    choice = question(Kind.CHOICE, answer=2)
    assert mark(choice, "The answer is (C)") is True
    assert mark(choice, "The answer is (B)") is False
    assert mark(question(Kind.CHOICE), "The answer is (B)") is None
    assert mark(question(Kind.OPEN), "anything") is None


def test_code_is_marked_only_where_it_may_run() -> None:
    stub = question(Kind.COMPLETION, prompt="def f():\n", entry_point="f", test="…")
    assert mark(stub, "    return 1") is None
    assert mark(stub, "    return 1", lambda program: "return 1" in program) is True


def test_questions_that_are_marked_say_how_to_end() -> None:
    assert prompt_of(question(Kind.NUMBER)).endswith("step by step.")
    assert "The answer is (X)" in prompt_of(question(Kind.CHOICE))
    assert prompt_of(question(Kind.OPEN)) == "How many?"


ROW = {
    "prompt": 'from math import pi\n\n\ndef area(r):\n    """Of a circle."""\n',
    "entry_point": "area",
    "test": "def check(f):\n    assert f(0) == 0\n",
}


@pytest.mark.parametrize(
    "text",
    [
        "    return pi * r ** 2\n",
        "```python\ndef area(r):\n    return pi * r ** 2\n```",
        "Here it is:\n```\ndef area(r):\n    return pi * r ** 2\n",  # the block never ends
        "```python\n    return pi * r ** 2\n```\nThat is all.",
    ],
)
def test_a_completion_becomes_a_program_that_runs(text: str) -> None:
    """Whole functions and bodies alike; the stub's imports are there in both."""
    exec(compile(program(ROW, text), "program", "exec"), {})


def test_a_wrong_completion_fails_its_test() -> None:
    with pytest.raises(AssertionError):
        exec(compile(program(ROW, "    return 1\n"), "program", "exec"), {})
