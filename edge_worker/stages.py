"""Drafts that are the text of an inner session: the chain of a method with `inner`.

The inner session runs in this process as any other does, but is verified by a middle worker, and
its text goes nowhere but into the outer session's drafts (`decoding.cascade`). Where no middle
worker lives, or the inner session fails, there are no drafts: the target writes on by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import msgspec

from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import FinishReason, Message
from bus.protocol.requests import inner_session_id
from bus.store import Role
from decoding import edge, methods
from decoding.cascade import Cascade
from decoding.edge_events import Commit, Draft, Finish, Learn, Read, Rebased, WindowJudged
from decoding.edge_state import SessionSpec
from decoding.methods import Method
from decoding.sampling import SamplingParams
from edge_worker.context import SessionContext
from edge_worker.drafting import Deliver, Drafting, ModelDrafting, answered
from edge_worker.output import DecidedEffect
from edge_worker.peers import Peer
from edge_worker.session import EdgeSession
from edge_worker.stage_meter import StageMeter
from engines.lookup import LookupDrafter
from engines.thread import now_ms

log = logging.getLogger(__name__)

INCARNATIONS = 1 << 18
"""Of inner sessions, for each owner of a request; so many times one may begin again."""
OTHER_SEED = 0x5DEECE66D


def drafting_of(
    context: SessionContext, method: Method, meter: StageMeter, control: edge.Control, term: int
) -> Drafting:
    """Who drafts for a request: this worker's drafter, or an inner session and what drafts for it.

    Args:
        meter: counts what the stage before the target does.
        term: of the request's owner; a later one has a higher one.
    """
    if not method.inner:
        return ModelDrafting(context.drafter, context.thread)
    return _staged(context, method, meter, control, term)


def _staged(
    context: SessionContext, method: Method, meter: StageMeter, control: edge.Control, term: int
) -> Drafting:
    inner = methods.find(method.inner)
    assert inner is not None, f"method {method.name!r} drafts by {method.inner!r}, which is none"
    if inner.inner:
        below = _staged(context, inner, StageMeter(meter.began_ms), control, term)
    else:
        drafter = context.drafter
        lookup = LookupDrafter(drafter.vocab_size, drafter.context_length)
        below = ModelDrafting(lookup, context.thread)
    return StageDrafting(context, inner, below, meter, control, term)


class StageDrafting:
    """Answers a session's drafts from an inner session's text.

    Args:
        method: of the inner session. below: who drafts for it.
    """

    def __init__(
        self,
        context: SessionContext,
        method: Method,
        below: Drafting,
        meter: StageMeter,
        control: edge.Control,
        term: int,
    ) -> None:
        self._context = context
        self._method = method
        self._below = below
        self._meter = meter
        self._control = control
        self._incarnation = min(term * INCARNATIONS, edge.MAX_INCARNATION - INCARNATIONS)
        self._cascade = Cascade()
        self._session: EdgeSession | None = None
        self._failed = False
        self._eos: frozenset[int] = frozenset()
        self._stop: Callable[[], bool] = lambda: True
        self._asked_ms = 0.0
        self._spec: SessionSpec
        self._deliver: Deliver

    def open(
        self,
        spec: SessionSpec,
        deliver: Deliver,
        failed: Callable[[Exception], None],  # noqa: ARG002 - the outer session outlives the inner
    ) -> None:
        """The inner session itself begins with the first draft: only then is the text known."""
        self._spec, self._deliver = spec, deliver

    def draft(self, effect: Draft, eos: frozenset[int], stop: Callable[[], bool]) -> None:
        if self._failed:
            return
        self._cascade = self._cascade.ask(effect)
        self._eos, self._stop, self._asked_ms = eos, stop, now_ms()
        text = self._cascade.text
        if self._session is None:
            self._begin(text)
        elif self._cascade.begins_again(self._session.state.tokens):
            self._meter.restarts += 1
            self._session.handle(Rebased(text, now_ms()))
        assert self._session is not None
        self._session.handle(Read(len(text), now_ms()))
        self._soon()

    def crop(self, length: int) -> None:
        self._cascade = self._cascade.cropped(length)

    def learn(self, effect: Learn) -> None:
        del effect  # it reads no features

    def close(self) -> None:
        session, self._session = self._session, None
        self._failed = True
        if session is not None:
            session.close()

    def _begin(self, text: tuple[int, ...]) -> None:
        output = InnerOutput(self._meter, self._soon, self._give_up)
        session = EdgeSession(self._context, output, self._below, Role.MIDDLE)
        spec = inner_spec(self._spec, self._method)
        committed = text[len(spec.prompt) :]
        last = self._incarnation + INCARNATIONS - 1
        session.begin(spec, self._control, committed, self._incarnation, last)
        self._session = session

    def _give_up(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            log.warning(
                "session %s: no drafts by a middle worker any more, the target writes by itself: "
                "%s", self._spec.session, why,
            )  # fmt: skip

    def _soon(self) -> None:
        """Answer in the next turn of the loop: the caller is in the middle of a step."""
        asyncio.get_running_loop().call_soon(self._answer)

    def _answer(self) -> None:
        if self._session is None or self._failed:
            return
        if self._stop():
            self._cascade = self._cascade.dropped()
        self._cascade, answer = self._cascade.answer(self._session.state.tokens, self._eos)
        if answer is not None:
            window = answered(
                self._cascade, answer, now_ms() - self._asked_ms, self._session.state.rows,
                self._spec.sampling,
            )  # fmt: skip
            self._deliver(answer.asked.job, window)


class InnerOutput:
    """What an inner session decides: more text, or its end.

    Args:
        grown: called when there is more text. over: called with the reason once there will be none.
    """

    stopped_at = None
    probe = ""
    """Any middle worker will do: its tokens are proposals."""

    def __init__(
        self, meter: StageMeter, grown: Callable[[], None], over: Callable[[str], None]
    ) -> None:
        self._meter = meter
        self._grown = grown
        self._over = over

    def notify(self, effects: list[DecidedEffect], peer: Peer | None) -> None:
        for effect in effects:
            match effect:
                case Commit():
                    self._grown()
                case WindowJudged():
                    self._meter.judged(effect, peer)
                case Finish(FinishReason.ERROR, error):
                    self._over(error)
                case Finish():
                    pass  # its text has ended; where the target's goes another way it begins again

    def sent(self, message: Message, size: int) -> None:  # noqa: ARG002 - all of them count
        self._meter.num_bytes += size

    def received(self, size: int) -> None:
        self._meter.num_bytes += size

    def drafted(self, start: int, num_tokens: int, draft_ms: float, ended_ms: float) -> None:
        """Lookup costs nothing worth counting."""

    def failed(self, why: str) -> None:
        self._over(why)


def inner_spec(outer: SessionSpec, method: Method) -> SessionSpec:
    """Of the inner session: the same prompt, sampling and length, another method and name. Where
    the outer method compares distributions the middle model's are wanted: they are the draft's."""
    return msgspec.structs.replace(
        outer, session=inner_session_id(outer.session), method=method,
        sampling=_sampling(outer.sampling), drafts=True,
        rows=not outer.method.acceptance.lossless and outer.sampling.coupled,
    )  # fmt: skip


def _sampling(outer: SamplingParams) -> SamplingParams:
    """With Gumbel coupling the middle model chooses by the target's own noise, so that it chooses
    alike. With residual coupling drafts must not know the numbers by which they are judged."""
    if outer.coupled:
        return outer
    return replace(outer, coupling=SessionCoupling.GUMBEL, seed=outer.seed ^ OTHER_SEED)
