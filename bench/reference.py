"""The target alone: what an exact method must reproduce, and how near the ties are.

Everything here runs the target's network directly, token by token, with a cache of its own and
whole rows of logits. It shares nothing else with `TargetModel`, so that it can stand as the
reference for it; that the network computes what transformers' model does is tested in
`tests/engines/test_network.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bus.protocol.arrays import Float64Array
from decoding.coupling import choose
from decoding.engine import Choice
from decoding.sampling import SamplingParams, warp_dense
from engines.torch.cache import KVCache
from engines.torch.target import TargetModel


def generate_alone(
    target: TargetModel,
    prompt: Sequence[int],
    sampling: SamplingParams,
    max_new_tokens: int,
    eos: frozenset[int],
) -> Iterator[int]:
    """Yield the target's own answer, one pass for each token.

    At temperature 0 the argmax; above, the choice of the seed (`decoding.coupling`). The last
    token may be one of `eos`, which ends the answer.

    Args:
        prompt: token ids, at least one.
    """
    cache = KVCache()
    feed = list(prompt)
    for index in range(max_new_tokens):
        logits = _run(target, cache, feed, num_rows=1)[0]
        if sampling.greedy:
            token = int(np.argmax(logits))
        else:
            token = own_choice(logits, sampling, len(prompt) + index).token
        yield token
        if token in eos:
            return
        feed = [token]


def own_choice(logits: Float64Array, sampling: SamplingParams, position: int) -> Choice:
    """What the seed chooses from float64[V] logits, above temperature 0, and by how much."""
    kept = None if sampling.untruncated else np.flatnonzero(warp_dense(logits, sampling))
    return choose(logits, sampling.temperature, sampling.seed, position, kept)


@dataclass(frozen=True, slots=True)
class OwnChoice:
    """What the target would have written at a position, and how near that was.

    Attributes:
        lead: over the runner-up, in logits, above temperature 0 in log p + noise.
        margin: from top-p's border to the nearest sum of probabilities; 1 without top-p.
    """

    token: int
    lead: float
    margin: float


def replay_choices(
    target: TargetModel, prompt: Sequence[int], tokens: Sequence[int], sampling: SamplingParams
) -> list[OwnChoice]:
    """The target's own choice at each token of an answer, given those before it.

    The answer is replayed token by token; entry i belongs to `tokens[i]`.
    """
    found = []
    for index, logits in enumerate(replay_logits(target, prompt, tokens)):
        if sampling.greedy:
            second, first = np.partition(logits, -2)[-2:]
            found.append(OwnChoice(int(np.argmax(logits)), float(first - second), 1.0))
            continue
        choice = own_choice(logits, sampling, len(prompt) + index)
        found.append(OwnChoice(choice.token, choice.gap, _border_margin(logits, sampling)))
    return found


def _border_margin(logits: Float64Array, sampling: SamplingParams) -> float:
    if sampling.top_p == 1.0:
        return 1.0
    before = replace(sampling, top_p=1.0)  # top-p cuts what temperature and top-k leave
    falling = np.sort(warp_dense(logits, before))[::-1]
    return float(np.abs(np.cumsum(falling) - sampling.top_p).min())


def replay_shortfalls(
    target: TargetModel, prompt: Sequence[int], tokens: Sequence[int]
) -> list[float]:
    """At each token of an answer: how far its logit lies below the maximum (0 for the argmax)."""
    replay = replay_logits(target, prompt, tokens)
    return [
        float(logits.max() - logits[token]) for logits, token in zip(replay, tokens, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class AnswerQuality:
    """What the target thinks of an answer's tokens, each given those before it.

    Attributes:
        log_likelihood: Σ ln p₁(token), in nats. num_greedy: tokens that are its first choice.
        regret: Σ ln p₁(first choice) − ln p₁(token), in nats.
    """

    num_tokens: int
    log_likelihood: float
    num_greedy: int
    regret: float


def score(target: TargetModel, prompt: Sequence[int], tokens: Sequence[int]) -> AnswerQuality:
    """Judge an answer in one pass over it, on temperature-1 distributions.

    Args:
        prompt, tokens: token ids, at least one each.
    """
    cache = KVCache()
    logits = [_run(target, cache, prompt, num_rows=1)]
    if len(tokens) > 1:
        logits.append(_run(target, cache, tokens[:-1], num_rows=len(tokens) - 1))
    rows = np.concatenate(logits)
    best = rows.max(axis=1)
    chosen = rows[np.arange(len(tokens)), list(tokens)]
    log_norm = best + np.log(np.exp(rows - best[:, None]).sum(axis=1))
    return AnswerQuality(
        len(tokens), float((chosen - log_norm).sum()), int((chosen == best).sum()),
        float((best - chosen).sum()),
    )  # fmt: skip


def replay_windows(
    target: TargetModel, prompt: Sequence[int], tokens: Sequence[int], window: int
) -> float:
    """ε = max |Δlogit| between replaying an answer by single tokens and by windows of `window`.

    Other matrix shapes sum in another order; in bf16 that moves logits enough to flip near-ties.
    """
    single = _replay(target, prompt, tokens, window=1)
    windowed = _replay(target, prompt, tokens, window=window)
    return max(
        (float(np.abs(a - b).max()) for a, b in zip(single, windowed, strict=True)), default=0.0
    )


def replay_logits(
    target: TargetModel, prompt: Sequence[int], tokens: Sequence[int]
) -> Iterator[Float64Array]:
    """float64[V] logits before each token of an answer, which is replayed token by token."""
    return _replay(target, prompt, tokens, window=1)


def _replay(
    target: TargetModel, prompt: Sequence[int], tokens: Sequence[int], window: int
) -> Iterator[Float64Array]:
    """float64[V] logits that chose each of `tokens`, with the answer run `window` at a time."""
    if not tokens:
        return
    cache = KVCache()
    yield _run(target, cache, prompt, num_rows=1)[0]
    judged = len(tokens) - 1  # the last token's own successor is nobody's business
    for begin in range(0, judged, window):
        feed = tokens[begin : min(begin + window, judged)]
        yield from _run(target, cache, feed, num_rows=len(feed))


@torch.inference_mode()
def _run(target: TargetModel, cache: KVCache, tokens: Sequence[int], num_rows: int) -> Float64Array:
    """float64[num_rows, V] logits of the last tokens."""
    input_ids = torch.tensor(list(tokens), dtype=torch.long, device=target.device)
    logits = target.network.logits(input_ids, cache, num_rows)
    wide: Float64Array = logits.double().cpu().numpy()
    return wide
