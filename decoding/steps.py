"""An answer written in steps, as a pure state machine: `step(state, event) → (state, effects)`.

Lookahead Reasoning (Fu et al., 2025, arXiv 2506.19830). A *step* ends at a blank line, an end
token, or after `max_tokens`. Draft and target each write a *version* of it: the draft writes one
step after the other, and for each of them the target writes its own from the same prefix, so that
it writes several at once:

    committed text │ step 1          step 2          step 3
    draft          │ d₁ ───────────▶ d₂ ───────────▶ d₃
    target         │ t₁ after text   t₂ after text d₁   t₃ after text d₁ d₂   …

    event          effects
    -------------  ---------------------------------------------------------------------------
    (begin)        SeekPeer, for the target's end tokens
    Started        WriteStep and DraftStep of the first step; Finish where the text is at its end
    StepDrafted    DraftStep of the next step and WriteStep of it, up to `ahead` drafted ones;
                   with the target's version there: CommitStep, as below
    StepWritten    with the drafted version there: CommitStep of the drafted one where the judge
                   calls both equivalent, and on with the next; else CommitStep of the target's
                   own, DropSteps of those after it, WriteStep and DraftStep of the next
                   … end reached: CommitStep, Finish
    StopMatched,   Finish
      Ended

A step is decided when both its versions are there, whichever came first, and both depend on the
prefix alone. So the text is a function of the prompt, the models, the seed and the judge: never of
timing, nor of how far ahead steps were written, and an answer goes on from any step's end.

This module knows no clock, no tokenizer and no model. Events that come late, for a step that was
dropped, change nothing; one that cannot happen raises `ImpossibleEventError`.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import FinishReason
from decoding.edge_events import Ended, Finish, SeekPeer, Started, StopMatched
from decoding.methods.base import Steps

__all__ = [
    "CommitStep", "DraftStep", "DropSteps", "Effect", "Ended", "Event", "Finish", "SeekPeer",
    "Started", "StepDrafted", "StepWritten", "StepsState", "StopMatched", "WriteStep", "begin",
    "is_whole", "step",
]  # fmt: skip

BLANK_LINE = "\n\n"


def is_whole(text: str) -> bool:
    """Whether a step's text has reached its blank line; those it begins with do not count."""
    return BLANK_LINE in text.lstrip()


# --- events -----------------------------------------------------------------------------------


class StepDrafted(Struct, frozen=True):
    """The draft has written step `index` to its end.

    Attributes:
        tokens: at least one. text: of these tokens.
    """

    index: int
    tokens: tuple[int, ...]
    text: str


class StepWritten(Struct, frozen=True):
    """The target has written its own version of step `index` to its end; as `StepDrafted`."""

    index: int
    tokens: tuple[int, ...]
    text: str


Event = Started | StepDrafted | StepWritten | StopMatched | Ended

# --- effects ----------------------------------------------------------------------------------


class DraftStep(Struct, frozen=True):
    """Let the draft write a step; one such effect at a time is not answered yet.

    Attributes:
        index: numbers steps in the order in which they were begun; none is used twice.
        prefix: the tokens it follows, prompt included.
        max_tokens: after so many tokens it ends in any case.
    """

    index: int
    prefix: tuple[int, ...]
    max_tokens: int


class WriteStep(Struct, frozen=True):
    """Let the target write its own version of a step; as `DraftStep`, but several at a time."""

    index: int
    prefix: tuple[int, ...]
    max_tokens: int


class DropSteps(Struct, frozen=True):
    """Steps from `first` on do not follow the text any more; both their versions are off."""

    first: int


class CommitStep(Struct, frozen=True):
    """Promise a step to the user.

    Attributes:
        start: number of its first generated token, from 0.
        tokens: of the drafted version where `accepted`, else of the target's own.
        num_drafted: tokens of the drafted version.
    """

    index: int
    start: int
    tokens: tuple[int, ...]
    accepted: bool
    num_drafted: int


Effect = SeekPeer | DraftStep | WriteStep | DropSteps | CommitStep | Finish

# --- state ------------------------------------------------------------------------------------


class Version(Struct, frozen=True):
    """One model's version of a step."""

    tokens: tuple[int, ...]
    text: str


class Pending(Struct, frozen=True):
    """A step that is not decided yet.

    Attributes:
        asked: `DraftStep` has been given.
    """

    index: int
    max_tokens: int
    asked: bool = False
    drafted: Version | None = None
    written: Version | None = None


class StepsState(Struct, frozen=True):
    """An answer in steps.

    Attributes:
        rule: judge and sizes.
        num_prompt: tokens of the prompt. tokens: prompt and committed tokens.
        eos: tokens that end the answer, the target's; None until it is known.
        pending: steps being written, each after the drafted versions of those before it.
        last_index: of the newest step.
    """

    rule: Steps
    num_prompt: int
    max_new_tokens: int
    tokens: tuple[int, ...]
    eos: frozenset[int] | None = None
    pending: tuple[Pending, ...] = ()
    last_index: int = 0
    finished: bool = False

    @property
    def name(self) -> str:
        """Of the phase, for stories."""
        if self.finished:
            return "finished"
        return "seeking" if self.eos is None else "writing"

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    def ends_answer(self, token: int) -> bool:
        return self.eos is not None and token in self.eos

    def room(self, prefix: tuple[int, ...]) -> int:
        """Most tokens of a step after `prefix`; 0 where that ends the answer."""
        if len(prefix) > self.num_prompt and self.ends_answer(prefix[-1]):
            return 0
        left = self.max_new_tokens - (len(prefix) - self.num_prompt)
        return max(0, min(self.rule.max_tokens, left))


