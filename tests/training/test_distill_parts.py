"""The parts of `distill`, each against something that says what it should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bus.protocol.errors import ConfigurationError
from decoding.acceptance import expected_accepted, jensen_shannon, overlap
from decoding.sampling import from_wire
from engines.torch.cache import KVCache
from engines.torch.draft import DRAFT_WEIGHTS, TrimmedDraft, load_draft
from engines.torch.draft_file import quantise
from engines.torch.loading import LoadedModel, load_causal_lm
from tests.engines.tiny import byte_level_tokenizer, save_tiny
from training.distill.answers import Prompt, answer, read
from training.distill.batches import collate, plan_batches
from training.distill.evaluation import accepted_per_window, score, summarise
from training.distill.prompts import read_prompts, read_texts
from training.distill.records import Record, load_shard, save_shard
from training.distill.student import (
    choose_layers,
    make_student,
    prune_depth,
    save_directory,
    save_weights,
)
from training.distill.training import distillation_loss, rows_of_tokens
from training.distill.vocabulary import expected_counts, rank_vocabulary
from training.optimiser import learning_rate_factor

CPU = torch.device("cpu")
VOCAB = torch.arange(0, 290, 3, dtype=torch.int32)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = save_tiny(tmp_path_factory.mktemp("models") / "target", num_layers=3)
    return load_causal_lm(str(path), "float32", "cpu")


@pytest.fixture(scope="module")
def records(target: LoadedModel) -> list[Record]:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(tuple(rng.integers(2, 290, n).tolist()), f"set{n % 2}") for n in (1, 9, 4, 17)
    ]
    return answer(target, prompts, max_new_tokens=12)


def test_answers_of_a_group_are_those_of_each_prompt_alone(
    target: LoadedModel, records: list[Record]
) -> None:
    for record in records:
        alone = target.model.generate(
            record.prompt[None].long(),
            attention_mask=torch.ones(1, len(record.prompt)),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=sorted(target.eos_tokens),
        )[0]
        assert record.answer.tolist() == alone[len(record.prompt) :].tolist()
        with torch.inference_mode():
            p = target.model(alone[None, :-1]).logits[0, len(record.prompt) - 1 :, :290].softmax(-1)
        assert torch.equal(record.top_ids[:, 0], record.answer)
        torch.testing.assert_close(
            record.top_probs.float(), p.gather(1, record.top_ids.long()), rtol=2e-3, atol=1e-4
        )


def test_an_end_token_ends_one_answer_and_not_its_neighbours(target: LoadedModel) -> None:
    prompts = [Prompt((5, 6, 7), "a"), Prompt((50, 60), "b"), Prompt((90,), "c")]
    whole = answer(target, prompts, 12)
    early = int(whole[1].answer[2])
    ends = replace(target, eos_tokens=frozenset({early}))
    for before, after in zip(whole, answer(ends, prompts, 12), strict=True):
        tokens = before.answer.tolist()
        cut = tokens.index(early) + 1 if early in tokens else len(tokens)
        assert after.answer.tolist() == tokens[:cut]
        assert torch.equal(after.top_ids, before.top_ids[:cut])


def test_answers_stop_when_the_time_is_over(target: LoadedModel) -> None:
    prompts = [Prompt((5, 6, 7), "a"), Prompt((90,), "c")]
    whole, turns = answer(target, prompts, 12), iter([False, False, True])
    for cut, record in zip(answer(target, prompts, 12, lambda: next(turns)), whole, strict=True):
        assert cut.answer.tolist() == record.answer[:3].tolist()
        assert cut.top_ids.shape == (3, 48)


def test_a_text_read_is_a_record_with_the_targets_thoughts(target: LoadedModel) -> None:
    record = read(target, [5, 6, 7, 8], "corpus")
    with torch.inference_mode():
        best = target.model(torch.tensor([[5, 6, 7]])).logits[0, :, :290].argmax(-1)
    assert record.prompt.tolist() == [5]
    assert record.answer.tolist() == [6, 7, 8]
    assert record.top_ids[:, 0].tolist() == best.tolist()


def test_a_shard_keeps_records(records: list[Record], tmp_path: Path) -> None:
    save_shard(tmp_path / "a.safetensors", records)
    for kept, record in zip(load_shard(tmp_path / "a.safetensors"), records, strict=True):
        assert kept.prompt_set == record.prompt_set
        for name in ("prompt", "answer", "top_ids", "top_probs"):
            assert torch.equal(getattr(kept, name), getattr(record, name))


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigurationError, match="no shard of answers"):
        load_shard(tmp_path / "a.safetensors")


def test_batches_hold_every_record_once_and_little_padding(target: LoadedModel) -> None:
    rng = np.random.default_rng(1)
    empty = torch.zeros(0)
    lengths = [(int(p), int(a)) for p, a in rng.integers(1, 100, (200, 2))]
    records = [Record(torch.zeros(p), torch.zeros(a), empty, empty, "") for p, a in lengths]
    batches = plan_batches(records, 512, seed=0)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    padded = [len(batch) * max(lengths[i][1] for i in batch) for batch in batches]
    assert max(padded) <= 512
    assert sum(padded) < 1.2 * sum(a for _, a in lengths)
    assert batches != plan_batches(records, 512, seed=1)


def test_with_every_layer_kept_the_students_logits_are_the_targets(
    target: LoadedModel, records: list[Record]
) -> None:
    """Also: padding on both sides of a batch changes nothing."""
    student = make_student(prune_depth(target.model, (0, 1, 2)), target.model, VOCAB)
    logits = student.logits(collate(records, CPU))
    begin = 0
    for record in records:
        text = torch.cat([record.prompt, record.answer])[:-1].long()
        with torch.inference_mode():
            whole = target.model(text[None]).logits[0, len(record.prompt) - 1 :]
        here = logits[begin : begin + len(record.answer)]
        torch.testing.assert_close(here.detach(), whole[:, VOCAB.long()], rtol=1e-4, atol=1e-4)
        begin += len(record.answer)
    assert begin == len(logits)


def test_only_layers_and_norms_learn(target: LoadedModel, records: list[Record]) -> None:
    student = make_student(prune_depth(target.model, (0, 2)), target.model, VOCAB)
    torch.autograd.backward(student.logits(collate(records, CPU)).square().mean())
    names = set(student.trainable())
    assert "embed_tokens.weight" not in names
    assert {
        "norm.weight",
        "layers.0.mlp.up_proj.weight",
        "layers.1.self_attn.q_proj.weight",
    } < names
    assert all(weight.grad is not None for weight in student.trainable().values())
    assert all(weight.grad is None for weight in target.model.parameters())


def test_the_loss_is_least_where_the_draft_thinks_as_the_target(records: list[Record]) -> None:
    batch = collate(records[:1], CPU)
    rows = rows_of_tokens(torch.arange(290), 290)
    same = torch.full((len(batch.top_ids), 290), -30.0)
    same.scatter_(1, batch.top_ids.long(), batch.top_probs.float().log())
    same.requires_grad_(True)
    loss = distillation_loss(same, batch, rows)
    (gradient,) = torch.autograd.grad(loss, same)
    p = batch.top_probs.float()
    least = -(p * (p / p.sum(1, keepdim=True)).log()).sum(1).mean()
    assert gradient.abs().max() < 1e-3 / len(same)
    assert float(loss.detach()) == pytest.approx(float(least), abs=1e-3)
    assert distillation_loss(same + torch.randn_like(same), batch, rows) > loss


def test_tokens_outside_the_head_are_not_asked_for(records: list[Record]) -> None:
    batch = collate(records[:1], CPU)
    inside = torch.isin(batch.top_ids.long(), VOCAB.long())
    logits = torch.zeros(len(batch.top_ids), len(VOCAB))
    expected = (batch.top_probs.float() * inside).sum(1).mean() * np.log(len(VOCAB))
    loss = distillation_loss(logits, batch, rows_of_tokens(VOCAB, 290))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [learning_rate_factor(step / 100, 0.1) for step in range(101)]
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] > 0.0
    assert rates[100] == pytest.approx(0.0)


def test_the_head_has_special_tokens_and_then_the_most_frequent() -> None:
    counts = torch.tensor([0.0, 5.0, 0.0, 9.0, 1.0, 0.0])
    assert rank_vocabulary(counts, 4, special=[5]).tolist() == [1, 3, 4, 5]
    assert rank_vocabulary(counts, 5, special=[5]).tolist() == [0, 1, 3, 4, 5]  # unseen: by id
    assert rank_vocabulary(counts, 99, special=[]).tolist() == [0, 1, 2, 3, 4, 5]


def test_expected_counts_are_the_targets_probabilities(records: list[Record]) -> None:
    counts = expected_counts(records, 290)
    assert float(counts.sum()) == pytest.approx(
        sum(float(r.top_probs.double().sum()) for r in records)
    )


def test_scores_are_those_of_verification(records: list[Record]) -> None:
    """Against `decoding.acceptance` on what the edge would send, the target's tail left out."""
    record = records[3]
    logits = torch.randn(len(record.answer), len(VOCAB), generator=torch.Generator().manual_seed(0))
    scores = score(3 * logits, record, VOCAB, rows_of_tokens(VOCAB, 290))
    probs, rows = (3 * logits).softmax(-1).topk(48)
    for i in range(len(record.answer)):
        q1 = from_wire(VOCAB[rows[i]].numpy(), probs[i].half().numpy())
        known = dict(zip(record.top_ids[i].tolist(), record.top_probs[i].tolist(), strict=True))
        p1 = np.array([known.get(token, 0.0) for token in q1.ids.tolist()])
        assert float(scores.overlap[i]) == pytest.approx(overlap(p1, q1.probs), abs=2e-3)
        assert float(scores.divergence[i]) == pytest.approx(jensen_shannon(p1, q1.probs), abs=2e-3)
        assert bool(scores.agrees[i]) == (q1.argmax == int(record.answer[i]))


