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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.engine import NO_ROWS, ProposedTree
from engines.torch.cache import KVCache
from engines.torch.network import CausalNetwork
from engines.torch.rope import Rotation, turned
from engines.torch.rotation import rotate
from engines.torch.speculators.base import BRANCHES, MOST_DEPTH, product
from engines.torch.speculators.file import Eagle3Config, SpeculatorFile
from engines.torch.speculators.history import History
from engines.torch.speculators.tree import NUM_SPARSE, Candidates, Level, least_log

_CHUNK = 256  # positions of a text read at a time
_LEAST_PATH = 0.0


class Eagle3:
    """The layer on one target.

    Attributes:
        least_path: a node is expanded only if its path is at least so probable.
        Others as in `engines.torch.speculators.base.Speculator`.
    """

    def __init__(self, file: SpeculatorFile, network: CausalNetwork) -> None:
        """Of a file whose config fits the target."""
        config = file.config
        assert isinstance(config, Eagle3Config)
        body, _ = network.own
        self.layers: tuple[int, ...] = config.feature_layers
        self.branches, self.least_path = BRANCHES, _LEAST_PATH
        self.hidden, self._epsilon = config.hidden, config.rms_norm_eps
        self._num_heads, self._num_kv = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        self._table = Rotation.plain(config.head_dim, config.rope_theta)
        self._embedding, self._vocab = body.embedding, file.vocab.numpy()
        self._fold(file.tensors(), rotated=body.basis is not None)

    def _fold(self, tensors: dict[str, Tensor], rotated: bool) -> None:
        """Make the products."""

        def reading(weight: Tensor) -> Tensor:
            return rotate(weight) if rotated else weight

        weights = {name: tensors[name] for name in tensors if name.endswith("weight")}
        low_mid_high = weights["fc.weight"].chunk(3, dim=1)
        self._fc = product(torch.cat([reading(part) for part in low_mid_high], dim=1))
        qkv = torch.cat([weights[f"{name}_proj.weight"] for name in "qkv"])
        embedded, feature = qkv.chunk(2, dim=1)
        self._qkv = product(
            torch.cat(
                (reading(embedded * tensors["embed_norm"]), feature * tensors["feature_norm"]),
                dim=1,
            )
        )
        self._output = product(weights["o_proj.weight"])
        gated = torch.cat([weights["gate_proj.weight"], weights["up_proj.weight"]])
        self._gate_up = product(gated * tensors["mlp_norm"])
        self._down = product(weights["down_proj.weight"])
        self._head = product(weights["head.weight"] * tensors["out_norm"])

    def open(self) -> Eagle3Memory:
        """For a new session."""
        return Eagle3Memory(self)

    def normed(self, x: Tensor) -> Tensor:
        """n(x) of float32[…, width]."""
        return F.rms_norm(x, (x.shape[-1],), eps=self._epsilon)

    def features(self, streams: Tensor) -> Tensor:
        """g: float32[n, hidden] from n(low), n(mid), n(high), float32[n, 3·hidden]."""
        return self._fc(streams)

    def layer(
        self,
        tokens: Sequence[int],
        g: Tensor,
        positions: Sequence[int],
        cache: KVCache,
        mask: Tensor | None,
    ) -> Tensor:
        """a: float32[n, hidden], appending to the cache.

        Args:
            tokens: x_{i+1} of each position i. g: float32[n, hidden].
            mask: float32[n, past + n], added to the scores; None: all is seen.
        """
        size, group = len(tokens), self._num_heads // self._num_kv
        embedded = F.embedding(torch.tensor(tokens), self._embedding).float()
        qkv = self._qkv(torch.cat((self.normed(embedded), self.normed(g)), dim=1))
        heads = qkv.view(size, -1, self._head_dim)
        rotated = turned(heads[:, : -self._num_kv], *self._table.at(positions))
        queries, keys = rotated[:, : self._num_heads], rotated[:, self._num_heads :]
        held_keys, held_values = cache.states.update(
            keys.transpose(0, 1)[None], heads[:, -self._num_kv :].transpose(0, 1)[None], 0
        )
        grouped = queries.view(size, self._num_kv, group, self._head_dim).transpose(0, 1)
        out = F.scaled_dot_product_attention(
            grouped.reshape(1, self._num_kv, size * group, self._head_dim), held_keys, held_values,
            attn_mask=None if mask is None else mask.repeat_interleave(group, dim=0),
        )  # fmt: skip
        mixed = out.view(self._num_kv, size, -1).transpose(0, 1).reshape(size, -1)
        h = g + self._output(mixed)
        gate, up = self._gate_up(self.normed(h)).chunk(2, dim=1)
        return h + self._down(F.silu(gate) * up)

    def level(self, a: Tensor, size: int) -> Level:
        """The `size` most probable tokens after each of a, float32[n, hidden]."""
        return Level.of(self._head(self.normed(a)), self._vocab, size)


