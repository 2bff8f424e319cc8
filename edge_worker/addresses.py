"""Which session of an edge worker a message is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from bus.protocol.codec import AnyMessage
from bus.protocol.messages import Fault, Feedback, Message
from decoding.edge_events import Event
from decoding.edge_state import EdgeState
from decoding.story import Story
from edge_worker.peers import Peer


class Addressable(Protocol):
    """A session as others reach it.

    Attributes:
        peer: the worker that verifies for it. story: what happened to it last.
    """

    peer: Peer | None
    state: EdgeState
    story: Story

    @property
    def handle_there(self) -> int | None:
        """By which that worker knows it; None where it does not."""
        ...

    def handle(self, event: Event) -> None:
        """Raises nothing."""
        ...

    def received(self, size: int) -> None:
        """A message of `size` bytes has come for it."""
        ...


class Addresses:
    """The sessions that messages and time reach, by name: those of requests and inner ones.

    Args:
        ended: called with name and story of one that is over.
    """

    def __init__(self, ended: Callable[[str, Story], None] = lambda _name, _story: None) -> None:
        self._sessions: dict[str, Addressable] = {}
        self._ended = ended

    def __iter__(self) -> Iterator[tuple[str, Addressable]]:
        """Names and sessions of now."""
        return iter(list(self._sessions.items()))

    def add(self, session: Addressable) -> None:
        """From now on it is reached by its name and by its handle."""
        self._sessions[session.state.spec.session] = session

    def remove(self, session: Addressable) -> None:
        """It is over. One that was never added, or has a successor of its name, changes nothing."""
        name = session.state.spec.session
        if self._sessions.get(name) is session:
            del self._sessions[name]
            self._ended(name, session.story)

    def named(self, message: Message) -> Addressable | None:
        """Whose message it is by the session's name in it."""
        return self._sessions.get(getattr(message, "session", ""))

    def of(self, peer: Peer, message: AnyMessage) -> Addressable | None:
        """Whose message of a worker it is: by its handle there, or by the session's name."""
        handle = message.handle if isinstance(message, Feedback | Fault) else None
        if handle is None:
            return self.named(message)
        sessions = self._sessions.values()
        return next((s for s in sessions if s.peer is peer and s.handle_there == handle), None)