def test_accepted_tokens_are_counted_as_lockstep_would() -> None:
    yes, no = True, False
    # Windows of 2: [yes yes] + bonus, [no …] + correction, [yes no] + correction, then the end.
    assert accepted_per_window([[yes, yes, no, no, yes, yes, no, yes]], 2) == (2 + 0 + 2) / 3
    assert accepted_per_window([[yes]], 2) == 0.0


def test_expected_lengths_of_an_answer_are_papers(records: list[Record]) -> None:
    record = records[0]
    logits = torch.randn(len(record.answer), len(VOCAB))
    scores = score(logits, record, VOCAB, rows_of_tokens(VOCAB, 290))
    quality = summarise([scores], windows=(12,))
    assert len(record.answer) == 12
    expected = expected_accepted(scores.overlap.tolist())
    assert quality.accepted_sampled[12] == pytest.approx(expected)


def test_which_layers_a_number_stands_for(target: LoadedModel) -> None:
    assert choose_layers(target.model, 1) == (0,)
    assert choose_layers(target.model, 2) == (0, 2)
    assert choose_layers(target.model, 3) == (0, 1, 2)
    with pytest.raises(ConfigurationError, match="has 3 layers"):
        choose_layers(target.model, 4)
    with pytest.raises(ConfigurationError, match="layers 0 to 2"):
        prune_depth(target.model, (0, 3))


