"""Prompts of three kinds, of our own, and texts in which one kind follows another abruptly."""

from __future__ import annotations

import itertools

PROSE = (
    "Write a short story about a fisherman and his daughter.",
    "Describe a quiet morning in a small village.",
    "Explain why people keep dogs as pets.",
    "Write a letter to a friend about a trip to the mountains.",
)
CODE = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Write a Python class Stack with push, pop and peek.",
    "Write a Python function that counts the words in a file.",
    "Write a Python function that sorts a list with bubble sort.",
)
OTHER_LANGUAGE = (
    "Écris une courte histoire sur un chat et un oiseau, en français.",
    "Beschreibe auf Deutsch einen Tag am Meer.",
    "Escribe en español una carta a un amigo sobre el verano.",
    "Spiega in italiano come si prepara la pasta.",
)
KINDS = {"prose": PROSE, "code": CODE, "another language": OTHER_LANGUAGE}

Spliced = tuple[tuple[str, str], ...]
"""(kind, prompt), one after the other."""


def spliced(count: int) -> list[Spliced]:
    """`count` texts of one prompt of each kind: all orders in turns, prompts in turns."""
    orders = list(itertools.permutations(KINDS))
    return [
        tuple((kind, KINDS[kind][(number + number // len(orders)) % 4])
              for kind in orders[number % len(orders)])
        for number in range(count)
    ]  # fmt: skip
