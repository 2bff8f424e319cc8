from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from bench.reference import (
    generate_alone,
    replay_choices,
    replay_shortfalls,
    replay_windows,
    score,
)
from bus.protocol.arrays import Float64Array
from bus.protocol.errors import LocalError
from decoding.coupling import noise
from decoding.engine import Want
from decoding.sampling import SamplingParams, warp_dense
from engines.chat import encode_prompt
from engines.padding import LeastTimes, Padding
from engines.torch.loading import load_causal_lm
from engines.torch.target import TargetCache, TargetModel
from tests.engines.tiny import save_tiny

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=7)
PROMPT = [5, 17, 99, 42, 7, 120]
IDS = np.array([3, 250, 41, 9], dtype=np.int32)
NEVER: frozenset[int] = frozenset()


PADDING = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("target"), padding=PADDING))


@pytest.fixture(scope="module")
def target(directory: str) -> TargetModel:
    return TargetModel.load(directory, "float32", "cpu")


@pytest.fixture(scope="module")
def plain(directory: str) -> Any:
    """The same model as transformers runs it."""
    return load_causal_lm(directory, "float32", "cpu").model


def logits_after(plain: Any, tokens: list[int]) -> Float64Array:
    """float64[len(tokens), V] without any cache, as a reference."""
    with torch.inference_mode():
        logits = plain(torch.tensor([tokens]), use_cache=False).logits
    dense: Float64Array = logits[0, :, :-PADDING].double().numpy()
    return dense


def full_row(target: TargetModel, cache: TargetCache, index: int) -> Float64Array:
    row = target.row(cache, index, Want(0, full=True)).full
    assert row is not None
    return row


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SamplingParams(temperature=1.0)])
def test_rows_belong_to_the_last_tokens_of_the_feed(
    target: TargetModel, plain: Any, sampling: SamplingParams
) -> None:
    rows, verify_ms = target.forward(target.open(sampling), PROMPT, [IDS, IDS[:2], IDS[:0]])
    dense = logits_after(plain, PROMPT)[-3:]
    assert verify_ms > 0
    for row, logits, ids in zip(rows, dense, (IDS, IDS[:2], IDS[:0]), strict=True):
        p1 = warp_dense(logits, SamplingParams(temperature=1.0))
        assert row.argmax == logits.argmax()
        np.testing.assert_allclose(row.p1_at_q, p1[ids], rtol=1e-4)
        if sampling.greedy:
            assert row.p_at_q.size == 0
        else:
            np.testing.assert_allclose(row.p_at_q, warp_dense(logits, sampling)[ids], rtol=1e-4)


