"""Chained hashes of a session's text: what a drafted window says it follows.

    h(prompt)      = BLAKE2b-64 of the prompt's tokens
    h(text, token) = BLAKE2b-64 of h(text) and the token

Both ends compute the chain from their own tokens, so that eight bytes name a whole prefix. They
are compared within one session only, and decide only what is worth verifying: an accidental
agreement, at 2⁻⁶⁴ a pair, costs the verification of a useless draft and never a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from hashlib import blake2b
from itertools import accumulate

HASH_BYTES = 8


def prompt_hash(tokens: Iterable[int]) -> bytes:
    """h of a prompt, bytes[8]."""
    data = b"".join(token.to_bytes(4, "little") for token in tokens)
    return blake2b(data, digest_size=HASH_BYTES).digest()


def chain(start: bytes, tokens: Iterable[int]) -> Iterator[bytes]:
    """h of the text that `start` is of, then of that text with each further token."""
    return accumulate(tokens, followed_by, initial=start)


def extended(text: bytes, tokens: tuple[int, ...]) -> bytes:
    """h of the text that `text` is of with all these tokens."""
    return reduce(followed_by, tokens, text)


def followed_by(text: bytes, token: int) -> bytes:
    """h of a text with one more token."""
    return blake2b(text + token.to_bytes(4, "little"), digest_size=HASH_BYTES).digest()