def test_a_weight_survives_quantisation_to_half_a_step() -> None:
    weight = torch.randn(5, 40) * torch.tensor([1e-4, 0.1, 1.0, 10.0, 0.0])[:, None]
    quantised, scale = quantise(weight)
    error = (quantised.float() * scale.float()[:, None] - weight).abs().amax(1)
    assert torch.all(error <= 0.51 * scale.float() + 1e-3 * weight.abs().amax(1))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
def test_other_architectures_become_drafts(architecture: str, tmp_path: Path) -> None:
    """With every layer kept, the directory's draft has the target's own logits."""
    path = tmp_path / "target"
    _other(architecture).save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    target = load_causal_lm(str(path), "float32", "cpu")
    student = make_student(prune_depth(target.model, (0, 1)), target.model, VOCAB)
    out = tmp_path / "draft"
    out.mkdir()
    save_directory(student, target, out)
    save_weights(student, out / DRAFT_WEIGHTS)
    draft = load_draft(str(out), "float32", "cpu")
    assert draft.tokenizer_digest == target.tokenizer_digest
    assert isinstance(draft.network, TrimmedDraft)
    ids = torch.arange(20, 40)[None]
    with torch.inference_mode():
        expected = target.model(ids).logits[0][:, VOCAB.long()]
        rows = draft.network.logits(ids[0], KVCache(), ids.shape[1])
    assert torch.corrcoef(torch.stack([rows.flatten(), expected.flatten()]))[0, 1] > 0.99


def _other(architecture: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": 296, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    shape = common | {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }  # fmt: skip
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
    if architecture == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=None))
    return GPT2LMHeadModel(
        GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3)
    )


def test_prompts_come_from_lines_and_json_lines(target: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n\nthe dog\n", "utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "the cat", "set": "pets"}\n', "utf-8")
    lines = read_prompts(tmp_path / "a.txt", target, 100)
    rows = read_prompts(tmp_path / "b.jsonl", target, 100)
    assert [prompt.prompt_set for prompt in lines + rows] == ["a", "a", "pets"]
    assert rows[0].tokens == lines[0].tokens
    with pytest.raises(ConfigurationError, match="no prompt of at most 3 tokens"):
        read_prompts(tmp_path / "a.txt", target, 3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"prompt": ', "line 1 is not JSON"),
        ('{"question": "x"}', "has no field 'prompt'"),
        ('{"prompt": 3}', "must be text"),
        ("", "no prompt"),
    ],
)
def test_bad_prompts_files_are_refused(
    text: str, complaint: str, target: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(text, "utf-8")
    with pytest.raises(ConfigurationError, match=complaint):
        read_prompts(tmp_path / "a.jsonl", target, 100)


def test_texts_are_cut_into_pieces(target: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat", "utf-8")
    whole = target.tokenizer.encode("the cat sat on the mat", add_special_tokens=False)
    pieces = read_texts(tmp_path / "a.txt", target, 4)
    assert [token for piece in pieces for token in piece] == whole[: sum(map(len, pieces))]
    assert all(2 <= len(piece) <= 4 for piece in pieces)
