"""From token ids to text as it comes, and what identifies a tokenizer.

Knows special tokens and half-finished UTF-8. Does not know prompts (`engines.chat`) or models'
weights.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bus.protocol.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_REPLACEMENT = "\ufffd"
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MOST_HELD = 4
"""A UTF-8 character has at most four bytes, and a token at least one of them."""


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Hex SHA-256 over what decides ids: vocabulary, merges, normaliser, pre-tokeniser and added
    tokens. Name, chat template, decoder and post-processor stay out: they do not change what an
    id means, and copies of one tokenizer differ in them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    else:
        whole = json.loads(backend.to_str())
        parts = {name: whole[name] for name in ("normalizer", "pre_tokenizer")}
        # Copies say "none" in several ways: null, "", false, or not at all.
        parts["model"] = {name: value for name, value in whole["model"].items() if value}
        parts["added_tokens"] = [
            {name: value for name, value in token.items() if name != "special"}
            for token in whole["added_tokens"]
        ]
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def num_real_tokens(tokenizer: Tokenizer, num_rows: int) -> int:
    """Size of the vocabulary cut to real tokens: one more than the largest id,
    and no more than the model has rows. Rows beyond are padding."""
    largest: int = max(tokenizer.get_vocab().values())
    return min(largest + 1, num_rows)


def eos_token_ids(
    generation: Any, config: Any, tokenizer: Tokenizer, others: Iterable[str] = ()
) -> frozenset[int]:
    """Every id that ends an answer: the generation config's, the config's and the tokenizer's.

    Args:
        generation: transformers' generation config, or None.
        others: tokens that end one besides, as text.
    """
    found: set[int] = set()
    for value in (
        getattr(generation, "eos_token_id", None),
        getattr(config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(token) for token in value)
    found.update(int(tokenizer.convert_tokens_to_ids(token)) for token in others)
    return frozenset(found)


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """Text of tokens, without special tokens and with the spaces as the tokens say."""
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if not isinstance(text, str):
        raise ModelError("the tokenizer decodes to something other than text")
    return text


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that `skip_special_tokens` leaves out."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token for token, content in added if content.special)


class Detokenizer:
    """Text of a growing answer, piece by piece.

    All pieces and `flush` together are `decode` of all tokens, and no piece ends inside a UTF-8
    character. The time of a push does not depend on what came before, whatever the tokens are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._silent = _special_ids(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        byte_level = type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"
        self._stream = _ByteStream() if byte_level else _PieceStream(tokenizer)

    def push(self, token: int) -> str:
        """Take one token; return the text that can be shown now, maybe empty."""
        if token in self._silent:  # as if it were not there: byte tokens around it are one run
            return ""
        return self._stream.push(token, str(self._tokenizer.convert_ids_to_tokens(token)))

    def flush(self) -> str:
        """The answer is over: return what was held back, half characters as U+FFFD."""
        return self._stream.flush()


def _byte_alphabet() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
             *range(ord("®"), ord("ÿ") + 1)]  # fmt: skip
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token in the middle of a text; half a character is possible. Of a special
    token they are its name."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "decoder", None)).__name__ == "ByteLevel":
        return bytes(_BYTES[letter] for letter in name)
    if _BYTE_TOKEN.fullmatch(name):
        return bytes([int(name[3:5], 16)])
    return name.replace(_SPACE, " ").encode()


class _ByteStream:
    """Byte-level tokens are pieces of one UTF-8 text: what is complete of it can be shown."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, _token: int, name: str) -> str:
        try:
            data = bytes([_BYTES[letter] for letter in name])
        except KeyError:  # an added token stands for itself
            data = name.encode()
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _PieceStream:
    """Other tokens: decoded from the last piece that gave text on, which comes along because some
    tokenizers drop the space before the first token they decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the last piece that gave text, then those held back
        self._num_shown = 0  # how many of them are that piece
        self._shown = ""  # their text, decoded alone

    def push(self, token: int, name: str) -> str:
        self._tokens.append(token)
        # A run of byte tokens is valid or not as a whole, so nothing of it is final before it ends.
        if _BYTE_TOKEN.fullmatch(name):
            return ""
        text = decode(self._tokenizer, self._tokens)
        # Half a character may be completed by what follows; no more than 3 tokens wait for that.
        held = len(self._tokens) - self._num_shown
        if text.endswith(_REPLACEMENT) and _REPLACEMENT not in name and held < _MOST_HELD:
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(decode(self._tokenizer, self._tokens))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown) :]
        if piece:
            self._tokens = self._tokens[self._num_shown :]
            self._num_shown = len(self._tokens)
            self._shown = decode(self._tokenizer, self._tokens)
        return piece
