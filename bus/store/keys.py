"""Names of all Redis keys, in one place (docs/architecture.md says what they hold)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GROUP", "Keys"]

GROUP = "edges"
"""The consumer group on the prompt stream."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under `prefix`, e.g. `e2sci:`."""

    prefix: str = "e2sci:"

    @property
    def prompts(self) -> str:
        return f"{self.prefix}prompts"

    @property
    def dead(self) -> str:
        return f"{self.prefix}dead"

    @property
    def workers(self) -> str:
        return f"{self.prefix}workers"

    @property
    def telemetry(self) -> str:
        return f"{self.prefix}telemetry"

    @property
    def controller_term(self) -> str:
        return f"{self.prefix}controller-term"

    @property
    def controller_lease(self) -> str:
        return f"{self.prefix}controller-lease"

    @property
    def tuning(self) -> str:
        return f"{self.prefix}tuning"

    @property
    def tuning_in_use(self) -> str:
        return f"{self.prefix}tuning-in-use"

    def credit(self, client: str) -> str:
        return f"{self.prefix}credit:{client}"

    def request(self, request_id: str) -> str:
        return f"{self.prefix}request:{request_id}"

    def result(self, request_id: str) -> str:
        return f"{self.prefix}result:{request_id}"

    def cancel(self, request_id: str) -> str:
        return f"{self.prefix}cancel:{request_id}"

    def story(self, session: str) -> str:
        return f"{self.prefix}story:{session}"

    def session(self, session: str) -> str:
        return f"{self.prefix}session:{session}"

    def ended(self, session: str) -> str:
        return f"{self.prefix}ended:{session}"
