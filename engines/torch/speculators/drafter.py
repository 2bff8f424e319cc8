"""EAGLE-3's layer as a drafter at the edge: it reads the target's features as feedback brings them.

    text        x_0 … x_{i} x_{i+1} … │ x_{p+1} …           committed │ drafted
    features    –   … f_i   …    f_{p−1}  –                  of the prompt none but the last
    layer       skip  read  …    read     goes on with its own states

A position is read with its features and the token after it (`engines.torch.speculators.eagle3`).
Features come together with that token, both final; they are held, as an interrupted draft takes
back tokens that it has read. Positions before the last one known whose features never came are left
out of attention. Those after it have the layer's own state of the position before in place of
features, and are run again once features have come.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from bus.protocol.arrays import PROB_DTYPE, TOKEN_DTYPE, Float16Array
from bus.protocol.errors import LocalError, ModelError
from decoding.engine import DraftedWindow, DrafterCapabilities
from decoding.sampling import SamplingParams
from engines.catalog.sources import split_speculator
from engines.torch.cache import KVCache
from engines.torch.drafter import draw
from engines.torch.prefixes import Prefix
from engines.torch.probe import Probe
from engines.torch.running import RunningModel, SessionCache
from engines.torch.speculators.eagle3 import Eagle3
from engines.torch.speculators.embedding import LoadedEmbedding, load_embedding
from engines.torch.speculators.file import EAGLE3, SpeculatorFile
from engines.torch.speculators.layer import Floats, Nodes

_CHUNK = 256  # positions read at a time


@dataclass(slots=True)
class Eagle3Cache(SessionCache):
    """One session at the layer; its prefix stays empty.

    Attributes:
        tokens: read so far.
        features: float16[3, hidden] by position, those that have come.
        keys: of the positions `places`, rising, each before the last token read; the first
            `num_read` with the target's features, the others one by one after them.
        states: float32[1, hidden], a of the last of the former and of each of the latter; none
            where it is not known.
    """

    tokens: list[int] = field(default_factory=list)
    features: dict[int, Float16Array] = field(default_factory=dict)
    keys: KVCache = field(default_factory=KVCache)
    places: list[int] = field(default_factory=list)
    num_read: int = 0
    states: list[Floats] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def keep(self, length: int) -> None:
        """Forget every token from `length` on, and what was run with it."""
        del self.tokens[length:]
        self._cut(bisect_right(self.places, length - 2))

    def _cut(self, size: int) -> None:
        """Hold the first `size` places alone."""
        del self.places[size:]
        self.keys.keep(size)
        self.states = [] if size < self.num_read else self.states[: size - self.num_read + 1]
        self.num_read = min(self.num_read, size)

    def read(self, layer: Eagle3, feed: Sequence[int]) -> Floats | None:
        """a of the last position whose next token is known, after more tokens of the text; None
        where features have never come."""
        text = [*self.tokens, *feed]
        last = len(text) - 2
        if self.num_read and not self.states:
            self._cut(self.num_read - 1)
        newest = self.places[self.num_read - 1] if self.num_read else -1
        known = sorted(position for position in self.features if newest < position <= last)
        if known:
            self._cut(self.num_read)
        for begin in range(0, len(known), _CHUNK):
            places = known[begin : begin + _CHUNK]
            normed = np.stack([self.features[place] for place in places]).reshape(len(places), -1)
            g = layer.features(torch.from_numpy(normed).float())
            a = self.run(layer, [text[place + 1] for place in places], g, places)
            self.num_read, self.states = len(self.places), [a[-1:]]
        if not self.states:
            return None
        for place in range(self.places[-1] + 1, last + 1):
            self.go_on(layer, text[place + 1])
        return self.states[-1]

    def go_on(self, layer: Eagle3, token: int) -> Floats:
        """a of the next position, after which `token` follows, from the state of the one before."""
        a = self.run(layer, [token], self.states[-1], [self.places[-1] + 1])
        self.states.append(a)
        return a

    def run(self, layer: Eagle3, tokens: Sequence[int], g: Floats, places: Sequence[int]) -> Floats:
        """a: float32[n, hidden] of more places, each after the one before."""
        nodes = Nodes(len(self.places), list(range(-1, len(places) - 1)), list(places))
        a = layer.layer.run(tokens, g, nodes, self.keys)
        self.places += places
        return a


class Eagle3Drafter(RunningModel[Eagle3Cache]):
    """A `decoding.engine.FeatureDrafter` that writes chains. Without features it has nothing to
    say.

    Attributes:
        num_sparse: K, probabilities sent for each token, at most the head's size.
        Others as in `RunningModel`.
    """

    capabilities = DrafterCapabilities(features=True)
    probe = Probe("", bitwise=True)

    def __init__(self, file: SpeculatorFile, target: LoadedEmbedding, num_sparse: int = 48) -> None:
        """Raises ModelError where the speculator is of another kind or target."""
        _check(file, target)
        super().__init__(target)
        self.name = file.directory.resolve().name
        self.num_sparse = min(num_sparse, len(file.vocab))
        self._hidden = file.config.hidden
        self._layer = Eagle3(file, target.embedding)

    @classmethod
    def load(cls, spec: str, num_sparse: int = 48) -> Self:
        """Of the speculator's directory, `DIR` for the default target or `DIR@TARGET`.

        Raises:
            ModelError: it or the target cannot be read, or they do not fit.
        """
        found = split_speculator(spec)
        if found is None:
            raise ModelError(f"{spec} holds no speculator; expected a directory of `e2sci train`")
        directory, target = found
        return cls(SpeculatorFile.open(directory), load_embedding(target), num_sparse)

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> Eagle3Cache:
        """As `decoding.engine.Drafter.open`."""
        del prompt
        return Eagle3Cache(Prefix(), sampling)

    def prefill(self, cache: Eagle3Cache, tokens: Sequence[int]) -> None:
        """As `Drafter.prefill`."""
        cache.tokens += tokens

    def learn(self, cache: Eagle3Cache, start: int, features: Float16Array) -> None:
        """As `decoding.engine.FeatureDrafter.learn`."""
        if features.shape[1:] != (3, self._hidden):
            raise LocalError(
                f"the target's features are of shape {features.shape[1:]}, those of {self.name} "
                f"of (3, {self._hidden}); use the speculator of the cloud worker's target"
            )
        cache.features |= dict(enumerate(features, start))

    @torch.inference_mode()
    def draft(
        self,
        cache: Eagle3Cache,
        feed: Sequence[int],
        count: int,
        eos: frozenset[int],
        stop: Callable[[], bool],
    ) -> DraftedWindow:
        """As `decoding.engine.Drafter.draft`; with n = 0 tokens it has read `feed`."""
        if not feed or count < 1:
            raise LocalError(f"draft needs tokens to run and a count; got {len(feed)} and {count}")
        began = time.perf_counter()
        a = cache.read(self._layer, feed)
        cache.tokens += feed
        start, tokens = cache.length, list[int]()
        q_ids = np.empty((count, self.num_sparse), TOKEN_DTYPE)
        q_probs = np.zeros((count, self.num_sparse), PROB_DTYPE)
        while a is not None and len(tokens) < count and not stop():
            step_began, index = time.perf_counter(), len(tokens)
            if tokens:
                a = cache.go_on(self._layer, tokens[-1])
                cache.tokens.append(tokens[-1])
            level = self._layer.level(a, self.num_sparse)
            q_ids[index], q_probs[index] = level.row(0, self.num_sparse)
            tokens.append(draw(q_ids[index], q_probs[index], cache.sampling, start + index))
            self.padding.wait(step_began)
            if tokens[-1] in eos:
                break
        return DraftedWindow(
            start, cache.length, tuple(tokens), q_ids[: len(tokens)], q_probs[: len(tokens)],
            1e3 * (time.perf_counter() - began),
        )  # fmt: skip

    def keep(self, cache: Eagle3Cache, length: int) -> None:
        """As `Drafter.keep`."""
        if not 0 <= length <= cache.length:
            raise LocalError(f"cannot keep {length} positions of {cache.length}")
        cache.keep(length)


def _check(file: SpeculatorFile, target: LoadedEmbedding) -> None:
    given, size = file.config, target.embedding.shape[1]
    if given.kind != EAGLE3:
        what = f"it is of kind {given.kind}, the edge drafts by {EAGLE3}"
    elif given.tokenizer_digest != target.tokenizer_digest:
        what = f"{target.name} has another tokenizer"
    elif (given.vocab_size, given.hidden) != (target.vocab_size, size):
        what = (
            f"it is for {given.vocab_size} tokens and hidden size {given.hidden}, {target.name} "
            f"has {target.vocab_size} and {size}"
        )
    else:
        return
    raise ModelError(
        f"speculator {file.directory} cannot draft: {what}; it was trained on {given.target}, name "
        "its target as DIR@TARGET"
    )
