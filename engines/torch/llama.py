"""The forward pass of a Llama or Qwen2 as one plain function of a few operations.

transformers' module tree spends about as long in Python as a small model's weights need from
memory. This is the same arithmetic on the same weights and the same cache, for one session at a
time or several (`engines.torch.parts`), without padding:

    x ← x + O·attention(RoPE(Q·n(x)), RoPE(K·n(x)), V·n(x))        n(x) = g ∘ x / √(mean x² + ε)
    x ← x + D·(silu(G·n(x)) ∘ (U·n(x)))

with RoPE(v) = v ∘ cos mθ + swap(v) ∘ (−sin mθ, sin mθ) at position m, where swap exchanges a head's
halves (Su et al. 2021, in the order of Llama's published weights). Grouped-query heads are not
repeated: the g queries that share a key head are g rows of one attention.

Two bodies, for a CPU. `FloatBody` runs float32 as fast as torch's operations allow. `IntegerBody`
runs `engines.torch.kernels`, so that a token's result is bitwise the same however the tokens are
cut into passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.torch import kernels
from engines.torch.cache import KVCache
from engines.torch.features import Tap
from engines.torch.integer import on_all_threads
from engines.torch.integer_decoder import IntegerDecoder
from engines.torch.linears import Layout, Product
from engines.torch.parts import Part, input_ids
from engines.torch.rope import Rotation, head_dim, turned
from engines.torch.rotation import rotate

_MODEL_TYPES = ("llama", "qwen2")
_CHANGING_ROPES = ("dynamic", "longrope")  # their angles depend on the length run so far


@dataclass(frozen=True, slots=True)
class Layer:
    """The products of one layer."""

    qkv: Product
    output: Product
    gate_up: Product
    down: Product


@dataclass(frozen=True, slots=True)
class Gains:
    """The gains of one layer's norms, g√h: float32[hidden]."""

    attention: Tensor
    mlp: Tensor


def has_llama_config(config: Any) -> bool:
    """Whether the bodies here compute what a transformers model of this config computes."""
    return not missing_parts(config)


def missing_parts(config: Any) -> tuple[str, ...]:
    """What a transformers model of this config computes and the bodies here do not, as an error
    names it."""
    missing = []
    if getattr(config, "attn_logit_softcapping", None):
        missing.append("soft-capped attention")
    if getattr(config, "final_logit_softcapping", None):
        missing.append("soft-capped logits")
    kinds = set(getattr(config, "layer_types", None) or ())
    missing += [kind.replace("_", " ") for kind in sorted(kinds - {"full_attention"})]
    if config.model_type not in _MODEL_TYPES:
        return (*missing, f"the layers of {config.model_type}")
    if config.hidden_act != "silu":
        missing.append(f"the activation {config.hidden_act}")
    if config.rope_parameters["rope_type"] in _CHANGING_ROPES:
        missing.append(f"{config.rope_parameters['rope_type']} RoPE")
    return tuple(missing)


def runs_as_llama(body: Any) -> bool:
    """Whether `FloatBody` computes what this transformers model without a head computes."""
    # Here because a model in int8 needs no module tree; who holds one has imported it already.
    from transformers.models.llama.modeling_llama import LlamaModel  # noqa: PLC0415
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Model  # noqa: PLC0415

    if type(body) not in (LlamaModel, Qwen2Model):
        return False
    weight = body.embed_tokens.weight
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and has_llama_config(body.config)
    )


class LlamaBody:
    """What both bodies share: a model without its head.

    Attributes:
        weight_bytes: bytes of weights that a pass reads, the embedding's rows left out.
        rowwise: as of an `engines.torch.network.Network`.
        config: transformers' config.
        embedding: float[V, hidden], in the body's basis.
        gain: float32[hidden], of the last norm; None where the head has it.
    """

    rowwise = False
    embedding: Tensor
    gain: Tensor | None = None

    def __init__(self, config: Any) -> None:
        self.config = config
        self._num_kv_heads = int(config.num_key_value_heads)
        self._num_heads = int(config.num_attention_heads)
        self._head_dim = head_dim(config)
        self._rotation = Rotation.of(config)
        self.weight_bytes = 0

    @property
    def basis(self) -> Tensor | None:
        """float32[hidden, hidden], Q: hidden states here are x·Q of the model's own x; None where
        they are the same."""
        return None


