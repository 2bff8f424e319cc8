"""A causal language model of torch as a target: sessions run together, rows reduced on the device.

Used from one thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from bus.protocol.arrays import Int32Array
from bus.protocol.errors import LocalError, ModelError
from decoding.engine import (
    NO_ROWS,
    Capabilities,
    ProposedTree,
    Segment,
    TargetRow,
    Want,
    no_speculator,
    require_speculator,
)
from decoding.sampling import SamplingParams
from engines.torch.features import Features, Tap
from engines.torch.linears import integer, packed
from engines.torch.loading import Loaded, LoadedModel, load_model
from engines.torch.network import CausalNetwork, Network
from engines.torch.parts import Part, wanted_rows
from engines.torch.precision import NumberFormat
from engines.torch.prefixes import Prefix
from engines.torch.probe import probe
from engines.torch.rows import Rows
from engines.torch.running import RunningModel, SessionCache
from engines.torch.speculators.base import Memory, Speculator
from engines.torch.speculators.loading import Speculators


@dataclass(slots=True)
class TargetCache(SessionCache):
    """One session's cache in the target, and the last pass's rows.

    Attributes:
        rows: of the last pass, and of those it continued.
        speculator: kind it proposes by, empty for none. memory: what that holds of the session;
            None until its first pass, as a session is opened while others run.
    """

    rows: list[Rows] = field(default_factory=list)
    speculator: str = ""
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class _Ran:
    """What a pass gives, of the rows wanted: as `Network.run`, and as `Rows.features`."""

    logits: Tensor
    states: Tensor | None
    features: Tensor | None = None


class TargetModel(RunningModel[TargetCache]):
    """A causal language model with its tokenizer, as a `decoding.engine.Target`.

    Attributes:
        capabilities: what it can do. speculators: kinds it can propose by.
        probe: what its passes compute here (`engines.torch.probe`).
        network: its forward pass, also for references that run it without this class's caches.
        eos_tokens: ids that end an answer.
        Others as in `RunningModel`.
    """

    speculators: tuple[str, ...] = ()

    def __init__(self, loaded: LoadedModel) -> None:
        """Take over `loaded`, whose `model` is used up."""
        layout = integer if loaded.dtype is NumberFormat.INT8 else packed
        network = CausalNetwork(loaded.model, loaded.vocab_size, layout)
        self._set_up(loaded, network, loaded.eos_tokens, network.has_own_body)

    def _set_up(
        self, loaded: Loaded, network: Network, eos_tokens: frozenset[int], own_body: bool
    ) -> None:
        """Args: as the attributes; own_body: `CausalNetwork.has_own_body`."""
        super().__init__(loaded)
        self.network = network
        self._speculators: Speculators | None = None
        self.probe = probe(network, loaded.vocab_size, loaded.device)
        self.eos_tokens = eos_tokens
        self.capabilities = Capabilities(
            trees=own_body,
            full_rows=True,
            hidden_states=own_body,
            batching=own_body,
            bitwise=self.probe.bitwise,
            number_formats=tuple(NumberFormat),
        )

    @classmethod
    def load(cls, spec: str, dtype: str = "auto", device: str = "auto") -> Self:
        """Load by spec; see `engines.torch.loading.load_model` for specs and errors."""
        return cls(load_model(spec, dtype, device, bitwise_int8=True))

    def open(self, sampling: SamplingParams, speculator: str = "") -> TargetCache:
        """As `decoding.engine.Target.open`."""
        require_speculator(self.speculators, speculator)
        return TargetCache(Prefix(), sampling, speculator=speculator)

    def equip(self, directories: Sequence[Path]) -> None:
        """Let sessions propose by the speculators in these directories, in place of those before.
        Weights are read when a session first needs them.

        Raises:
            ModelError: a directory holds none that fits, or this target gives no hidden states.
        """
        if not self.capabilities.hidden_states and directories:
            raise ModelError(
                f"{self.name} cannot have a speculator: that needs a Llama or Qwen2 on a CPU, in "
                "int8 or float32"
            )
        self._speculators = None
        if directories:
            self._speculators = Speculators(
                directories, self.causal, self.vocab_size, self.tokenizer_digest
            )
        self.speculators = self._speculators.kinds if self._speculators else ()

    def speculator(self, kind: str) -> Speculator:
        """One of `speculators`, ready to propose; it is read if it was not.

        Raises:
            LocalError: there is no such. ModelError: its weights cannot be read.
        """
        require_speculator(self.speculators, kind)
        if self._speculators is None:
            raise no_speculator()
        return self._speculators[kind]

    @torch.inference_mode()
    def propose(
        self, cache: TargetCache, feed: Sequence[int], most: int, rows: bool = False
    ) -> ProposedTree:
        """As `decoding.engine.Target.propose`. A cache that holds nothing gets no proposal."""
        if not cache.speculator:
            raise no_speculator()
        if not feed or most < 1:
            raise LocalError(f"expected tokens to read and room; got {len(feed)} and {most}")
        if cache.memory is None or not cache.length:
            return ProposedTree((), (), *NO_ROWS)
        if len(cache.prefix.tokens) != cache.length:
            raise LocalError("a tree was run and no path of it kept; nothing follows it")
        return cache.memory.propose(cache.prefix.tokens, feed, most, rows)

    def keep(self, cache: TargetCache, length: int, path: Sequence[int] = ()) -> None:
        """As `decoding.engine.Target.keep`. The last pass's rows stay."""
        cache.prefix.keep(length, path)
        if cache.memory is not None:
            cache.memory.keep(length, path)

    @torch.inference_mode()
    def run(self, batch: Sequence[Segment[TargetCache]]) -> list[list[TargetRow]]:
        """As `decoding.engine.Target.run`. What other sessions have run of a prompt is copied."""
        began = time.perf_counter()
        for segment in batch:
            segment.check()
            if segment.parents and not self.capabilities.trees:
                raise LocalError(f"{self.name} runs chains of tokens, not trees")
            if segment.cache.speculator and segment.cache.memory is None:
                segment.cache.memory = self.speculator(segment.cache.speculator).open()
        left = [(segment.cache.prefix, self._part(segment)) for segment in batch]
        parts = [part for _, part in left if part.tokens]
        with contextlib.ExitStack() as running:
            for prefix, part in left:
                if part.tokens:
                    running.enter_context(prefix.running(part.tokens, part.parents))
            ran = self._forward(batch, parts) if parts else None
        rows, first = list[list[TargetRow]](), 0
        for segment in batch:
            own = slice(first, first + len(segment.wants))
            rows.append(self._reduced(segment, own, ran))
            first = own.stop
        judged = sum(part.size for part in parts if part.wanted)
        if judged:  # a pass that only reads a prompt takes its own time
            self.padding.wait(began, judged)
        return rows

    def row(self, cache: TargetCache, index: int, want: Want) -> TargetRow:
        """As `decoding.engine.Target.row`."""
        with torch.inference_mode():
            for rows in cache.rows:
                if 0 <= index < len(rows):
                    return rows.only(index).reduce([want])[0]
                index -= len(rows)
        raise LocalError("the last pass left no such row")

    @torch.no_grad()  # tensors of inference mode could not be trained on
    def features(self, tokens: Sequence[int]) -> Features:
        """Hidden states of a whole text of at least one token, run on its own.

        Raises:
            LocalError: nothing to read, or `capabilities.hidden_states` is false.
        """
        if not tokens:
            raise LocalError("no tokens, no features; expected at least one")
        return self.causal.features(tokens)

    @property
    def causal(self) -> CausalNetwork:
        """The network, where it gives features and the weights that go with them.

        Raises:
            LocalError: it is of another kind.
        """
        if not isinstance(self.network, CausalNetwork):
            raise LocalError(f"{self.name} gives no hidden states")
        return self.network

    def prefill(self, cache: TargetCache, tokens: Sequence[int]) -> None:
        """Run tokens nobody judges. The caller cuts long prompts into chunks."""
        if tokens:
            self.run([Segment(cache, tuple(tokens))])

    def forward(
        self, cache: TargetCache, feed: Sequence[int], row_ids: Sequence[Int32Array]
    ) -> tuple[list[TargetRow], float]:
        """Run `feed` of one session and reduce the last len(row_ids) rows at these ids; the rows,
        and the wall time in milliseconds."""
        began = time.perf_counter()
        first = len(feed) - len(row_ids)
        wants = tuple(Want(first + i, ids) for i, ids in enumerate(row_ids))
        (rows,) = self.run([Segment(cache, tuple(feed), wants)])
        return rows, 1e3 * (time.perf_counter() - began)

    def _forward(self, batch: Sequence[Segment[TargetCache]], parts: Sequence[Part]) -> _Ran:
        """Speculators of the sessions receive the hidden states they read."""
        memories = {id(x.cache.prefix.keys_values): x.cache for x in batch if x.cache.memory}
        asked = any(want.features for segment in batch for want in segment.wants)
        if not memories and not asked:
            return _Ran(*self.network.run(parts))
        layers = {
            cache.speculator: self.speculator(cache.speculator).layers
            for cache in memories.values()
        }
        read = self.causal.feature_layers if asked else ()
        tap = Tap([count for counts in (*layers.values(), read) for count in counts])
        logits, states = self.causal.run(parts, tap)
        features = self.causal.levels(tap, wanted_rows(parts)) if asked else None
        first = 0
        for part in parts:
            rows, first = slice(first, first + part.size), first + part.size
            cache = memories.get(id(part.cache))
            if cache is not None and cache.memory is not None:
                cache.memory.ran(tap.after(layers[cache.speculator], rows), tap.last[rows])
        return _Ran(logits, states, features)

    def _part(self, segment: Segment[TargetCache]) -> Part:
        """What is left to run of a segment after what other sessions have run; maybe nothing, where
        no row is wanted."""
        prefix = segment.cache.prefix
        tokens: Sequence[int] = segment.tokens
        wanted = [want.index for want in segment.wants]
        if not segment.parents and not segment.cache.speculator:  # that needs hidden states
            num_rows = len(tokens) - wanted[0] if wanted else 0
            tokens = self.prefixes.fill(prefix, tokens, num_rows)
        skipped = len(segment.tokens) - len(tokens)
        wanted = [index - skipped for index in wanted]
        return Part(tokens, prefix.keys_values, segment.parents, wanted)

    def _reduced(
        self, segment: Segment[TargetCache], own: slice, ran: _Ran | None
    ) -> list[TargetRow]:
        """A segment's rows, which are also kept to be asked for again."""
        cache = segment.cache
        if not segment.wants or ran is None:
            cache.rows = []
            return []
        given = (None if part is None else part[own] for part in (ran.states, ran.features))
        rows = Rows.of(ran.logits[own], cache.sampling, *given)
        cache.rows = [*cache.rows, rows] if segment.continues else [rows]
        return rows.reduce(segment.wants)
