"""The forward pass of a transformers causal language model, by the fastest way known here.

Which way is chosen when the network is built: a Llama or Qwen2 on a CPU runs as `IntegerBody` where
it was converted to int8, as `FloatBody` in float32; every other model runs in its own module tree,
on a CPU with its matrices in another layout. All of them use one kind of cache, and none knows
sampling or sessions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bus.protocol.errors import LocalError
from engines.torch.cache import KVCache
from engines.torch.features import Features, Tap, feature_layers
from engines.torch.integer import IntegerProduct
from engines.torch.integer_decoder import IntegerDecoder
from engines.torch.linears import Layout, Matrix, ProductModule, replace_linears
from engines.torch.llama import FloatBody, IntegerBody, runs_as_llama
from engines.torch.parts import Part, input_ids, wanted_rows

_CHUNK = 256  # tokens of a text run at a time


class Body(Protocol):
    """A model without its head.

    Attributes:
        weight_bytes: bytes of weights that a pass reads, the embedding's rows left out.
        rowwise: as of a `Network`.
    """

    weight_bytes: int
    rowwise: bool

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """Run the parts; float[n, hidden] of all their tokens."""
        ...


class ModuleBody:
    """Any transformers model without a head, in its own module tree: one part after the other, and
    no trees of tokens."""

    rowwise = False

    def __init__(self, body: Any) -> None:
        self._body = body
        self.weight_bytes = weight_bytes(body)

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """Run the parts; float[n, hidden] of all their tokens."""
        ran: list[Tensor] = []
        for part in parts:
            ids = input_ids([part], self._body.device)
            ran.append(self._body(ids[None], cache=part.cache.states).last_hidden_state[0])
        return torch.cat(ran)


def fast_body(body: Any, layout: Layout) -> Body:
    """Take over a transformers model without a head; it is used up."""
    if runs_as_llama(body):
        return FloatBody(body, layout)
    replace_linears(body, layout)
    return ModuleBody(body)


class Network(ABC):
    """What runs tokens to logits, V of them a row.

    Attributes:
        weight_bytes: bytes of weights that a pass reads.
        rowwise: each row is computed by itself, its operations in one order, so that its bits
            cannot depend on the rows beside it or on how tokens are split into passes.
    """

    weight_bytes: int
    rowwise: bool = False

    @abstractmethod
    def run(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """Run the parts in one pass; of the rows wanted float[w, V] logits and float[w, hidden]
        states after the last norm, where the network gives them.

        Raises:
            LocalError: a tree of tokens, and the network runs chains alone.
        """

    def logits(self, input_ids: Tensor, cache: KVCache, num_rows: int) -> Tensor:
        """Run int64[n] after what `cache` holds; float[num_rows, V] of the last positions."""
        return self.run([Part.of(input_ids.tolist(), cache, num_rows)])[0]


class CausalNetwork(Network):
    """A causal language model; rows of the vocabulary behind the real tokens are cut off.

    Attributes:
        weight_bytes: bytes of weights that a pass reads, of the embedding only as a head.
    """

    def __init__(self, model: Any, vocab_size: int, layout: Layout) -> None:
        """Take over `model`, an `IntegerDecoder` or a model of transformers; it is used up.

        Args:
            vocab_size: number of real tokens.
            layout: of the matrices, where they are not integers already.
        """
        self._vocab_size = vocab_size
        self._fast: tuple[FloatBody | IntegerBody, Matrix] | None = None
        if isinstance(model, IntegerDecoder):
            self._fast = IntegerBody(model), IntegerProduct(model.head)
        elif _is_plain(model) and runs_as_llama(model.model):
            self._fast = FloatBody(model.model, layout), layout([model.lm_head])
        if self._fast is None:
            replace_linears(model, layout)
            self._modules = model
            self.weight_bytes = weight_bytes(model)
        else:
            self.weight_bytes = self._fast[0].weight_bytes + self._fast[1].num_bytes
            self.rowwise = self._fast[0].rowwise

    @property
    def has_own_body(self) -> bool:
        """Whether passes hold several sessions, trees of tokens, and give hidden states."""
        return self._fast is not None

    @property
    def own(self) -> tuple[FloatBody | IntegerBody, Matrix]:
        """Body and head.

        Raises:
            LocalError: the network runs in its own module tree.
        """
        if self._fast is None:
            raise LocalError("this architecture gives no hidden states")
        return self._fast

    def run(self, parts: Sequence[Part], tap: Tap | None = None) -> tuple[Tensor, Tensor | None]:
        """As `Network.run`. A tap receives hidden states of all rows (`has_own_body`)."""
        if self._fast:
            body, head = self._fast
            states = body.forward(parts, tap)[wanted_rows(parts)]
            return head(states)[:, : self._vocab_size], states
        return torch.cat([self._run_modules(part) for part in parts]), None

    def features(self, tokens: Sequence[int]) -> Features:
        """Of a whole text, run on its own."""
        body, _ = self.own
        layers = self.feature_layers
        cache, taps = KVCache(), list[Tap]()
        for begin in range(0, len(tokens), _CHUNK):
            taps.append(Tap(layers))
            body.forward([Part(tokens[begin : begin + _CHUNK], cache)], taps[-1])
        return Features.of(taps, layers, body.basis)

    @property
    def feature_layers(self) -> tuple[int, int, int]:
        """After how many layers the residual stream is a feature."""
        return feature_layers(int(self.own[0].config.num_hidden_layers))

    def levels(self, tap: Tap, rows: Sequence[int]) -> Tensor:
        """float16[n, 3, hidden]: features of n rows of a pass, x / √(mean x²), in the
        model's own basis."""
        body, _ = self.own
        streams = tap.after(self.feature_layers)[rows]
        streams = F.rms_norm(streams, streams.shape[-1:], eps=float(body.config.rms_norm_eps))
        return (streams if body.basis is None else streams @ body.basis.T).half()

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """float32[n, hidden]: the input embedding of tokens int64[n], in the model's own basis."""
        body, _ = self.own
        rows = body.embedding[ids].float()
        return rows if body.basis is None else rows @ body.basis.T

    def head_rows(self, ids: Tensor) -> Tensor:
        """float32[n, hidden]: what gives the logits of tokens int64[n] by a product with
        `Features.last`: the head's weights times the last norm's gain, in the model's own basis."""
        body, head = self.own
        rows = head.rows(ids)
        rows = rows if body.gain is None else rows * body.gain
        return rows if body.basis is None else rows @ body.basis.T

    def _run_modules(self, part: Part) -> Tensor:
        if part.parents:
            raise LocalError("this architecture runs chains of tokens, not trees")
        first = min(part.wanted, default=part.size - 1)
        ids = input_ids([part], self._modules.device)
        kept = part.size - first
        logits = self._modules(ids[None], cache=part.cache.states, logits_to_keep=kept).logits[0]
        rows: Tensor = logits[[index - first for index in part.wanted]]
        return rows[:, : self._vocab_size]


def _is_plain(model: Any) -> bool:
    """Whether a model of transformers is a Llama or Qwen2 with a linear head and nothing else."""
    # Here because a model in int8 needs no module tree; who holds one has imported it already.
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: PLC0415

    return type(model) in (LlamaForCausalLM, Qwen2ForCausalLM)


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a pass of a transformers model reads: all but the input embedding,
    of which only the rows of the tokens are read, unless it serves as the head too."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    shared = isinstance(head, nn.Linear) and head.weight is embedding
    read = [x for x in model.parameters() if shared or x is not embedding]
    products = [x.product for x in model.modules() if isinstance(x, ProductModule)]
    return _num_bytes(read) + sum(product.num_bytes for product in products)


def _num_bytes(weights: list[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)
