"""No draft at all: a tokenizer alone, for an edge that streams what the target writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, Self

from bus.protocol.errors import LocalError
from decoding.engine import DraftedWindow, DrafterCapabilities
from decoding.sampling import SamplingParams
from engines.catalog.registry import split_head
from engines.catalog.sources import ModelSource, split_speculator
from engines.tokenizer import num_real_tokens, tokenizer_digest
from engines.torch.draft import is_trimmed, trimmed_location
from engines.torch.loading import (
    Loaded,
    context_length,
    load_config,
    load_tokenizer,
    quiet_transformers,
)
from engines.torch.precision import NumberFormat, resolve_device
from engines.torch.prefixes import Prefix
from engines.torch.probe import Probe
from engines.torch.running import RunningModel, SessionCache
from engines.torch.sources import resolve_source


class NoDrafter(RunningModel[SessionCache]):
    """A `decoding.engine.Drafter` that is never asked (`SessionSpec.drafts`)."""

    capabilities = DrafterCapabilities()
    probe = Probe("", bitwise=True)

    @classmethod
    def load(cls, spec: str) -> Self:
        """The tokenizer of the draft that another edge would load by this spec.

        Raises:
            ModelError: no such model, or it cannot be read.
        """
        quiet_transformers()
        speculator = split_speculator(spec)
        spec = speculator[1] if speculator else spec
        if is_trimmed(spec):
            location = str(trimmed_location(spec)[1])
            source = ModelSource(spec, location, is_local=True)
        else:
            source = resolve_source(split_head(spec)[0])
        tokenizer, config = load_tokenizer(source), load_config(source)
        return cls(
            Loaded(
                tokenizer=tokenizer,
                name="none",
                dtype=NumberFormat.FLOAT32,
                device=resolve_device("cpu"),
                context_length=context_length(config, source.name),
                vocab_size=num_real_tokens(tokenizer, config.get_text_config().vocab_size),
                tokenizer_digest=tokenizer_digest(tokenizer),
            )
        )

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> SessionCache:
        """An empty cache, which stays empty."""
        del prompt
        return SessionCache(Prefix(), sampling)

    def keep(self, cache: SessionCache, length: int) -> None:
        """Nothing is held."""

    def prefill(self, cache: SessionCache, tokens: Sequence[int]) -> None:
        """Not possible. Raises LocalError."""
        del cache, tokens
        _impossible()

    def draft(
        self,
        cache: SessionCache,
        feed: Sequence[int],
        count: int,
        eos: frozenset[int],
        stop: Callable[[], bool],
    ) -> DraftedWindow:
        """Not possible. Raises LocalError."""
        del cache, feed, count, eos, stop
        _impossible()


def _impossible() -> NoReturn:
    raise LocalError("an edge without a draft was asked for one")