Step = tuple[StepsState, tuple[Effect, ...]]


def begin(
    rule: Steps,
    prompt: tuple[int, ...],
    max_new_tokens: int,
    committed: tuple[int, ...] = (),
) -> Step:
    """A new answer, or one taken over with whole steps already promised to its user."""
    state = StepsState(rule, len(prompt), max_new_tokens, prompt + committed)
    return state, (SeekPeer("new answer in steps"),)


def step(state: StepsState, event: Event) -> Step:
    """Advance one answer by one event."""
    if state.finished:
        return state, ()
    match event:
        case Started(eos):
            if state.eos is not None:
                raise ImpossibleEventError("a worker was found, but none was looked for")
            return _going_on(replace(state, eos=eos), ())
        case StepDrafted(index, tokens, text):
            return _arrived(state, index, Version(tokens, text), drafted=True)
        case StepWritten(index, tokens, text):
            return _arrived(state, index, Version(tokens, text), drafted=False)
        case StopMatched(num_generated):
            if num_generated > state.num_generated:
                raise ImpossibleEventError(
                    f"a stop string ends in token {num_generated} of {state.num_generated}"
                )
            kept = state.tokens[: state.num_prompt + num_generated]
            return _finished(replace(state, tokens=kept), FinishReason.STOP)
        case Ended(reason, error):
            return _finished(state, reason, error)


def _arrived(state: StepsState, index: int, version: Version, drafted: bool) -> Step:
    if index > state.last_index:
        raise ImpossibleEventError(f"step {index} is there, {state.last_index} is the newest")
    place = next((i for i, each in enumerate(state.pending) if each.index == index), None)
    if place is None:
        return state, ()  # dropped meanwhile
    known = state.pending[place]
    if not 1 <= len(version.tokens) <= known.max_tokens or (drafted and not known.asked):
        raise ImpossibleEventError(
            f"step {index} has {len(version.tokens)} tokens; 1 … {known.max_tokens} were asked for"
        )
    if (known.drafted if drafted else known.written) is not None:
        raise ImpossibleEventError(f"step {index} has come twice")
    known = replace(known, drafted=version) if drafted else replace(known, written=version)
    pending = (*state.pending[:place], known, *state.pending[place + 1 :])
    return _decided(replace(state, pending=pending))


def _decided(state: StepsState) -> Step:
    """Commit the steps that can be decided, the first ones; then write on."""
    effects: tuple[Effect, ...] = ()
    while state.pending:
        first, *later = state.pending
        if first.drafted is None or first.written is None:
            break
        accepted = _equivalent(state, first.drafted, first.written)
        tokens = (first.drafted if accepted else first.written).tokens
        num_drafted = len(first.drafted.tokens)
        effects += (CommitStep(first.index, state.num_generated, tokens, accepted, num_drafted),)
        if not accepted and later:
            effects += (DropSteps(later[0].index),)
        state = replace(
            state, tokens=state.tokens + tokens, pending=tuple(later) if accepted else ()
        )
    return _going_on(state, effects)


def _equivalent(state: StepsState, drafted: Version, written: Version) -> bool:
    """Whether the judge calls both versions alike, and both end for the same reason: else the
    answer would end early, or go on after its end."""
    return _ending(state, drafted) == _ending(state, written) and state.rule.judge(
        drafted.text, written.text
    )


def _ending(state: StepsState, version: Version) -> str:
    if state.ends_answer(version.tokens[-1]):
        return "end token"
    return "blank line" if is_whole(version.text) else "cut"


def _going_on(state: StepsState, effects: tuple[Effect, ...]) -> Step:
    """Begin the steps that may be written now; finish where the text is at its end."""
    if not state.room(state.tokens):
        ended = state.num_generated and state.ends_answer(state.tokens[-1])
        state, more = _finished(state, FinishReason.STOP if ended else FinishReason.LENGTH)
        return state, effects + more
    prefix, pending = state.tokens, list(state.pending)
    for place in range(state.rule.ahead + 1):
        room = state.room(prefix)
        if place == len(pending):
            if not room:
                break
            state = replace(state, last_index=state.last_index + 1)
            pending.append(Pending(state.last_index, room))
            effects += (WriteStep(state.last_index, prefix, room),)
        known = pending[place]
        if place == state.rule.ahead:
            break
        if not known.asked:
            pending[place] = replace(known, asked=True)
            effects += (DraftStep(known.index, prefix, room),)
        if known.drafted is None:
            break
        prefix += known.drafted.tokens
    return replace(state, pending=tuple(pending)), effects


def _finished(state: StepsState, reason: FinishReason, error: str = "") -> Step:
    return replace(state, pending=(), finished=True), (Finish(reason, error),)
