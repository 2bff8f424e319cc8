"""The target's side of an answer in steps: its own version of a step is a session of its own, whose
drafts are the drafted version."""

from __future__ import annotations

from typing import Any, Protocol

from msgspec.structs import replace

from bus.protocol.messages import FinishReason, Message
from decoding.edge import Control
from decoding.edge_events import Commit, Finish, WindowJudged
from decoding.edge_state import SessionSpec
from decoding.steps import WriteStep
from edge_worker.context import SessionContext
from edge_worker.output import DecidedEffect
from edge_worker.peers import Peer
from edge_worker.session import EdgeSession
from edge_worker.step_drafting import GivenDrafting
from edge_worker.text import StepText
from edge_worker.usage import UsageMeter


class Writings(Protocol):
    """Takes what the target writes. Called on the event loop."""

    def written(self, index: int, step: StepText, peer: Peer | None) -> None:
        """Step `index` has ended; `peer` has written it."""
        ...

    def writing_failed(self, why: str) -> None:
        """A step could not be written, for a reason its user can read."""
        ...


class StepOutput:
    """`edge_worker.output.SessionOutput` of one step: ends it, and counts what it costs.

    Args:
        meter: of the whole answer.
    """

    def __init__(self, index: int, step: StepText, meter: UsageMeter, writings: Writings) -> None:
        self._index = index
        self._step = step
        self._meter = meter
        self._writings = writings

    @property
    def stopped_at(self) -> int | None:
        """The end of the step is to its session what a stop string is to another."""
        return len(self._step.tokens) if self._step.ended else None

    @property
    def probe(self) -> str:
        return self._meter.probe

    def notify(self, effects: list[DecidedEffect], peer: Peer | None) -> None:
        for effect in effects:
            match effect:
                case Commit(_, tokens):
                    self._step.push(tokens)
                case WindowJudged():
                    self._meter.passed(effect)
                case Finish(FinishReason.STOP | FinishReason.LENGTH):
                    self._writings.written(self._index, self._step, peer)
                case Finish(FinishReason.ERROR, why):
                    self._writings.writing_failed(why)
                case _:
                    pass

    def sent(self, message: Message, size: int) -> None:
        del message
        self._meter.bytes_up += size

    def received(self, size: int) -> None:
        self._meter.bytes_down += size

    def drafted(self, start: int, num_tokens: int, draft_ms: float, ended_ms: float) -> None:
        """The draft's time is counted where it drafts."""

    def failed(self, why: str) -> None:
        self._writings.writing_failed(why)


class StepWriting:
    """The target's version of one step, being written.

    Attributes:
        drafting: takes the drafted version as it comes.
    """

    def __init__(
        self, context: SessionContext, spec: SessionSpec, effect: WriteStep, tokenizer: Any,
        eos: frozenset[int], meter: UsageMeter, writings: Writings,
    ) -> None:  # fmt: skip
        """Nothing happens before `begin`.

        Args:
            spec: of the whole answer.
        """
        self._spec, self._effect = spec, effect
        self.drafting = GivenDrafting()
        step = StepText(tokenizer, eos, effect.max_tokens)
        output = StepOutput(effect.index, step, meter, writings)
        self._session = EdgeSession(context, output, self.drafting)

    def begin(self, control: Control, incarnation: int, last_incarnation: int) -> None:
        """Open the session. Its name is no other owner's, as owners differ in incarnations."""
        effect = self._effect
        spec = replace(
            self._spec,
            session=f"{self._spec.session}.{incarnation}.{effect.index}",
            prompt=effect.prefix,
            max_new_tokens=effect.max_tokens,
        )
        self._session.begin(spec, control, (), incarnation, last_incarnation)

    def close(self) -> None:
        """Give it up, or leave it where it has ended."""
        self._session.close()
