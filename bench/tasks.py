"""How an answer is asked for and marked, zero-shot, as lm-evaluation-harness and MMLU-Pro do it.

    kind        asked behind the question           marked
    number      "Let's think step by step."         the number behind the last "####", else the
                                                    last one (gsm8k_cot_zeroshot, flexible-extract)
    choice      think, end with "The answer is (X)" the letter in those words, else behind
                                                    "Answer:", else the last that stands alone
                                                    (MMLU-Pro)
    completion  –                                   pass@1: the code runs against the row's test
                                                    (HumanEval), only where the user allows it
    open        –                                   not at all

Marks are right, wrong or None: nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from bench.datasets import GOLD_NUMBER, LETTERS, Kind, Question

STEPS = "Let's think step by step."
CHOICE_STEPS = f'{STEPS} End with "The answer is (X)", X being the letter.'

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LETTER = (
    re.compile(rf"answer is:?\s*\**\(?([{LETTERS}])\b", re.IGNORECASE),
    re.compile(rf"answer:\s*\**\(?([{LETTERS}])\b", re.IGNORECASE),
    re.compile(rf"\b([{LETTERS}])\b"),
)
_BLOCK = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)

RunProgram = Callable[[str], bool]
"""Runs a Python program elsewhere; whether it ended without an error."""


def prompt_of(question: Question) -> str:
    """The question as the bench asks it."""
    if question.kind is Kind.NUMBER:
        return f"{question.prompt}\n\n{STEPS}"
    if question.kind is Kind.CHOICE:
        return f"{question.prompt}\n\n{CHOICE_STEPS}"
    return question.prompt


def mark(question: Question, text: str, run_program: RunProgram | None = None) -> bool | None:
    """Whether an answer is right; None where this cannot be told.

    Args:
        run_program: without it, code is not marked.
    """
    if question.kind is Kind.NUMBER:
        gold = _last_number(str(question.row["answer"]).rpartition(GOLD_NUMBER)[2])
        return None if gold is None else found_number(text) == gold
    if question.kind is Kind.CHOICE:
        gold = question.row.get("answer")
        return None if not isinstance(gold, int) else found_letter(text) == LETTERS[gold]
    if question.kind is Kind.COMPLETION and run_program is not None:
        return run_program(program(question.row, text))
    return None


def found_number(text: str) -> Decimal | None:
    """The number that an answer ends with."""
    _, marker, behind = text.rpartition(GOLD_NUMBER)
    number = _last_number(behind) if marker else None
    return _last_number(text) if number is None else number


def found_letter(text: str) -> str | None:
    """The letter that an answer chooses."""
    for pattern in _LETTER:
        letters = pattern.findall(text)
        if letters:
            return str(letters[-1]).upper()
    return None


def program(row: Any, text: str) -> str:
    """A HumanEval row's stub, completed by an answer, and its test, as one program."""
    blocks = _BLOCK.findall(text)
    code = next((block for block in blocks if "def " in block), blocks[0] if blocks else text)
    defines = re.search(rf"^def {re.escape(row['entry_point'])}\b", code, re.MULTILINE)
    solution = f"{_imports(row['prompt'])}\n{code}" if defines else f"{row['prompt']}{code}"
    return f"{solution}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def _imports(stub: str) -> str:
    """What stands before the stub's last function: imports and helpers."""
    return stub[: stub.rindex("\ndef ")] if "\ndef " in stub else ""


def _last_number(text: str) -> Decimal | None:
    for number in reversed(_NUMBER.findall(text)):
        try:
            return Decimal(number.replace(",", "")).normalize()
        except InvalidOperation:
            continue
    return None