def test_padding_beyond_the_real_tokens_takes_no_probability(
    target: TargetModel, plain: Any
) -> None:
    cache = target.open(SAMPLED)
    target.forward(cache, PROMPT, [IDS])
    row = full_row(target, cache, 0)
    assert row.shape == (target.vocab_size,)
    assert target.vocab_size == plain.config.vocab_size - PADDING
    assert row.sum() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_full_rows_are_those_of_the_last_pass_and_survive_a_crop(
    target: TargetModel, plain: Any, sampling: SamplingParams
) -> None:
    cache = target.open(sampling)
    target.forward(cache, [1, 2, 3], [IDS])
    target.keep(cache, 0)
    target.forward(cache, PROMPT, [IDS] * 4)
    target.keep(cache, 3)
    dense = logits_after(plain, PROMPT)[-4:]
    for index in range(4):
        np.testing.assert_allclose(
            full_row(target, cache, index), warp_dense(dense[index], sampling), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("index", [-1, 2])
def test_a_row_that_is_not_there_is_an_error_of_the_caller(target: TargetModel, index: int) -> None:
    cache = target.open(GREEDY)
    with pytest.raises(LocalError, match="no such row"):
        full_row(target, cache, 0)
    target.forward(cache, PROMPT, [IDS] * 2)
    with pytest.raises(LocalError, match="no such row"):
        full_row(target, cache, index)
    target.prefill(cache, [1])
    with pytest.raises(LocalError, match="no such row"):
        full_row(target, cache, 0)


@pytest.mark.parametrize(("feed", "num_rows"), [([1, 2], 3), ([], 0)])
def test_rows_without_tokens_are_an_error_of_the_caller(
    target: TargetModel, feed: list[int], num_rows: int
) -> None:
    with pytest.raises(LocalError, match=r"at least one token|were asked for"):
        target.forward(target.open(GREEDY), feed, [IDS] * num_rows)


def test_after_a_rollback_a_pass_equals_a_fresh_one(target: TargetModel) -> None:
    cache = target.open(SAMPLED)
    target.prefill(cache, PROMPT)
    target.forward(cache, [8, 9, 10, 11, 12], [IDS] * 5)
    target.keep(cache, len(PROMPT) + 2)
    (again,), _ = target.forward(cache, [77], [IDS])
    (fresh,), _ = target.forward(target.open(SAMPLED), [*PROMPT, 8, 9, 77], [IDS])
    assert cache.length == len(PROMPT) + 3
    np.testing.assert_allclose(again.p_at_q, fresh.p_at_q, rtol=1e-4)
    assert again.argmax == fresh.argmax


def test_prefill_in_chunks_equals_one_pass(target: TargetModel) -> None:
    prompt = [(7 * i) % 280 + 2 for i in range(90)]
    cache = target.open(SAMPLED)
    for begin in range(0, 80, 32):
        target.prefill(cache, prompt[begin : min(begin + 32, 80)])
    target.prefill(cache, [])
    assert cache.length == 80
    (chunked,), _ = target.forward(cache, prompt[80:], [IDS])
    (whole,), _ = target.forward(target.open(SAMPLED), prompt, [IDS])
    np.testing.assert_allclose(chunked.p1_at_q, whole.p1_at_q, rtol=1e-4)


def test_sessions_do_not_see_each_other(target: TargetModel, plain: Any) -> None:
    one, other = target.open(GREEDY), target.open(GREEDY)
    target.prefill(one, PROMPT)
    target.prefill(other, [200, 201])
    (row,), _ = target.forward(one, [8], [IDS])
    np.testing.assert_allclose(
        row.p1_at_q,
        warp_dense(logits_after(plain, [*PROMPT, 8])[-1], SamplingParams(1.0))[IDS],
        rtol=1e-4,
    )


# --- the reference ----------------------------------------------------------------------------


def test_alone_the_target_is_what_transformers_generates(target: TargetModel, plain: Any) -> None:
    ours = list(generate_alone(target, PROMPT, GREEDY, 30, target.eos_tokens))
    theirs = plain.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)
    assert ours == theirs[0, len(PROMPT) :].tolist()


def test_alone_the_target_draws_by_seed_and_position(target: TargetModel, plain: Any) -> None:
    tokens = list(generate_alone(target, PROMPT, SAMPLED, 8, NEVER))
    dense = logits_after(plain, PROMPT + tokens)
    for index, token in enumerate(tokens):
        position = len(PROMPT) + index
        with np.errstate(divide="ignore"):
            log_p = np.log(warp_dense(dense[position - 1], SAMPLED))
        noisy = log_p - np.log(-np.log(noise(SAMPLED.seed, position, log_p.size)))
        assert token == int(np.argmax(noisy))


def test_alone_the_target_stops_behind_an_end_token(target: TargetModel) -> None:
    free = list(generate_alone(target, PROMPT, SAMPLED, 20, NEVER))
    stopped = list(generate_alone(target, PROMPT, SAMPLED, 20, frozenset({free[4]})))
    assert stopped == free[: free.index(free[4]) + 1]


