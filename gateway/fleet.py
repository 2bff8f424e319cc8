"""The workers as the registry has them: which models are served, and what is missing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from bus.protocol.errors import StoreUnavailableError
from bus.store import Role, Store, WorkerRecord
from gateway.errors import RETRY_S, SERVER, ApiError

__all__ = ["DEFAULT_MODEL", "Fleet", "Roster"]

DEFAULT_MODEL = "default"
"""Names the model that is served, where it is not known by name."""
_FRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers that live."""

    clouds: tuple[WorkerRecord, ...]
    edges: tuple[WorkerRecord, ...]

    @property
    def targets(self) -> dict[str, WorkerRecord]:
        """The target models, by id, each with the record of one cloud worker that runs it."""
        return {record.model: record for record in reversed(self.clouds) if record.model}

    @property
    def missing(self) -> list[str]:
        """Why no request can be answered now; empty where one can."""
        reasons = []
        if not self.clouds:
            reasons.append("no cloud worker is registered")
        if not self.edges:
            reasons.append("no edge worker is registered")
        digests = {record.tokenizer_digest for record in self.clouds}
        if not reasons and not any(edge.tokenizer_digest in digests for edge in self.edges):
            reasons.append("no edge worker has the tokenizer of a cloud worker")
        return reasons

    def require(self) -> None:
        """Raises ApiError: 503; a request would wait for a worker that is not there."""
        if missing := self.missing:
            text = f"{' and '.join(missing)}; start the workers, or try again in a moment"
            raise ApiError(503, text, kind=SERVER, code="no_workers", retry_after_s=5 * RETRY_S)

    def target(self, name: str) -> WorkerRecord:
        """The target called `name`; `default` is the first one.

        Raises:
            ApiError: 404; none is called so.
        """
        targets = self.targets
        if name == DEFAULT_MODEL and targets:
            return next(iter(targets.values()))
        if name not in targets:
            served = ", ".join(repr(model) for model in targets) or "none"
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; served: {served}, or {DEFAULT_MODEL!r}",
                code="model_not_found",
                param="model",
            )
        return targets[name]


class Roster:
    """Reads the registry, at most once a second however many ask."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = asyncio.Lock()
        self._read_at = float("-inf")
        self._found: Fleet | StoreUnavailableError = Fleet((), ())

    async def fleet(self) -> Fleet:
        """The workers, as of at most a second ago. Raises StoreUnavailableError."""
        async with self._lock:
            if time.monotonic() - self._read_at > _FRESH_S:
                self._found = await self._read()
                self._read_at = time.monotonic()
        if isinstance(self._found, Fleet):
            return self._found
        raise StoreUnavailableError(str(self._found))

    async def _read(self) -> Fleet | StoreUnavailableError:
        """An outage is remembered as long: who waits for the lock need not wait for it again."""
        try:
            records = await self._store.registry.workers()
        except StoreUnavailableError as error:
            return error
        return Fleet(
            tuple(record for record in records if record.role is Role.CLOUD),
            tuple(record for record in records if record.role is Role.EDGE),
        )
