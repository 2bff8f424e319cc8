"""What an edge worker remembers from one session to the next."""

from __future__ import annotations

import msgspec

from decoding.pacing import Measures

MAX_REMEMBERED = 64


class PathMemory:
    """What sessions have learnt about each cloud worker, for the next one there."""

    def __init__(self) -> None:
        self._measures: dict[tuple[str, str], Measures] = {}

    def recall(self, cloud: str, method: str) -> Measures | None:
        return self._measures.get((cloud, method))

    def keep(self, cloud: str, method: str, measures: Measures) -> None:
        """Acceptance is remembered as lightly as a guess: the next text is another one."""
        if measures.known:
            light = msgspec.structs.replace(measures, acceptance=measures.acceptance.recalled())
            self._measures.pop((cloud, method), None)
            self._measures[cloud, method] = light
            if len(self._measures) > MAX_REMEMBERED:
                del self._measures[next(iter(self._measures))]
