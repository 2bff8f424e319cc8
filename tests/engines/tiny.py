"""Tiny random models and tokenizers: real transformers objects, built in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CONTEXT_LENGTH = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_CORPUS = [
    "the cat sat on the mat and the dog ran to the house",
    "def add(a, b):\n    return a + b  # sums",
    "Grüße aus Köln, çà et là: 3.14 × 2 = 6.28 😀 日本語",
]


def byte_level_tokenizer(vocab_size: int = 290) -> PreTrainedTokenizerFast:
    """BPE over bytes, as in GPT-2, SmolLM2 and Qwen: a character may lie across tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over characters with tokens for single bytes, as in Llama 2: the decoder drops the
    first space, and runs of byte tokens decode as a whole."""
    words = ["▁", "▁the", "▁cat", "a", "b", "c", "ü", "t", "h", "e", "."]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *words]:
        vocab[token] = len(vocab)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tiny_llama(num_rows: int, seed: int = 0, num_layers: int = 2) -> Any:
    """A random Llama whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=num_rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    padding: int = 6,
    seed: int = 0,
    num_layers: int = 2,
) -> Path:
    """Save a tiny Llama with `padding` more rows than tokens; returns the directory."""
    tokenizer = tokenizer or byte_level_tokenizer()
    tiny_llama(len(tokenizer) + padding, seed, num_layers).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def random_model(model_type: Any = LlamaForCausalLM, seed: int = 0, **options: Any) -> Any:
    """A random Llama, or another of its kind, of 203 tokens: norms and biases random too."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 203,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.1,
    }
    model = model_type(model_type.config_class(**{**sizes, **options})).eval()
    for name, weight in model.named_parameters():  # transformers starts biases at 0, norms at 1
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
        elif "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2.0)
    return model


def tiny_qwen2(num_rows: int, seed: int = 0) -> Any:
    """A random Qwen2 with biases, tied."""
    return random_model(
        Qwen2ForCausalLM, seed, vocab_size=num_rows, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip


def qwen2_tokenizer() -> PreTrainedTokenizerFast:
    """With the token that transformers gives every Qwen2's tokenizer."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer


def save_tiny_gguf(
    path: Path,
    model: Any = None,
    num_unused: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    also: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    """A tiny Llama or Qwen2 with its tokenizer in one GGUF file, float32.

    Args:
        model: with `num_unused` more rows than the tokenizer has tokens.
        num_unused: tokens that fill the rows up, marked as unused.
        also: adds fields and tensors.
    """
    tokenizer = tokenizer or byte_level_tokenizer()
    model = model or tiny_llama(len(tokenizer))
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, num_unused)
    is_qwen2 = isinstance(config, Qwen2Config)
    if is_qwen2:
        writer.add_tokenizer_pre("qwen2")
    architecture = gguf.MODEL_ARCH.QWEN2 if is_qwen2 else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert stored is not None
            laid_out = tensor if is_qwen2 else _permuted(name, tensor, config)
            writer.add_tensor(stored, laid_out.numpy())
    also(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, num_unused: int
) -> None:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    types = [3 if token.startswith("<|") else 1 for token in tokens]
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(num_unused))])
    writer.add_token_types([*types, *[int(gguf.TokenType.UNUSED)] * num_unused])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT_TEMPLATE)


def _permuted(name: str, tensor: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """GGUF interleaves the two halves of each rotary head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, num_heads in heads.items():
        if part in name:
            rows, columns = tensor.shape
            halves = tensor.reshape(num_heads, 2, rows // num_heads // 2, columns)
            return halves.swapaxes(1, 2).reshape(rows, columns)
    return tensor
