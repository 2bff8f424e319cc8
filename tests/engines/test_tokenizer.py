from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from engines import tokenizer as tokenizer_module
from engines.chat import encode_prompt
from engines.tokenizer import (
    Detokenizer,
    decode,
    eos_token_ids,
    num_real_tokens,
    tokenizer_digest,
)
from tests.engines.tiny import byte_fallback_tokenizer, byte_level_tokenizer, tiny_llama

TOKENIZERS = [byte_level_tokenizer(), byte_fallback_tokenizer()]


# --- digest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_digest_survives_saving_and_ignores_name_and_chat_template(
    tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    copy.name_or_path = "somebody/else"
    copy.chat_template = "{{ messages }}"
    assert tokenizer_digest(copy) == tokenizer_digest(tokenizer)


def test_tokenizers_that_disagree_about_an_id_have_different_digests() -> None:
    digests = {tokenizer_digest(tokenizer) for tokenizer in TOKENIZERS}
    digests.add(tokenizer_digest(byte_level_tokenizer(vocab_size=280)))
    for added in ("<tool>", "<call>"):
        extended = byte_level_tokenizer()
        extended.add_tokens([AddedToken(added)])
        digests.add(tokenizer_digest(extended))
    assert len(digests) == 5


def test_real_tokens_end_where_the_tokenizer_ends_or_the_model_does() -> None:
    tokenizer = byte_level_tokenizer()
    assert num_real_tokens(tokenizer, num_rows=320) == len(tokenizer)
    assert num_real_tokens(tokenizer, num_rows=200) == 200


def test_every_kind_of_end_token_counts() -> None:
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.generation_config.eos_token_id = [5, 7]
    assert eos_token_ids(model.generation_config, model.config, tokenizer) == {1, 5, 7}


# --- prompts ----------------------------------------------------------------------------------


def test_a_prompt_goes_through_the_chat_template_unless_raw() -> None:
    tokenizer = byte_level_tokenizer()
    chat = encode_prompt(tokenizer, "the cat", raw=False)
    assert tokenizer.decode(chat) == "<|start|>user\nthe cat<|end|><|start|>assistant\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "the cat", raw=True)) == "the cat"


LETTERS = {0xE6: "æ", 0x80: "Ģ", 0xF0: "ð"}
"""What stands for these bytes in a byte-level vocabulary."""


# --- detokenizer ------------------------------------------------------------------------------


def pieces_of(tokenizer: Any, tokens: list[int]) -> tuple[list[str], str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in tokens], detokenizer.flush()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text_of_all_tokens(tokenizer: Any, data: st.DataObject) -> None:
    """Any tokens, special ones and broken UTF-8 included."""
    ids = st.integers(0, len(tokenizer) - 1)
    tokens = data.draw(st.lists(ids, max_size=30))
    pieces, rest = pieces_of(tokenizer, tokens)
    assert "".join(pieces) + rest == decode(tokenizer, tokens)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=12))
def test_no_piece_holds_half_a_character(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces, rest = pieces_of(tokenizer, tokens)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + rest == decode(tokenizer, tokens)


def test_an_emoji_appears_with_its_last_byte_and_words_at_once() -> None:
    tokenizer = byte_level_tokenizer(vocab_size=258)  # bytes only
    pieces, rest = pieces_of(tokenizer, tokenizer.encode("a🦜b"))
    assert (pieces, rest) == (["a", "", "", "", "🦜", "b"], "")


def test_an_answer_that_ends_inside_a_character_ends_in_a_replacement() -> None:
    tokenizer = byte_level_tokenizer(vocab_size=258)
    pieces, rest = pieces_of(tokenizer, tokenizer.encode("a🦜")[:3])
    assert (pieces, rest) == (["a", "", ""], "\ufffd")


def test_a_special_token_does_not_end_a_run_of_byte_tokens() -> None:
    """Decoded as a whole, the run is broken UTF-8, though a part of it alone would be a letter."""
    tokenizer = byte_fallback_tokenizer()
    half, rest = (tokenizer.convert_tokens_to_ids(token) for token in ("<0xC2>", "<0x80>"))
    tokens = [half, rest, tokenizer.bos_token_id, rest, tokenizer.convert_tokens_to_ids("▁the")]
    pieces, flushed = pieces_of(tokenizer, tokens)
    assert pieces == ["", "", "", "", "\ufffd\ufffd\ufffd the"]
    assert flushed == ""


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("byte", [0xE6, 0x80, 0xF0])
def test_each_token_is_decoded_a_bounded_number_of_times(
    tokenizer: Any, byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of tokens that are half a character costs as much a token as text does."""
    names = [LETTERS[byte], f"<0x{byte:02X}>"]
    (token,) = [tokenizer.get_vocab()[name] for name in names if name in tokenizer.get_vocab()][:1]
    decoded = list[int]()
    whole = tokenizer_module.decode

    def counted(tokenizer: Any, tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return whole(tokenizer, tokens)

    monkeypatch.setattr(tokenizer_module, "decode", counted)
    tokens = [token] * 2000
    pieces, rest = pieces_of(tokenizer, tokens)
    assert "".join(pieces) + rest == whole(tokenizer, tokens)
    assert sum(decoded) <= 4 * len(tokens)


def test_a_literal_replacement_character_is_shown_as_it_comes() -> None:
    tokenizer = byte_level_tokenizer(vocab_size=258)
    tokens = tokenizer.encode("a\ufffd\ufffdb")
    pieces, rest = pieces_of(tokenizer, tokens)
    assert [piece for piece in pieces if piece] == ["a", "\ufffd", "\ufffd", "b"]
    assert rest == ""
    pieces, rest = pieces_of(tokenizer, tokenizer.encode("\ufffd") * 100)
    assert "".join(pieces) == "\ufffd" * 100
