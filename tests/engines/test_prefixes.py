"""The prefix cache: no bit changes in int8, no token runs twice, memory is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bus.protocol.chat import parse_messages
from bus.protocol.errors import LocalError
from decoding.sampling import SamplingParams
from engines.chat import encode_messages
from engines.kinds import DrafterKind, drafter_of
from engines.thread import PREFILL_CHUNK
from engines.torch.cache import KVCache
from engines.torch.draft import LoadedDraft, WholeDraft
from engines.torch.drafter import ModelDrafter
from engines.torch.integer_decoder import convert
from engines.torch.linears import integer
from engines.torch.loading import LoadedModel
from engines.torch.network import CausalNetwork
from engines.torch.parts import Part
from engines.torch.precision import NumberFormat
from engines.torch.prefixes import MIN_REUSED, Prefix, PrefixCache
from engines.torch.target import TargetCache, TargetModel
from engines.torch.weights import MappedWeights
from tests.engines.tiny import byte_level_tokenizer, tiny_llama, tiny_qwen2

GREEDY = SamplingParams()
IDS = [np.array([3, 250, 41, 9], dtype=np.int32)]
NEVER: frozenset[int] = frozenset()
VOCAB = 290
CPU = torch.device("cpu")


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Counted:
    """A network that counts the tokens it runs, and fails when told to."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self.num_run = 0
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def run(self, parts: Sequence[Part]) -> Any:
        self.num_run += sum(part.size for part in parts)
        rows = self._network.run(parts)
        if self.fails:
            raise RuntimeError("out of memory")
        return rows


def loaded(make: Any, seed: int = 0) -> LoadedModel:
    """A tiny model in int8."""
    model, tokenizer = make(VOCAB, seed), byte_level_tokenizer(VOCAB)
    head = model.get_output_embeddings().weight.detach().float()
    decoder = convert(model.config, MappedWeights(model.state_dict()), head)
    return LoadedModel(
        model=decoder, tokenizer=tokenizer, name="tiny", dtype=NumberFormat.INT8, device=CPU,
        context_length=2048, vocab_size=VOCAB, tokenizer_digest="t", eos_tokens=NEVER,
    )  # fmt: skip


def target_of(source: LoadedModel, max_mb: int = 64) -> TargetModel:
    target = TargetModel(source)
    target.network = Counted(target.network)  # type: ignore[assignment]
    target.prefixes = PrefixCache(max_mb)
    return target


def draft_of(source: LoadedModel, max_mb: int = 64) -> tuple[ModelDrafter, Counted]:
    network = Counted(WholeDraft(CausalNetwork(source.model, VOCAB, integer), VOCAB))
    draft = ModelDrafter(
        LoadedDraft(
            network=network, tokenizer=source.tokenizer, name="tiny", dtype=source.dtype,
            device=CPU, context_length=2048, vocab_size=VOCAB, tokenizer_digest="t",
        ),
    )  # fmt: skip
    draft.prefixes = PrefixCache(max_mb)
    network.num_run = 0  # the probe's
    return draft, network


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen2])
def source(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded(request.param)


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return loaded(tiny_llama)


def run(target: TargetModel, tokens: Sequence[int]) -> tuple[TargetCache, Tensor, int]:
    """Open a session as a worker does; its cache, first row of logits and the tokens run."""
    network: Any = target.network
    before, cache = network.num_run, target.open(GREEDY)
    for begin in range(0, len(tokens) - 1, PREFILL_CHUNK):
        target.prefill(cache, tokens[begin : min(begin + PREFILL_CHUNK, len(tokens) - 1)])
    target.forward(cache, tokens[-1:], IDS)
    return cache, cache.rows[0].logits.clone(), network.num_run - before


def go_on(target: TargetModel, cache: TargetCache, count: int) -> list[int]:
    """Greedy tokens by passes of one."""
    tokens = [int(cache.rows[0].logits[-1].argmax())]
    while len(tokens) < count:
        rows, _ = target.forward(cache, tokens[-1:], IDS)
        tokens.append(rows[0].argmax)
    return tokens


def held(prefix: Prefix) -> list[Tensor]:
    layers: Any = prefix.keys_values.states.layers
    return [x.clone() for layer in layers for x in (layer.keys, layer.values)]


def same(one: Prefix, other: Prefix) -> bool:
    pairs = zip(held(one), held(other), strict=True)
    return one.tokens == other.tokens and all(torch.equal(a, b) for a, b in pairs)


# --- no bit changes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "prompt", "num_reused"),
    [
        (text(40), text(40), 39),  # the same prompt; its last token is run for its row
        (text(600), text(600), 599),  # in chunks
        (text(600), text(600)[:300] + text(300, 1), 300),  # parts within the second chunk
        (text(300), text(600), 300),  # goes on
        (text(300), text(200), 199),  # is shorter
        (text(40), text(MIN_REUSED) + text(30, 1), MIN_REUSED),
        (text(40), [*text(MIN_REUSED - 1), 7, *text(30, 1)], 0),  # not worth it
        (text(40), text(40, 1), 0),
    ],
)
def test_reuse_changes_no_bit_and_runs_only_what_is_new(
    source: LoadedModel, kept: list[int], prompt: list[int], num_reused: int
) -> None:
    fresh, alone, _ = run(target_of(source, max_mb=0), prompt)
    target = target_of(source)
    first, _, num_first = run(target, kept)
    assert num_first == len(kept)
    target.close(first)
    cache, rows, num_run = run(target, prompt)
    assert num_run == len(prompt) - num_reused
    assert torch.equal(rows, alone)
    assert same(cache.prefix, fresh.prefix)
    assert go_on(target, cache, 12) == go_on(target, fresh, 12)
    assert same(cache.prefix, fresh.prefix)
    assert (target.prefixes.num_hits, target.prefixes.num_tokens) == (num_reused > 0, num_reused)


