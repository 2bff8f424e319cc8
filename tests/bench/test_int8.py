"""What int8 costs and brings: the float32 reference, the figures, the answers, llama.cpp."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from typer.testing import CliRunner

from bench.int8.answers import TargetAnswer, read_answers
from bench.int8.llamacpp import LlamaCpp
from bench.int8.passes import DRAFT, INT8, LLAMA_CPP, PassTable, Timing
from bench.int8.quality import ALL, Positions, compare, head_rows
from bench.int8.reference import Reference, float_draft, float_model
from bench.int8.run import machine_name, pass_table, read_prompts
from bench.passes import PASS_SIZES
from bench.prompts import SETS
from bus.protocol.errors import ConfigurationError
from cli.main import app
from engines.catalog.registry import Specs
from engines.torch.weights import MappedWeights
from tests.engines.tiny import save_tiny, save_tiny_gguf

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.4,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def _llama(**options: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **options))


def _qwen(**options: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **options))


@pytest.mark.parametrize(
    "make",
    [
        lambda: _llama(tie_word_embeddings=True),
        lambda: _llama(rope_parameters=LLAMA3_ROPE, head_dim=16, attention_bias=True),
        lambda: _qwen(tie_word_embeddings=False, rms_norm_eps=1e-3),
    ],
)
def test_the_reference_computes_what_transformers_computes(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for name, tensor in model.named_parameters():  # biases and gains start as constants
        if name.endswith(".bias") or "norm" in name:
            torch.nn.init.normal_(tensor, mean=1.0, std=0.5)
    texts = [torch.randint(0, 97, (size,)) for size in (1, 7, 40)]
    reference = Reference(model.config, MappedWeights(model.state_dict()))
    layers: list[int] = []
    states = reference.hidden_states(texts, lambda: layers.append(1))
    assert len(layers) == 3
    for text, rows in zip(texts, states, strict=True):
        with torch.inference_mode():
            expected = model(text[None]).logits[0]
        torch.testing.assert_close(rows @ reference.head().T, expected, rtol=1e-4, atol=1e-4)


def test_the_reference_reads_a_gguf_file_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    reference = float_model(str(path))
    text = torch.arange(2, 22)
    (rows,) = reference.hidden_states([text])
    assert not (tmp_path / "cache").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = model(text[None]).logits[0]
    torch.testing.assert_close(rows @ reference.head().T, expected, rtol=1e-4, atol=1e-4)


def test_a_draft_with_a_narrowed_head_is_read_as_the_whole_model(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    assert float_draft(f"{directory}@32").head().shape == float_model(str(directory)).head().shape


def test_a_model_of_another_architecture_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 8, "n_head": 2, "n_layer": 1}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ConfigurationError, match=r"is a gpt2; .* Llama and Qwen2"):
        float_model(str(tmp_path))


def test_divergences_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    plain, rounded = rng.normal(0, 3, (2, 5, 11))
    plain[4], rounded[4, 3] = rounded[4], 50  # one position with another first choice
    rows = [2, None, 0, 10, 3]
    positions = Positions()
    positions.add(torch.tensor(plain), torch.tensor(rounded), rows)
    p, q = log_softmax(plain, axis=1), log_softmax(rounded, axis=1)
    kl = rel_entr(np.exp(p), np.exp(q)).sum(axis=1)
    np.testing.assert_allclose(positions.kl, kl, rtol=1e-9)
    assert positions.same == (plain.argmax(1) == rounded.argmax(1)).tolist()
    shift = [abs(q[i, row] - p[i, row]) for i, row in enumerate(rows) if row is not None]
    found = positions.summary("target", "all")
    assert found.num_tokens == 5
    assert found.mean_shift == pytest.approx(np.mean(shift))
    assert (found.mean_kl, found.median_kl, found.p99_kl) == pytest.approx(
        (kl.mean(), np.median(kl), np.quantile(kl, 0.99))
    )


def test_tokens_are_found_in_a_narrowed_head() -> None:
    assert head_rows([5, 9, 7], np.array([1, 5, 9], np.int32), 3) == [1, 2, None]
    assert head_rows([5, 9, 7], None, 8) == [5, None, 7]


def test_nothing_to_compare_is_said() -> None:
    with pytest.raises(ConfigurationError, match="no answer of 'all'"):
        Positions().summary("target", "all")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(save_tiny(tmp_path / "tiny", num_layers=1))


def test_answers_are_spread_over_the_sets_and_continued_from_the_file(
    tiny: str, tmp_path: Path
) -> None:
    prompts = {"a": ["the cat", "the dog", "sat"], "b": ["def add"]}
    keep = tmp_path / "answers.jsonl"
    first = read_answers(tiny, prompts, 9, keep, lambda _: None)
    assert sum(len(a.answer) for a in first if a.dataset == "a") == 5
    assert sum(len(a.answer) for a in first if a.dataset == "b") <= 4
    written = keep.read_text("utf-8")
    advanced: list[int] = []
    assert read_answers(tiny, prompts, 9, keep, advanced.append) == first
    assert keep.read_text("utf-8") == written
    assert sum(advanced) == sum(len(a.answer) for a in first)
    fewer = read_answers(tiny, prompts, 4, keep, lambda _: None)
    assert keep.read_text("utf-8") == written
    assert fewer[0].answer == first[0].answer[: len(fewer[0].answer)]
    more = read_answers(tiny, prompts, 40, keep, lambda _: None)
    assert more[0].answer[:2] == first[0].answer[:2]


def test_a_cut_answer_serves_shorter_limits_only() -> None:
    cut = TargetAnswer("m", "a", 0, (1, 2), (3, 4, 5), ended=False)
    assert cut.serves((1, 2), 3)
    assert not cut.serves((1, 2), 4)
    assert not cut.serves((1, 9), 3)
    assert TargetAnswer("m", "a", 0, (1, 2), (3, 4, 5), ended=True).serves((1, 2), 100)
    assert cut.cut(2).answer == (3, 4)


def test_target_and_draft_are_compared_over_all_answers_and_by_set(tiny: str) -> None:
    answers = [
        TargetAnswer("m", "a", 0, (5, 6, 7), (8, 9, 10, 11), ended=False),
        TargetAnswer("m", "b", 0, (20, 21), (22, 23), ended=False),
    ]
    begun: list[tuple[str, int]] = []

    def begin(what: str, steps: int) -> Any:
        begun.append((what, steps))
        return lambda: None

    found = compare(Specs(tiny, tiny), answers, begin)
    assert begun == [
        ("target: float32", 1), ("target: int8", 2), ("draft: float32", 1), ("draft: int8", 2),
    ]  # fmt: skip
    assert [(row.role, row.prompt_set, row.num_tokens) for row in found] == [
        (role, name, count)
        for role in ("target", "draft")
        for name, count in ((ALL, 6), ("a", 4), ("b", 2))
    ]
    assert all(0 < row.mean_kl < 0.1 for row in found)  # rounded, and of the same weights
    assert found[0].mean_kl == pytest.approx((4 * found[1].mean_kl + 2 * found[2].mean_kl) / 6)


FAKE_LLAMA = """
import os
__version__ = "9.9"
print("noise on the standard output")
os.write(1, b"noise of a C library\\n")
class Llama:
    def __init__(self, model, **options):
        if "missing" in model:
            raise ValueError("no such model")
        assert options["n_threads"] == options["n_threads_batch"] == 1 and options["logits_all"]
        self.n_tokens = 0
    def n_vocab(self):
        return 50
    def eval(self, tokens):
        assert self.n_tokens in (0, 3), self.n_tokens
        if tokens == [13]:
            raise RuntimeError("decode failed")
        self.n_tokens += len(tokens)
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """One whose llama_cpp is the fake above."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/llama_cpp.py").write_text(FAKE_LLAMA, "utf-8")
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\nshift\nPYTHONPATH="{tmp_path}/packages" exec "{sys.executable}" "$@"\n',
        "utf-8",
    )
    path.chmod(0o755)
    return path


def test_llama_cpp_times_passes_and_removes_them(interpreter: Path) -> None:
    with LlamaCpp(interpreter, Path("x.gguf"), 0, [1, 2, 3]) as llama:
        assert llama.version == "9.9"
        assert llama.time_ms([4]) > 0
        assert llama.time_ms([4, 5]) > 0
        with pytest.raises(ConfigurationError, match="RuntimeError: decode failed"):
            llama.time_ms([13])


def test_llama_cpp_that_cannot_read_the_model_is_said(interpreter: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such model; expected"):
        LlamaCpp(interpreter, Path("missing.gguf"), 0, [1]).__enter__()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('no module here')", "no module here"),
        ("pass", "it ended without an answer"),
        ("print('[1]', flush=True); input(); input()", "failed: "),
        ("print('nonsense', flush=True); input(); input()", "failed: "),
    ],
)
def test_a_process_that_does_not_speak_the_protocol_is_refused(
    tmp_path: Path, program: str, message: str
) -> None:
    script = tmp_path / "child.py"
    script.write_text(program, "utf-8")
    llama = LlamaCpp(Path(sys.executable), Path("x.gguf"), 0, [1], script)
    with pytest.raises(ConfigurationError, match=message):
        llama.__enter__()


def test_an_interpreter_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be started"):
        LlamaCpp(tmp_path / "python", Path("x.gguf"), 0, [1]).__enter__()


def _table() -> PassTable:
    sizes = PASS_SIZES
    timings = [Timing(DRAFT, 1, 5.0, 4.0)]
    timings += [Timing(INT8, size, 20.0 + size, 20.0) for size in sizes]
    timings += [Timing(LLAMA_CPP, size, 21.0 * size, 20.0) for size in sizes]
    return PassTable(10**9, 10**8, 1e11, tuple(timings), "x.Q4_K_M.gguf", "9.9")


def test_ratios_are_of_medians() -> None:
    ratios = _table().ratios()
    assert ratios["t(8)/t(1)"] == pytest.approx(28 / 21)
    assert ratios["t(1)/floor"] == pytest.approx(2.1)
    assert ratios["draft step/t(1)"] == pytest.approx(5 / 21)
    assert ratios["int8/llama.cpp at 8"] == pytest.approx(28 / (21 * 8))
    assert _table().as_json()["floor_ms"] == pytest.approx(10.0)


def test_the_table_has_a_row_for_each_length_and_one_for_the_draft() -> None:
    table = pass_table(_table(), machine_name())
    assert table.row_count == len(PASS_SIZES) + 1
    assert [str(column.header) for column in table.columns] == [
        "tokens", "int8", "llama.cpp x.Q4_K_M.gguf", "int8 ÷ llama.cpp",
    ]  # fmt: skip


def test_prompts_are_the_projects_own_or_those_of_the_files(tmp_path: Path) -> None:
    assert read_prompts(()) == SETS
    (tmp_path / "mine.jsonl").write_text('{"prompt": "x"}\n{"question": "y", "answer": "#### 3"}\n')
    (asked,) = read_prompts([tmp_path / "mine.jsonl"]).values()
    assert asked[0] == "x"
    assert asked[1].startswith("y\n\nLet's think")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--compare", "int4"], 2, "use float32"),
        (["--llama-cpp", "/nowhere/python"], 2, "no such file"),
        (["--tokens", "0", "--repeats", "0"], 2, "nothing to measure"),
        (["--pair", "defualt"], 1, "did you mean 'default'?"),
        (["--datasets", "mmlu"], 1, "--data DIR"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], status: int, message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "int8", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == status
    assert message in done.stderr


def test_the_command_writes_what_it_prints(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--target", tiny, "--draft", f"{tiny}", "--tokens", "4", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", "int8", *arguments, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((out / "int8.json").read_text("utf-8"))
    assert {row["role"] for row in printed["quality"]} == {"target", "draft"}
    assert len(printed["passes"]["timings"]) == 1 + len(PASS_SIZES)


def test_llama_cpp_needs_a_gguf_target(tiny: str) -> None:
    arguments = ["--target", tiny, "--draft", tiny, "--tokens", "0", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", "int8", *arguments, "--llama-cpp", sys.executable])
    assert done.exit_code == 1
    assert "llama.cpp runs GGUF files" in done.stderr