class FloatBody(LlamaBody):
    """In float32, several queries in one attention."""

    def __init__(self, body: Any, layout: Layout) -> None:
        """Take over the weights of a model that `runs_as_llama`, and use the model up.

        Its layers are taken from it one by one, so that no second copy of the weights is made.
        """
        config = body.config
        super().__init__(config)
        # ‖x‖² + hε instead of mean x² + ε, for `_norm`
        self._root_size = config.hidden_size**0.5
        self._root_epsilon = torch.tensor(self._root_size * config.rms_norm_eps**0.5)
        self.embedding = body.embed_tokens.weight.detach()
        self.gain = body.norm.weight.detach()
        self._last_gain = self._gain(body.norm)
        self._gains: list[Gains] = []
        self._layers: list[Layer] = []
        while len(body.layers):
            self._take_over(body.layers.pop(0), layout)

    def forward(self, parts: Sequence[Part], tap: Tap | None = None) -> Tensor:
        """Run the parts; float32[n, hidden] of all their tokens after the last norm."""
        rotation = self._rotation.at([m for part in parts for m in part.positions()])
        masks = [self._mask(part) for part in parts]
        x = F.embedding(input_ids(parts, self.embedding.device), self.embedding)
        streams = list[Tensor]()
        for index, (layer, gains) in enumerate(zip(self._layers, self._gains, strict=True)):
            rows = layer.qkv(self._norm(x, gains.attention))
            x = x + layer.output(self._attention(rows, rotation, parts, masks, index))
            gate, up = layer.gate_up(self._norm(x, gains.mlp)).chunk(2, dim=1)
            x = x + layer.down(F.silu(gate) * up)
            if tap is not None and index + 1 in tap.layers:
                streams.append(x)
        if tap is not None:
            tap.streams = torch.stack(streams) if streams else x[None, :0]
            tap.last = self._norm(x, self._root_size)
        return self._norm(x, self._last_gain)

    def _gain(self, norm: Any) -> Tensor:
        gain: Tensor = norm.weight.detach() * self._root_size
        return gain

    def _take_over(self, layer: Any, layout: Layout) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._gains.append(
            Gains(self._gain(layer.input_layernorm), self._gain(layer.post_attention_layernorm))
        )
        self._add(
            Layer(
                qkv=layout([attention.q_proj, attention.k_proj, attention.v_proj]),
                output=layout([attention.o_proj]),
                gate_up=layout([mlp.gate_proj, mlp.up_proj]),
                down=layout([mlp.down_proj]),
            )
        )

    def _add(self, layer: Layer) -> None:
        self._layers.append(layer)
        for part in (layer.qkv, layer.output, layer.gate_up, layer.down):
            self.weight_bytes += part.num_bytes

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """float32[n, (heads + 2·kv_heads)·d] → queries and keys, values: float32[n, …, d]."""
        heads = qkv.view(qkv.shape[0], -1, self._head_dim)
        return heads[:, : -self._num_kv_heads], heads[:, -self._num_kv_heads :]

    def _store(
        self, rotated: Tensor, values: Tensor, cache: KVCache, index: int
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's rotated keys and its values; float32[1, kv_heads, L, d] of all."""
        held: tuple[Tensor, Tensor] = cache.states.update(
            rotated[:, self._num_heads :].transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            index,
        )
        return held

    def _queries(self, rotated: Tensor) -> Tensor:
        """float32[n, kv_heads, g, d]."""
        size = rotated.shape[0]
        return rotated[:, : self._num_heads].view(size, self._num_kv_heads, -1, self._head_dim)

    def _norm(self, x: Tensor, gain: Tensor | float) -> Tensor:
        """n(x) as (g√h ∘ x) / √(‖x‖² + hε), in half the time of torch's rms_norm."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * gain / torch.hypot(length, self._root_epsilon)

    def _attention(
        self,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        parts: Sequence[Part],
        masks: list[Tensor | None],
        index: int,
    ) -> Tensor:
        """float32[n, heads·d] from float32[n, (heads + 2·kv_heads)·d], appending to the caches."""
        dim, num_kv = self._head_dim, self._num_kv_heads
        plain, values = self._split(qkv)
        rotated = turned(plain, *rotation)
        mixed, first = list[Tensor](), 0
        for part, mask in zip(parts, masks, strict=True):
            rows = slice(first, first + part.size)
            keys, held = self._store(rotated[rows], values[rows], part.cache, index)
            queries = self._queries(rotated[rows]).transpose(0, 1).reshape(1, num_kv, -1, dim)
            out = F.scaled_dot_product_attention(queries, keys, held, attn_mask=mask)
            mixed.append(
                out.view(num_kv, part.size, -1, dim).transpose(0, 1).reshape(part.size, -1)
            )
            first += part.size
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _mask(self, part: Part) -> Tensor | None:
        """float32[n·g, past + n]: 0 where a query sees a key, −∞ where it does not; the g queries
        of a position follow each other. None for a single token."""
        past, size = part.cache.length, part.size
        if size == 1:
            return None
        hidden = torch.full((size, past + size), -torch.inf)
        if part.parents:
            hidden[:, :past] = 0
            for row, parent in enumerate(part.parents):
                if parent >= 0:
                    hidden[row, past:] = hidden[parent, past:]
                hidden[row, past + row] = 0
        else:
            hidden.triu_(past + 1)
        return hidden.repeat_interleave(self._num_heads // self._num_kv_heads, dim=0)


class IntegerBody(LlamaBody):
    """In int8 products, with every row's result independent of the rows beside it.

    Hidden states are those of `engines.torch.integer_decoder`: rotated, norms without gain.
    """

    rowwise = True

    def __init__(self, decoder: IntegerDecoder) -> None:
        super().__init__(decoder.config)
        config = decoder.config
        self.embedding = decoder.embedding
        self._epsilon = np.float32(config.rms_norm_eps)
        layers = decoder.layers
        parts = (layers.qkv, layers.output, layers.gate_up, layers.down)
        self._layers = tuple(part.operand() for part in parts)
        self._num_layers = int(config.num_hidden_layers)
        self._untapped = np.full(self._num_layers, -1, np.int64), np.empty((0, 0, 0), np.float32)
        gated = layers.down.shape[1]
        self._shape = (
            int(config.hidden_size), self._num_heads, self._num_kv_heads, self._head_dim, gated
        )  # fmt: skip
        self._hidden_padded = int(layers.down.scale.shape[1])
        self._widest_in = max(2 * part.num_pairs for part in parts)
        self._widest_out = max(int(part.scale.shape[1]) for part in parts)
        self.weight_bytes = sum(part.num_bytes for part in parts)

    def forward(self, parts: Sequence[Part], tap: Tap | None = None) -> Tensor:
        """Run the parts; float32[n, hidden] of all their tokens after the last norm."""
        hidden = self._shape[0]
        ids = input_ids(parts, self.embedding.device)
        x = np.zeros((len(ids), self._hidden_padded), np.float32)
        x[:, :hidden] = F.embedding(ids, self.embedding).float().numpy()
        positions = [m for part in parts for m in part.positions()]
        rotation = tuple(part[:, 0].contiguous().numpy() for part in self._rotation.at(positions))
        rows = _rows_of(parts)
        cache = self._caches(parts)
        num_threads = torch.get_num_threads()
        buffers = self._buffers(len(ids), max(positions) + 1, num_threads)
        tapped = self._tapped(tap, len(ids))

        def run(thread: int, num_threads: int, arrivals: npt.NDArray[np.int64]) -> None:
            kernels.run(
                thread, num_threads, arrivals, x, self._layers, self._shape, self._epsilon,
                rotation, cache, rows, buffers, tapped,
            )  # fmt: skip

        on_all_threads(run)
        last = torch.from_numpy(x)[:, :hidden]
        if tap is not None:
            tap.streams, tap.last = torch.from_numpy(tapped[1]), last
        return last

    @cached_property
    def basis(self) -> Tensor:
        """As `LlamaBody.basis`."""
        with torch.inference_mode(False):  # a pass may be the first to ask
            return rotate(torch.eye(self._shape[0]))

    def _tapped(self, tap: Tap | None, num_rows: int) -> tuple[npt.NDArray[Any], ...]:
        """Where `kernels.run` copies hidden states to."""
        if tap is None:
            return self._untapped
        places = np.full(self._num_layers, -1, np.int64)
        places[np.array(tap.layers, np.int64) - 1] = np.arange(len(tap.layers))
        return places, np.empty((len(tap.layers), num_rows, self._shape[0]), np.float32)

    def _caches(self, parts: Sequence[Part]) -> tuple[npt.NDArray[np.int64], ...]:
        """Addresses of keys and of values, and capacities, of caches extended by their parts."""
        extended = [
            part.cache.extend(part.size, self._num_layers, self._num_kv_heads, self._head_dim)
            for part in parts
        ]
        addresses = np.stack([places for places, _ in extended])  # [sessions, 2, layers]
        capacities = np.array([capacity for _, capacity in extended], np.int64)
        return addresses[:, 0].copy(), addresses[:, 1].copy(), capacities

    def _buffers(self, num_rows: int, length: int, num_threads: int) -> tuple[Any, ...]:
        """What `kernels.run` works in: rounded rows, their steps, wide rows, attention's results,
        and for each thread a row, scores and places."""
        narrow = max(self._num_heads * self._head_dim, self._hidden_padded)
        return (
            np.empty(num_rows * self._widest_in, np.int16),
            np.empty(num_rows, np.float32),
            np.empty(num_rows * self._widest_out, np.float32),
            np.empty(num_rows * narrow, np.float32),
            np.empty((num_threads, narrow), np.float32),
            np.empty((num_threads, length), np.float32),
            np.empty((num_threads, num_rows), np.int32),
        )


def _rows_of(parts: Sequence[Part]) -> tuple[npt.NDArray[np.int64], ...]:
    """int64[n] each, as `kernels.run` takes them: session, place in its cache, how many positions
    before lie in order, row of the parent. Caches are not extended yet."""
    session, place, past, parent = list[int](), list[int](), list[int](), list[int]()
    for index, part in enumerate(parts):
        first, held = len(session), part.cache.length
        parents = part.parents or range(-1, part.size - 1)
        session += [index] * part.size
        place += range(held, held + part.size)
        past += [held] * part.size
        parent += [first + above if above >= 0 else -1 for above in parents]
    session_ids, places, pasts, parents_of = (
        np.array(column, np.int64) for column in (session, place, past, parent)
    )
    return session_ids, places, pasts, parents_of