def test_a_continued_chat_reuses_prompt_and_answer(source: LoadedModel) -> None:
    """Positions that decoding wrote are as good as those of a prefill, after a rollback too."""
    target, prompt = target_of(source), text(50)
    cache, _, _ = run(target, prompt)
    target.forward(cache, text(5, 9), IDS)  # a window that is rejected
    target.keep(cache, len(prompt))
    target.forward(target.open(GREEDY), [1, 2], IDS)  # another session's pass
    target.keep(cache, len(prompt) - 1)
    target.forward(cache, prompt[-1:], IDS)
    answer = go_on(target, cache, 30)
    target.close(cache)
    longer = [*prompt, *answer, *text(40, 2)]
    cache, rows, num_run = run(target, longer)
    fresh, alone, _ = run(target_of(source, max_mb=0), longer)
    assert num_run == 41  # what is new, and the answer's last token, which nobody had run
    assert torch.equal(rows, alone)
    assert same(cache.prefix, fresh.prefix)


def test_the_next_turn_of_a_chat_runs_only_what_is_new(llama: LoadedModel) -> None:
    """The template gives the answer back as the tokens it was written in, its end included."""
    target, tokenizer, says = target_of(llama), llama.tokenizer, "the dog ran to the house. Grüße!"
    turn = {"role": "user", "content": "the cat sat on the mat"}
    prompt = encode_messages(tokenizer, parse_messages([turn]))
    answer = [*tokenizer.encode(says, add_special_tokens=False), tokenizer.eos_token_id]
    cache, _, _ = run(target, prompt)
    target.forward(cache, answer[:-1], IDS)  # nothing follows the end of the answer, so it runs not
    target.close(cache)
    spoken = {"role": "assistant", "content": says}
    longer = encode_messages(tokenizer, parse_messages([turn, spoken, turn]))
    assert list(longer[: len(prompt) + len(answer)]) == [*prompt, *answer]
    cache, rows, num_run = run(target, longer)
    assert num_run == len(longer) - len(prompt) - len(answer) + 1
    _, alone, _ = run(target_of(llama, max_mb=0), longer)
    assert torch.equal(rows, alone)


def test_drafts_are_the_same_and_their_prompt_runs_once(source: LoadedModel) -> None:
    prompt = text(600)
    plain, _ = draft_of(source, max_mb=0)
    draft, network = draft_of(source)
    windows, runs = [], []
    for model in (plain, draft, draft):
        before, cache = network.num_run, model.open(GREEDY, prompt)
        for begin in (0, PREFILL_CHUNK):
            model.prefill(cache, prompt[begin : begin + PREFILL_CHUNK])
        windows.append(
            model.draft(cache, prompt[2 * PREFILL_CHUNK :], 4, NEVER, stop=lambda: False)
        )
        runs.append(network.num_run - before)
        model.close(cache)
    assert runs == [0, 603, 4]
    for window in windows[1:]:
        assert (window.tokens, window.num_cached) == (windows[0].tokens, windows[0].num_cached)
        np.testing.assert_array_equal(window.q_ids, windows[0].q_ids)
        np.testing.assert_array_equal(window.q_probs, windows[0].q_probs)


def test_lookup_in_front_reuses_and_lookup_alone_keeps_nothing(llama: LoadedModel) -> None:
    prompt = text(40)
    for kind, expected in ((DrafterKind.LOOKUP_MODEL, 1), (DrafterKind.LOOKUP, 0)):
        model, _ = draft_of(llama)
        draft = drafter_of(kind, model)
        tokens = []
        for _ in range(2):
            cache = draft.open(GREEDY)
            tokens.append(draft.draft(cache, prompt, 4, NEVER, stop=lambda: False).tokens)
            draft.close(cache)
        assert tokens[0] == tokens[1]
        assert (len(model.prefixes), model.prefixes.num_hits) == (expected, expected)


# --- who sees what ----------------------------------------------------------------------------


def test_sessions_of_one_prompt_share_it_while_both_are_open(llama: LoadedModel) -> None:
    target, prompt = target_of(llama), text(300)
    one, rows, _ = run(target, prompt)
    other, again, num_run = run(target, prompt)
    assert num_run == 1
    assert torch.equal(rows, again)
    before = held(one.prefix)
    target.keep(other, 200)
    target.forward(other, text(20, 5), IDS)
    assert all(torch.equal(a, b) for a, b in zip(before, held(one.prefix), strict=True))