def test_replays_tell_argmax_lead_and_shortfall(target: TargetModel, plain: Any) -> None:
    tokens = list(generate_alone(target, PROMPT, GREEDY, 6, NEVER))
    dense = logits_after(plain, PROMPT + tokens)[len(PROMPT) - 1 : -1]
    for choice, token, logits in zip(
        replay_choices(target, PROMPT, tokens, GREEDY), tokens, dense, strict=True
    ):
        assert choice.token == token
        assert choice.lead == pytest.approx(logits.max() - np.sort(logits)[-2], abs=1e-4)
    sampled = list(generate_alone(target, PROMPT, SAMPLED, 6, NEVER))
    choices = replay_choices(target, PROMPT, sampled, SAMPLED)
    assert [choice.token for choice in choices] == sampled
    assert all(choice.lead > 0 and 0 <= choice.margin < 1 for choice in choices)
    tokens[-1] = int(dense[-1].argmin())
    shortfalls = replay_shortfalls(target, PROMPT, tokens)
    assert shortfalls[:-1] == [0.0] * 5
    assert shortfalls[-1] == pytest.approx(dense[-1].max() - dense[-1].min(), abs=1e-4)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_windows_and_single_tokens_differ_only_by_rounding(
    target: TargetModel, window: int
) -> None:
    tokens = list(generate_alone(target, PROMPT, SAMPLED, 20, NEVER))
    epsilon = replay_windows(target, PROMPT, tokens, window)
    assert epsilon < 1e-4
    assert (window > 1) or epsilon == 0.0
    assert replay_windows(target, PROMPT, [], window) == 0.0


# --- the default pair -------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow_model
def test_windows_of_the_default_target_commit_what_transformers_generates() -> None:
    """Greedy, with windows of the true answer and of wrong tokens in turn."""
    target = TargetModel.load("default", "float32", "cpu")
    prompt = list(encode_prompt(target.tokenizer, "Write one sentence about the sea.", False))
    plain = load_causal_lm("default", "float32", "cpu").model
    answer = plain.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=2
    )[0].tolist()
    cache, tokens = target.open(GREEDY), list(prompt)
    target.prefill(cache, tokens[:-1])
    while len(tokens) < len(answer):
        drafted = answer[len(tokens) : len(tokens) + 4]
        if len(tokens) % 2:
            drafted = [drafted[0], *(token + 1 for token in drafted[1:])]
        feed = tokens[cache.length :] + drafted
        rows, _ = target.forward(cache, feed, [IDS] * (len(drafted) + 1))
        for row, token in zip(rows, [*drafted, None], strict=True):
            tokens.append(row.argmax)
            if row.argmax != token:
                break
        target.keep(cache, min(cache.length, len(tokens) - 1))
    assert tokens[: len(answer)] == answer


@pytest.mark.parametrize("tokens", [[3], [3, 250, 41, 9, 88]])
def test_the_score_of_an_answer_is_that_of_its_log_probabilities(
    target: TargetModel, plain: Any, tokens: list[int]
) -> None:
    rows = torch.tensor(logits_after(plain, PROMPT + tokens)[len(PROMPT) - 1 : -1])
    logs = torch.log_softmax(rows, dim=-1)
    chosen = logs[range(len(tokens)), tokens]
    quality = score(target, PROMPT, tokens)
    assert quality.num_tokens == len(tokens)
    assert quality.log_likelihood == pytest.approx(chosen.sum().item(), abs=1e-4)
    assert quality.regret == pytest.approx(
        (logs.max(dim=-1).values - chosen).sum().item(), abs=1e-4
    )
    greedy = list(generate_alone(target, PROMPT, GREEDY, 6, NEVER))
    best = score(target, PROMPT, greedy)
    assert (best.num_greedy, best.regret) == (6, 0.0)


def test_a_pass_takes_its_least_time(directory: str) -> None:
    """Not how long exactly: a pass that needs 1 ms takes at least 30."""
    model = TargetModel.load(directory, "float32", "cpu")
    model.padding = Padding(LeastTimes.parse("30"))
    cache = model.open(GREEDY)
    began = time.perf_counter()
    model.forward(cache, PROMPT, [IDS])
    assert time.perf_counter() - began >= 0.03
