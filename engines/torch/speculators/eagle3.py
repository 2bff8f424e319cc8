"""EAGLE-3: one layer that reads the target's features and goes on with its own.

Li et al. 2025, arXiv 2503.01840. f_i are the target's residual streams at position i after a low, a
middle and a high layer (`engines.torch.features`), n(x) = x / √(mean x² + ε), ∘ products element by
element, [a; b] one vector after the other:

    g_i = fc [n(low_i); n(mid_i); n(high_i)]                       [norms here are this project's]
    u_i = [n(emb(x_{i+1})) ∘ embed_norm; n(g_i) ∘ feature_norm]
    h_i = g_i + O · attention(Q u_i, K u_≤i, V u_≤i)               with RoPE at position i
    a_i = h_i + down(SiLU(gate m_i) ∘ (up m_i))                    m_i = n(h_i) ∘ mlp_norm
    logits_i = head (n(a_i) ∘ out_norm)                            of the token at position i + 2

After a token that is drafted itself there are no features of the target: g is a of the position
before. The tree grows level by level: of the nodes that are among the `most` most probable so far,
those not yet expanded are, as no later node is more probable than the one it follows.

Norm gains are folded into the matrices after them; so is the rotation of what an int8 target gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.engine import ProposedTree
from engines.torch.cache import KVCache
from engines.torch.speculators.base import BRANCHES, MOST_DEPTH, product
from engines.torch.speculators.file import Eagle3Config, SpeculatorFile
from engines.torch.speculators.history import History
from engines.torch.speculators.layer import Floats, Nodes, WideLayer
from engines.torch.speculators.tree import NUM_SPARSE, Candidates, Level

_CHUNK = 256  # positions of a text read at a time


class Eagle3:
    """The layer on one target.

    Attributes:
        As in `engines.torch.speculators.base.Speculator`.
    """

    def __init__(
        self, file: SpeculatorFile, embedding: Tensor, basis: Tensor | None = None
    ) -> None:
        """Of a file whose config fits the target.

        Args:
            embedding: float[V, hidden], the target's input embedding. basis: float32[hidden,
                hidden], Q of the rotated rows x·Q that it and the features have; None: they are in
                the model's own basis.
        """
        config = file.config
        assert isinstance(config, Eagle3Config)
        self.layers: tuple[int, ...] = config.feature_layers
        self.branches = BRANCHES
        self.hidden, self._epsilon = config.hidden, config.rms_norm_eps
        self._vocab = file.vocab.numpy()
        tensors = file.tensors()

        def reading(weight: Tensor) -> Tensor:
            return weight if basis is None else weight @ basis

        low_mid_high = tensors["fc.weight"].chunk(3, dim=1)
        self._fc = product(torch.cat([reading(part) for part in low_mid_high], dim=1))
        qkv = torch.cat([tensors[f"{name}_proj.weight"] for name in "qkv"])
        embedded, feature = qkv.chunk(2, dim=1)
        gate_up = torch.cat([tensors["gate_proj.weight"], tensors["up_proj.weight"]])
        read = reading(embedded * tensors["embed_norm"]), feature * tensors["feature_norm"]
        self.layer = WideLayer(
            config, embedding, torch.cat(read, dim=1), tensors["o_proj.weight"],
            gate_up * tensors["mlp_norm"], tensors["down_proj.weight"],
        )  # fmt: skip
        self._head = product(tensors["head.weight"] * tensors["out_norm"])

    def open(self) -> Eagle3Memory:
        """For a new session."""
        return Eagle3Memory(self)

    def normed(self, x: Tensor) -> Tensor:
        """n(x) of float32[…, width]."""
        return F.rms_norm(x, (x.shape[-1],), eps=self._epsilon)

    def features(self, streams: Tensor) -> Floats:
        """g: float32[n, hidden] from n(low), n(mid), n(high), float32[n, 3·hidden]."""
        return self._fc(streams).numpy()

    def level(self, a: Floats, size: int) -> Level:
        """The `size` most probable tokens after each of a, float32[n, hidden]."""
        return Level.of(self._head(self.normed(torch.from_numpy(a))), self._vocab, size)


class Eagle3Memory:
    """A session's features, and keys and values of the layer.

    Those of position i depend on the token at i+1. Kept are only positions before the last one that
    the target has run: what follows it may change.
    """

    def __init__(self, speculator: Eagle3) -> None:
        self._speculator = speculator
        self._streams = History(3 * speculator.hidden)
        self._cache = KVCache()

    def ran(self, streams: Tensor, last: Tensor) -> None:
        """As `engines.torch.speculators.base.Memory.ran`."""
        del last
        self._streams.append(self._speculator.normed(streams).flatten(1))

    def keep(self, length: int, path: Sequence[int]) -> None:
        """As `Memory.keep`."""
        self._streams.keep(length, path)
        self._cache.keep(min(self._cache.length, max(length - 1, 0)))

    def propose(
        self, held: Sequence[int], feed: Sequence[int], most: int, rows: bool
    ) -> ProposedTree:
        """As `Memory.propose`."""
        a = self._read(held, feed)
        candidates = self._grown(a, len(held) + len(feed) - 1, most, rows)
        self._cache.keep(len(held) - 1)
        return candidates.tree(most, rows)

    def _read(self, held: Sequence[int], feed: Sequence[int]) -> Floats:
        """a of the last position whose next token is known, float32[1, hidden]."""
        speculator, cache = self._speculator, self._cache
        length, following = len(held), [*held[cache.length + 1 :], feed[0]]
        a = np.empty((0, speculator.hidden), np.float32)
        for begin in range(cache.length, length, _CHUNK):
            end = min(begin + _CHUNK, length)
            tokens, following = following[: end - begin], following[end - begin :]
            g = speculator.features(self._streams.rows(begin, end))
            a = speculator.layer.run(tokens, g, Nodes.chain(begin, end), cache)[-1:]
        for place, token in enumerate(feed[1:], start=length):
            a = speculator.layer.run([token], a, Nodes.chain(place, place + 1), cache)
        return a

    def _grown(self, a: Floats, position: int, most: int, rows: bool) -> Candidates:
        """Candidates after the text, whose last token is at `position`."""
        speculator = self._speculator
        size = max(NUM_SPARSE, speculator.branches) if rows else speculator.branches
        found = Candidates()
        found.add(speculator.level(a, size), 0, -1, speculator.branches)
        nodes, places, states = Nodes(self._cache.length), {-1: -1}, {-1: a[0]}
        for depth in range(1, min(MOST_DEPTH, most)):
            leaves = sorted(node for node in found.best(most) if found.depths[node] == depth)
            if not leaves:
                break
            for leaf in leaves:
                places[leaf] = nodes.add(places[found.parents[leaf]], position + depth - 1)
            tokens = [found.tokens[leaf] for leaf in leaves]
            g = np.stack([states[found.parents[leaf]] for leaf in leaves])
            a = speculator.layer.run(tokens, g, nodes, self._cache)
            level = speculator.level(a, size)
            for row, leaf in enumerate(leaves):
                states[leaf] = a[row]
                found.add(level, row, leaf, speculator.branches)
        return found