def test_what_a_session_writes_later_reaches_no_other(llama: LoadedModel) -> None:
    """Neither the kept prefix nor who copied from it, on either side."""
    target, prompt = target_of(llama), text(100)
    first, _, _ = run(target, prompt)
    target.close(first)
    assert first.prefix.length == 0
    target.prefill(first, text(120, 3))  # a late job of the ended session writes elsewhere
    one, alone, _ = run(target, prompt)
    target.keep(one, 30)
    target.forward(one, text(60, 4), IDS)
    _, rows, num_run = run(target, prompt)
    assert num_run == 1
    assert torch.equal(rows, alone)


def test_models_share_nothing(llama: LoadedModel) -> None:
    """A cache belongs to a loaded model: other weights, or another format, run the prompt."""
    prompt = text(40)
    one, other = target_of(llama), target_of(loaded(tiny_llama, seed=1))
    cache, _, _ = run(one, prompt)
    one.close(cache)
    _, rows, num_run = run(other, prompt)
    assert num_run == len(prompt)
    assert torch.equal(rows, run(target_of(loaded(tiny_llama, seed=1), max_mb=0), prompt)[1])


def test_once_rows_were_asked_for_nothing_is_copied(llama: LoadedModel) -> None:
    """Passes of decoding are run, and timed, though another session has had the same text."""
    target, prompt = target_of(llama), text(100)
    cache, _, _ = run(target, prompt)
    target.close(cache)
    cache, _, _ = run(target, prompt[:40])
    network: Any = target.network
    before = network.num_run
    target.forward(cache, prompt[40:], IDS)
    assert network.num_run - before == 60


def test_a_failed_pass_is_shared_with_nobody(llama: LoadedModel) -> None:
    target, prompt = target_of(llama), text(40)
    network: Any = target.network
    cache, _, _ = run(target, prompt)
    network.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        target.forward(cache, [1], IDS)
    network.fails = False
    _, _, num_run = run(target, prompt)
    assert num_run == len(prompt)
    target.close(cache)
    assert len(target.prefixes) == 0


# --- how much is kept -------------------------------------------------------------------------


def test_the_least_recently_used_prefix_goes_first(llama: LoadedModel) -> None:
    """Up to 256 positions take 2 layers × 2 × 256 × 2 heads × 8 floats: 64 KiB."""
    target = target_of(llama, max_mb=1)
    for seed in range(16):
        target.close(run(target, text(40, seed))[0])
    full = target.prefixes
    assert (len(full), full.num_bytes) == (16, 1 << 20)
    assert run(target, text(40, 0))[2] == 1  # used: number 1 is the oldest now
    target.close(run(target, text(300, 99))[0])  # of two blocks
    assert (len(full), full.num_bytes) == (15, 1 << 20)
    assert [run(target, text(40, seed))[2] for seed in (1, 2, 0, 3)] == [40, 40, 1, 1]
    assert full.counters() == {
        "prefix_cache_entries": 15,
        "prefix_cache_mb": 1,
        "prefix_cache_hits_total": 3,
        "prefix_cache_tokens_total": 3 * 39,
    }


def test_a_prefix_of_a_kept_one_is_redundant(llama: LoadedModel) -> None:
    target = target_of(llama)
    for tokens in (text(40), text(100), text(60), text(60) + text(MIN_REUSED - 1, 1)):
        target.close(run(target, tokens)[0])
        assert len(target.prefixes) == 1
    target.close(run(target, text(60) + text(MIN_REUSED, 1))[0])  # parts far enough
    assert len(target.prefixes) == 2
    assert run(target, text(100))[2] == 1


def test_what_is_too_short_or_too_large_is_not_kept(llama: LoadedModel) -> None:
    target = target_of(llama, max_mb=1)
    for length in (MIN_REUSED - 1, 16 * 256 + 1):
        cache = target.open(GREEDY)
        target.prefill(cache, text(length))
        target.close(cache)
    assert len(target.prefixes) == target.prefixes.num_bytes == 0


def test_switched_off_nothing_is_kept_or_shared(llama: LoadedModel) -> None:
    target, prompt = target_of(llama, max_mb=0), text(40)
    open_still, _, _ = run(target, prompt)
    cache, _, num_run = run(target, prompt)
    target.close(cache)
    assert num_run == len(prompt)
    assert (len(target.prefixes), target.prefixes.counters()) == (0, {})
    assert open_still.length == len(prompt)


def test_a_session_gives_its_cache_back_once(llama: LoadedModel) -> None:
    target = target_of(llama)
    cache, _, _ = run(target, text(40))
    target.close(cache)
    target.close(cache)
    assert len(target.prefixes) == 1


@pytest.mark.parametrize("end", [3, 0, 9])
def test_only_what_is_there_and_new_is_copied(end: int) -> None:
    source, cache = KVCache(), KVCache()
    model = tiny_llama(64)
    model(torch.arange(5)[None], cache=source.states)
    model(torch.arange(3)[None], cache=cache.states)
    with pytest.raises(LocalError, match="cannot copy positions 3"):
        cache.append(source, end)
