"""Control tokens of a tokenizer, and encoding in which only a chat template can write them.

A control token is an added token that steers the model: `<|im_start|>`, `<think>`, `<tool_call>`.
A tokenizer finds added tokens by their text, wherever it comes from. `Controls` encodes with a
copy of the tokenizer in which each control token has another text, an alias that holds 128 random
bits. What a template wrote is replaced with aliases before encoding. In everything else the text
of a control token is plain text, encoded as the vocabulary's ordinary tokens. The rest of the
pipeline (normaliser, pre-tokenizer, merges) is the tokenizer's own and sees the whole text at once,
so text without control tokens gets the ids that the tokenizer itself gives.

Knows tokenizers. Does not know messages or templates.
"""

from __future__ import annotations

import json
import re
import secrets
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bus.protocol.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Controls", "control_tokens"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SHORTEST = 3
_NONCE = secrets.token_hex(16)
_META_SPACE = "\u2581"
"""SentencePiece's space."""


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text and id of each control token.

    An added token is one if it is special, or if it holds a character that is neither a letter, a
    digit nor white space. The others are vocabulary, such as Gemma's runs of spaces. So are white
    space, tokens of one or two characters, and those of SentencePiece for single bytes.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: int(number) for number, token in added if _is_control(token)}


def _is_control(token: Any) -> bool:
    text = token.content
    if len(text.strip()) < _SHORTEST or _BYTE_TOKEN.fullmatch(text):
        return False
    return bool(token.special) or any(map(_is_mark, text))


def _is_mark(character: str) -> bool:
    return not (character.isalnum() or character.isspace() or character == _META_SPACE)


class Controls:
    """The control tokens of one tokenizer. All methods may run on several threads at once.

    Attributes:
        ids: of the control tokens, by their text.
        marks: the characters that control tokens begin and end with. A text without them holds no
            control token, nor completes one at the end or the beginning of another text.
        num_tokens: one more than the tokenizer's largest id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes about as long as loading the tokenizer.

        Raises:
            ModelError: the tokenizer cannot be copied.
        """
        self.ids = control_tokens(tokenizer)
        self.num_tokens = max(map(int, tokenizer.get_vocab().values())) + 1
        self.marks = {text.strip()[end] for text in self.ids for end in (0, -1)}
        self._pattern = _pattern_of(tokenizer, self.ids)
        aliases = {text: f"e2sci{_NONCE}x{number:06d}" for number, text in enumerate(self.ids)}
        self._aliases = aliases
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            self._encode = _by_pieces(tokenizer, aliases)
        else:
            copy = _renamed(backend, aliases)
            if any(copy.token_to_id(aliases[text]) != self.ids[text] for text in aliases):
                raise ModelError("the tokenizer cannot be copied: its control tokens change ids")
            self._encode = lambda text, special: copy.encode(text, add_special_tokens=special).ids

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Where control tokens are written, from left to right, the longest of those that begin
        at one place."""
        return self._pattern.finditer(text)

    def mark(self, text: str) -> str:
        """`text` with every control token in it replaced with its alias."""
        return self._pattern.sub(lambda match: self._aliases[match[0]], text)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: aliases (`mark`) become control tokens; everything else is plain text.
            add_special_tokens: also put the special tokens around it that the tokenizer puts
                around any text.
        """
        return self._encode(text, add_special_tokens)


def _pattern_of(tokenizer: Tokenizer, texts: dict[str, int]) -> re.Pattern[str]:
    whole = {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.single_word
    }
    longest_first = sorted(texts, key=len, reverse=True)
    choices = (
        rf"(?<!\w){re.escape(text)}(?!\w)" if text in whole else re.escape(text)
        for text in longest_first
    )  # fmt: skip
    return re.compile("|".join(choices) or "(?!)")


def _renamed(backend: Any, names: dict[str, str]) -> Any:
    """A copy of a `tokenizers.Tokenizer` with other texts for some of its added tokens.

    Where such a token is in the model's vocabulary too, it is renamed there, and merges that lead
    to it are left out. So no text but the new one can give its id.
    """
    from tokenizers import Tokenizer as Backend  # noqa: PLC0415 - as torch, where it is used

    whole = json.loads(backend.to_str())
    whole["truncation"] = whole["padding"] = None
    for token in whole["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = whole["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocab.items()}
    elif vocab is not None:
        model["vocab"] = [[names.get(text, text), *rest] for text, *rest in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not _makes(pair, names)]
    return Backend.from_str(json.dumps(whole, ensure_ascii=False))


def _makes(merge: Any, names: dict[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _by_pieces(tokenizer: Tokenizer, aliases: dict[str, str]) -> Callable[[str, bool], list[int]]:
    """For tokenizers written in Python, which encode piece by piece between added tokens."""
    tokenizer = weakref.proxy(tokenizer)  # a cache of `Controls` keeps no tokenizer alive
    added = {token.content: (number, token) for number, token in
             tokenizer.added_tokens_decoder.items()}  # fmt: skip
    ids = {alias: int(added[text][0]) for text, alias in aliases.items()}
    choices = (
        r"\s*" * added[text][1].lstrip + alias + r"\s*" * added[text][1].rstrip
        for text, alias in aliases.items()
    )
    pattern = re.compile("(" + ("|".join(choices) or "(?!)") + ")")

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        found: list[int] = []
        for piece in pattern.split(text):
            if piece.strip() in ids:
                found.append(ids[piece.strip()])
            elif piece:
                tokens = tokenizer.tokenize(piece, split_special_tokens=True)
                found += tokenizer.convert_tokens_to_ids(tokens)
        if add_special_tokens:
            found = tokenizer.build_inputs_with_special_tokens(found)
        return found

    return encode