@dataclass(slots=True)
class _Growth:
    """A tree while it grows.

    Attributes:
        base: positions of the layer's cache that are the text's.
        a: of each expanded node, float32[hidden]; −1 is the text's last position.
        places: of each expanded node, counted from `base`.
    """

    base: int
    a: dict[int, Tensor]
    places: dict[int, int]


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
        if not held:
            return ProposedTree((), (), *NO_ROWS)
        a = self._read(held, feed)
        candidates = self._grown(a, len(held) + len(feed) - 1, most, rows)
        self._cache.keep(len(held) - 1)
        return candidates.tree(most, rows)

    def _read(self, held: Sequence[int], feed: Sequence[int]) -> Tensor:
        """a of the last position whose next token is known, float32[1, hidden]."""
        speculator, cache = self._speculator, self._cache
        length, following = len(held), [*held[cache.length + 1 :], feed[0]]
        a = torch.empty(0)
        for begin in range(cache.length, length, _CHUNK):
            end = min(begin + _CHUNK, length)
            tokens, following = following[: end - begin], following[end - begin :]
            g = speculator.features(self._streams.rows(begin, end))
            mask = torch.full((end - begin, end), -torch.inf).triu_(begin + 1)
            a = speculator.layer(tokens, g, list(range(begin, end)), cache, mask)[-1:]
        for place, token in enumerate(feed[1:], start=length):
            a = speculator.layer([token], a, [place], cache, None)
        return a

    def _grown(self, a: Tensor, position: int, most: int, rows: bool) -> Candidates:
        """Candidates after the text, whose last token is at `position`."""
        speculator = self._speculator
        size = max(NUM_SPARSE, speculator.branches) if rows else speculator.branches
        found, growth = Candidates(), _Growth(self._cache.length, {-1: a[0]}, {})
        found.add(speculator.level(a, size), 0, -1, speculator.branches)
        least = least_log(speculator.least_path)
        for depth in range(1, min(MOST_DEPTH, most)):
            leaves = sorted(
                node
                for node in found.best(most)
                if found.depths[node] == depth and found.log_probs[node] >= least
            )
            if not leaves:
                break
            states = self._expanded(leaves, found, growth, position + depth - 1)
            level = speculator.level(states, size)
            for row, node in enumerate(leaves):
                growth.a[node] = states[row]
                found.add(level, row, node, speculator.branches)
        return found

    def _expanded(
        self, leaves: Sequence[int], found: Candidates, growth: _Growth, position: int
    ) -> Tensor:
        """a of leaves that follow the token at `position`, float32[leaves, hidden]."""
        past = self._cache.length
        mask = torch.zeros(len(leaves), past + len(leaves))
        mask[:, growth.base :] = -torch.inf
        for row, leaf in enumerate(leaves):
            growth.places[leaf] = past - growth.base + row
            node = leaf
            while node >= 0:
                mask[row, growth.base + growth.places[node]] = 0
                node = found.parents[node]
        return self._speculator.layer(
            [found.tokens[leaf] for leaf in leaves],
            torch.stack([growth.a[found.parents[leaf]] for leaf in leaves]),
            [position] * len(leaves),
            self._cache,
            mask,
        )
