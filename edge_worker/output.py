"""What becomes of a session's results; who decides them, and how, is not its business."""

from __future__ import annotations

from typing import Protocol

from bus.protocol.messages import Message
from decoding.edge_events import Commit, Finish, WindowJudged
from edge_worker.peers import Peer

DecidedEffect = Commit | WindowJudged | Finish
"""Effects of `decoding.edge` that say what has been decided."""


class SessionOutput(Protocol):
    """Takes what one session decides, and counts what it costs. Called on the event loop."""

    @property
    def stopped_at(self) -> int | None:
        """Generated tokens up to the one that completed a stop string, or None."""
        ...

    @property
    def probe(self) -> str:
        """Probe digest of the target that gave the latest tokens; empty where it is not known."""
        ...

    def notify(self, effects: list[DecidedEffect], peer: Peer | None) -> None:
        """What one step has decided, in order.

        Args:
            peer: the worker that verifies for the session.
        """
        ...

    def sent(self, message: Message, size: int) -> None:
        """A frame of `size` bytes has left."""
        ...

    def received(self, size: int) -> None:
        """A frame of `size` bytes has come."""
        ...

    def drafted(self, start: int, num_tokens: int, draft_ms: float, ended_ms: float) -> None:
        """A draft job has ended, by itself or interrupted; `start` is an absolute position."""
        ...

    def failed(self, why: str) -> None:
        """The session is over and could not say so by a `Finish`; `why` is for its user."""
        ...
