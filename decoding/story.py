"""A session's story: its last events, for whoever wonders what became of it.

Events are kept as they came and turned into text only when somebody reads them. What changes
nothing and asks for nothing (a tick, a repeat) is not kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

MAX_EVENTS = 64
_LONGEST_TEXT = 120


class Story:
    """The last `MAX_EVENTS` events of one session, times in ms since its first one."""

    def __init__(self) -> None:
        self._began_ms: float | None = None
        self._events: deque[tuple[float, Any, tuple[str, ...], str, str]] = deque(maxlen=MAX_EVENTS)
        self.num_events = 0

    def begun(self, now_ms: float, cause: Any) -> None:
        """The first event."""
        self.told(now_ms, cause, (), "", "begun")

    def told(
        self, now_ms: float, event: Any, effects: Sequence[Any], before: str, after: str
    ) -> None:
        """An event, what was asked for because of it, and the phases before and after."""
        if not effects and before == after:
            return
        if self._began_ms is None:
            self._began_ms = now_ms
        names = tuple(_effect_name(effect) for effect in effects)
        self._events.append((now_ms, event, names, before, after))
        self.num_events += 1

    def lines(self) -> list[str]:
        """One line an event: time, event, phase, effects."""
        return [
            f"{at_ms - (self._began_ms or 0.0):.0f} ms  {_describe(event)}  "
            + (after if before == after else f"{before} → {after}".removeprefix(" → "))
            + (f"  [{', '.join(names)}]" if names else "")
            for at_ms, event, names, before, after in tuple(self._events)  # another thread may add
        ]


def _effect_name(effect: Any) -> str:
    message = getattr(effect, "message", None)
    name = type(effect).__name__
    return name if message is None else f"{name} {type(message).__name__}"


def _describe(event: Any) -> str:
    """`Name field=value …` with what is short; a message's fields stand for the message."""
    if not isinstance(event, Struct):
        return str(event)[:_LONGEST_TEXT]
    parts = [type(event).__name__]
    for name, value in asdict(event).items():
        if name == "message" and isinstance(value, Struct):
            parts.append(_describe(value))
        elif name not in ("now_ms", "session") and (text := _short(value)):
            parts.append(f"{name}={text}")
    return " ".join(parts)


def _short(value: Any) -> str:
    match value:
        case Enum():
            return str(value.value)
        case bool() | int():
            return str(value)
        case float():
            return f"{value:.4g}"
        case str():
            return repr(value[:_LONGEST_TEXT]) if value else ""
        case tuple():
            return f"({len(value)})"
        case _:
            return ""
