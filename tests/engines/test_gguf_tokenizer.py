"""The tokenizer that a GGUF file stands for, and the real Qwen2.5-Coder's where its file is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Tokenizer

from engines.catalog.registry import load_registry
from engines.chat import encode_prompt
from engines.tokenizer import tokenizer_digest
from engines.torch.cache import KVCache
from engines.torch.gguf_tokenizer import read_gguf, save_gguf_tokenizer
from engines.torch.linears import packed
from engines.torch.loading import load_model
from engines.torch.network import CausalNetwork
from tests.engines.tiny import byte_level_tokenizer, save_tiny_gguf, tiny_qwen2

NUM_TOKENS = len(byte_level_tokenizer())
CODER = load_registry().model("qwen2.5-coder-0.5b").path


def test_unused_tokens_are_left_out_and_qwen2_means_nfc(tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf", tiny_qwen2(NUM_TOKENS + 14), num_unused=14)
    save_gguf_tokenizer(path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == NUM_TOKENS
    assert "[PAD290]" not in tokenizer.get_vocab()
    composed, combining = "Grüße", "Gru\u0308ße"
    assert composed != combining
    assert tokenizer.encode(combining) == tokenizer.encode(composed)
    assert tokenizer.decode(tokenizer.encode(combining)) == composed


def test_a_file_that_names_no_pre_tokenizer_normalises_nothing(tmp_path: Path) -> None:
    save_gguf_tokenizer(save_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Gru\u0308ße")) == "Gru\u0308ße"
    assert tokenizer_digest(tokenizer) == tokenizer_digest(byte_level_tokenizer())


def test_an_unused_token_among_used_ones_keeps_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those at the end fill up rows; leaving out others would need other ids."""
    contents = gguf.ReaderField.contents

    def changed(field: gguf.ReaderField) -> Any:
        found = contents(field)
        if field.name == "tokenizer.ggml.token_type":
            found[5] = int(gguf.TokenType.UNUSED)
        return found

    monkeypatch.setattr(gguf.ReaderField, "contents", changed)
    save_gguf_tokenizer(save_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == NUM_TOKENS


@torch.inference_mode()
def test_greedy_answers_of_a_qwen2_in_float32_are_transformers(tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf", tiny_qwen2(NUM_TOKENS + 14), num_unused=14)
    prompt = byte_level_tokenizer().encode("the cat sat on")
    expected = load_model(str(path), "float32", "cpu").model.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0,
        eos_token_id=NUM_TOKENS + 13,
    )[0].tolist()  # fmt: skip
    loaded = load_model(str(path), "float32", "cpu")
    network, cache = CausalNetwork(loaded.model, NUM_TOKENS + 14, packed), KVCache()
    tokens, feed = list(prompt), prompt
    while len(tokens) < len(expected):
        feed = [int(network.logits(torch.tensor(feed), cache, 1).argmax())]
        tokens += feed
    assert tokens == expected


# --- the real file ----------------------------------------------------------------------------

needs_coder = pytest.mark.skipif(not CODER.is_file(), reason="needs: e2sci pull qwen2.5-coder-0.5b")


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("coder")
    save_gguf_tokenizer(CODER, directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' own Qwen2 tokenizer, of the file's vocabulary and merges."""
    reader = read_gguf(CODER)
    fields = {
        name: reader.get_field(f"tokenizer.ggml.{name}")
        for name in ("tokens", "merges", "token_type")
    }
    tokens, merges, kinds = (
        list(field.contents()) for field in fields.values() if field is not None
    )
    special = [i for i, kind in enumerate(kinds) if kind in (3, 4)]
    plain = {token: i for i, token in enumerate(tokens) if kinds[i] == gguf.TokenType.NORMAL}
    tokenizer = Qwen2Tokenizer(
        vocab=plain, merges=[tuple(merge.split(" ")) for merge in merges],
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [tokens[i] for i in special]})
    return tokenizer


def texts() -> list[str]:
    fixed = [
        "def f(x):\n\treturn x**2  # done\n\n\n", "    if a != b:\r\n        pass",
        "Cafe\u0301 naïve", "\u1112\u1161\u11ab 한글", "don't I'LL we'Ve",
        "1234567 3.14e-10 0xFF", " \t \n \u3000\xa0 x ", "日本語のテスト。中文，标点",
        "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 emoji", "مرحبا שלום नमस्ते",
        "<|im_start|>user\nhi<|im_end|>\n", "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
        "<|endoftext|>", "[PAD151700] <|nope|>", "\ufb01 \u00c5 \u212b \u1e9b\u0323", "",
    ]  # fmt: skip
    alphabet = "aZ0 \n\t.,'_(){}=+é\u0301ß中\u1100한😀\u200d\ufeffЖ١"
    source = random.Random(0)
    return fixed + ["".join(source.choices(alphabet, k=source.randint(1, 60))) for _ in range(300)]


@pytest.mark.long
@needs_coder
@pytest.mark.slow
def test_the_real_tokenizer_encodes_as_transformers_own(coder: Any, reference: Any) -> None:
    assert len(coder) == 151_665
    assert coder.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == [151_643, 151_645]
    for token, index in reference.get_vocab().items():
        assert coder.convert_tokens_to_ids(token) == index
    for text in texts():
        assert coder.encode(text) == reference.encode(text), text


@pytest.mark.long
@needs_coder
@pytest.mark.slow
def test_the_real_chat_template_opens_the_assistants_turn(coder: Any) -> None:
    prompt = encode_prompt(coder, "Say hi.", raw=False)
    assert coder.decode(prompt) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt[0] == 151_644


@pytest.mark.long
@needs_coder
@pytest.mark.slow
def test_the_real_model_ends_at_both_of_its_tokens_and_has_no_padding() -> None:
    loaded = load_model("qwen2.5-coder-0.5b", "int8", "cpu")
    assert loaded.vocab_size == 151_665
    assert loaded.eos_tokens == {151_643, 151_645}
    assert loaded.context_length == 32_768
    assert json.loads(loaded.model.config.to_json_string())["vocab_size"] == 151_936
