"""Twenty varied prompts of our own: chat, code, arithmetic."""

from __future__ import annotations

CHAT = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about a train in the rain.",
    "Give me three tips for learning a new language.",
    "Explain to a child what a computer is.",
    "Write a polite email that declines a meeting on Friday.",
    "What is the difference between weather and climate?",
    "Suggest a name for a small bakery and explain it.",
    "Summarize: The river rose, the bridge was closed, and for a week the town used boats.",
)
CODE = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Write a SQL query that counts orders per customer.",
    "Explain what this does: for i in range(10): print(i * i)",
    "Write a Python function that checks whether a string is a palindrome.",
    "Write a bash command that finds all files larger than 100 MB.",
    "Write a Python class Stack with push, pop and peek.",
)
ARITHMETIC = (
    "What is 17 + 26? Explain step by step.",
    "A shop sells pens for 3 dollars each. How much do 14 pens cost?",
    "Tom has 5 apples and buys 7 more, then gives away 4. How many are left?",
    "What is 12 * 7?",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "List the first ten even numbers.",
)
PROMPTS = CHAT + CODE + ARITHMETIC
_RIVER = (
    "The river rose during the night and by morning the bridge was closed. For a week the town "
    "used boats to reach the market, and the school moved into the old church on the hill. When "
    "the water fell, the bridge was found to be sound, and the boats were put away until spring."
)
_CODE = """def total_price(items, tax):
    total = 0
    for item in items:
        total = total + item.price * item.count
    if total > 100:
        total = total * 0.9
    return total * (1 + tax)
"""
_LETTER = (
    "Dear Ms. Green, thank you for your order of 12 March. Two of the five lamps are not in stock "
    "at the moment. We shall send the other three lamps this week and the two missing lamps as "
    "soon as they arrive. We apologise for the delay. Yours sincerely, Tom Baker"
)
REPEAT = (
    f"Repeat the following text word for word:\n\n{_RIVER}",
    f"Repeat the following letter word for word:\n\n{_LETTER}",
    f"Repeat this code exactly:\n\n```python\n{_CODE}```",
    f"Rewrite this code with the variable total renamed to amount:\n\n```python\n{_CODE}```",
    f"Copy this text and replace the word boats with rafts:\n\n{_RIVER}",
    f"Copy this letter, but address it to Mr. Brown:\n\n{_LETTER}",
)
"""Prompts whose answer repeats or edits a given text."""
SETS = {"chat": CHAT, "code": CODE, "arithmetic": ARITHMETIC, "repeat and edit": REPEAT}
