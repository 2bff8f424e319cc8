"""A session with another output and other drafts than those of a request: its messages find it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from bus.protocol.arrays import PROB_DTYPE, TOKEN_DTYPE
from bus.protocol.messages import Fault, FaultCode, FinishReason, Message, SessionReady
from decoding import edge, methods
from decoding.edge_events import Commit, Draft, Finish, Learn
from decoding.engine import DraftedWindow
from decoding.sampling import SamplingParams
from decoding.story import Story
from edge_worker.addresses import Addressable, Addresses
from edge_worker.drafting import Deliver
from edge_worker.output import DecidedEffect
from edge_worker.peers import Peer
from edge_worker.session import EdgeSession
from tests.edge_worker.shell import House, ToyTokenizer


class Collected:
    """Keeps what is decided."""

    probe, stopped_at = "", None

    def __init__(self) -> None:
        self.tokens: tuple[int, ...] = ()
        self.accepted = 0
        self.bytes = [0, 0]
        self.finished: list[Finish] = []

    def notify(self, effects: list[DecidedEffect], peer: Peer | None) -> None:
        for effect in effects:
            if isinstance(effect, Commit):
                self.tokens += effect.tokens
                self.accepted += sum(effect.accepted)
            elif isinstance(effect, Finish):
                self.finished.append(effect)

    def sent(self, message: Message, size: int) -> None:
        self.bytes[0] += size

    def received(self, size: int) -> None:
        self.bytes[1] += size

    def drafted(self, start: int, num_tokens: int, draft_ms: float, ended_ms: float) -> None:
        pass

    def failed(self, why: str) -> None:
        raise AssertionError(why)


class Given:
    """Drafts from a text that is there already."""

    def __init__(self, text: tuple[int, ...]) -> None:
        self._text = text
        self.cropped: list[int] = []
        self.closed = 0
        self._deliver: Deliver

    def open(
        self, spec: edge.SessionSpec, deliver: Deliver, failed: Callable[[Exception], None]
    ) -> None:
        self._text = spec.prompt + self._text
        self._read, self._deliver = 0, deliver

    def draft(self, effect: Draft, eos: frozenset[int], stop: Callable[[], bool]) -> None:
        start = self._read + len(effect.feed)
        tokens = self._text[start : start + effect.count]
        self._read = start + max(0, len(tokens) - 1)
        ids = np.array(tokens, TOKEN_DTYPE).reshape(-1, 1)
        probs = np.ones((len(tokens), 1), PROB_DTYPE)
        window = DraftedWindow(start, self._read, tokens, ids, probs, 0.1)
        asyncio.get_running_loop().call_soon(self._deliver, effect.job, window)

    def crop(self, length: int) -> None:
        self.cropped.append(length)
        self._read = min(self._read, length)

    def learn(self, effect: Learn) -> None:
        raise AssertionError(f"{effect} for a draft that reads no features")

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("wrong_at", [None, 7])
async def test_a_session_of_given_tokens_is_heard_by_its_own_output(
    house: House, wrong_at: int | None
) -> None:
    house.cloud()
    house.start()
    method = methods.find("sd")
    assert method is not None
    text = house.expected("r1")
    given = list(text)
    if wrong_at is not None:
        given[wrong_at] = (given[wrong_at] + 1) % 24
    output, drafting = Collected(), Given(tuple(given))
    session = EdgeSession(house.edge._context, output, drafting)
    prompt = tuple(ToyTokenizer().encode("prompt r1"))
    spec = edge.SessionSpec("inner", "c", "edge-1", method, prompt, SamplingParams(), 24, "toy")
    session.begin(spec, edge.Control(0.1, 4, 0.1), (), 1)
    await house.until(lambda: output.finished)
    assert output.finished == [Finish(FinishReason.LENGTH)]
    assert output.tokens == text
    assert output.accepted >= 15
    assert min(output.bytes) > 0
    assert bool(drafting.cropped) == (wrong_at is not None)
    session.close()
    assert drafting.closed == 1
    assert not list(house.edge._context.addresses)
    await house.answers("r2")


def named(name: str, peer: Any, handle: int | None) -> Addressable:
    state = SimpleNamespace(spec=SimpleNamespace(session=name))
    session: Any = SimpleNamespace(state=state, peer=peer, handle_there=handle, story=Story())
    return cast(Addressable, session)


def test_messages_find_their_session_by_name_or_by_the_handle_at_their_sender() -> None:
    ended: list[str] = []
    addresses = Addresses(lambda name, _: ended.append(name))
    cloud, other = cast(Any, object()), cast(Any, object())
    one, two = named("one", cloud, 7), named("two", other, 7)
    addresses.add(one)
    addresses.add(two)
    assert [name for name, _ in addresses] == ["one", "two"]
    gone = Fault("-", FaultCode.UNKNOWN_SESSION, "", 7)
    assert addresses.of(cloud, gone) is one
    assert addresses.of(other, gone) is two
    assert addresses.of(cloud, Fault("-", FaultCode.UNKNOWN_SESSION, "", 8)) is None
    assert addresses.of(other, SessionReady("one", 1, "cloud-1", 7)) is one
    successor = named("one", other, 9)
    addresses.add(successor)
    addresses.remove(one)  # it has a successor of its name
    assert addresses.named(SessionReady("one", 1, "cloud-1", 9)) is successor
    addresses.remove(successor)
    addresses.remove(successor)
    assert addresses.named(SessionReady("one", 1, "cloud-1", 9)) is None
    assert ended == ["one"]
