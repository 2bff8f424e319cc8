"""Answers in steps: two toy writers, every order in which their versions can arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import FinishReason
from decoding import steps
from decoding.judges import SameText
from decoding.methods.base import Steps
from decoding.steps import (
    CommitStep,
    DraftStep,
    DropSteps,
    Effect,
    Ended,
    Finish,
    SeekPeer,
    Started,
    StepDrafted,
    StepsState,
    StepWritten,
    StopMatched,
    WriteStep,
)

BLANK, EOS = 0, 1
PROMPT = (7, 8)
RULE = Steps(SameText(), ahead=2, max_tokens=5)
STARTED = Started(frozenset((EOS,)), 0.0)
Writer = Callable[[tuple[int, ...]], int]


def text_of(tokens: tuple[int, ...]) -> str:
    """Tokens 2 and 3 are one letter in two cases, which the judge does not distinguish."""
    letters = {BLANK: "\n\n", EOS: "", 2: "a", 3: "A"}
    return "".join(letters.get(token) or chr(ord("a") + token) for token in tokens if token != EOS)


def step_of(writer: Writer, prefix: tuple[int, ...], most: int) -> tuple[int, ...]:
    """A whole step of a toy writer."""
    tokens: tuple[int, ...] = ()
    while len(tokens) < most:
        tokens += (writer(prefix + tokens),)
        if tokens[-1] == EOS or steps.is_whole(text_of(tokens)):
            break
    return tokens


def writers(seed: int, agreement: float) -> tuple[Writer, Writer]:
    """A target, and a draft that writes its tokens with a given probability."""

    def draw(which: int, prefix: tuple[int, ...]) -> float:
        return hash((seed, which, prefix)) % 2**20 / 2**20

    def target(prefix: tuple[int, ...]) -> int:
        return int(40 * draw(0, prefix)) % 6 if draw(4, prefix) > 0.03 else EOS

    def draft(prefix: tuple[int, ...]) -> int:
        agrees = draw(1, prefix) < agreement
        return target(prefix) if agrees else (2, 3, 4, BLANK)[int(4 * draw(2, prefix))]

    return draft, target


def in_sequence(
    draft: Writer, target: Writer, rule: Steps, most: int
) -> tuple[tuple[int, ...], list[bool]]:
    """The text by definition: step after step, both versions of it."""
    text: tuple[int, ...] = PROMPT
    accepted: list[bool] = []
    while (room := most - (len(text) - len(PROMPT))) > 0 and text[-1:] != (EOS,):
        ours, theirs = (
            step_of(writer, text, min(room, rule.max_tokens)) for writer in (draft, target)
        )
        ends = [(v[-1] == EOS, steps.is_whole(text_of(v))) for v in (ours, theirs)]
        same = ends[0] == ends[1] and rule.judge(text_of(ours), text_of(theirs))
        text, accepted = text + (ours if same else theirs), [*accepted, same]
    return text, accepted


class Shell:
    """Runs effects in an order that hypothesis draws; checks what must hold of them."""

    def __init__(self, draft: Writer, target: Writer, rule: Steps, most: int) -> None:
        self.writers = {DraftStep: draft, WriteStep: target}
        self.rule, self.most = rule, most
        self.waiting: list[DraftStep | WriteStep] = []
        self.late: list[DraftStep | WriteStep] = []
        self.accepted: list[bool] = []
        self.text: tuple[int, ...] = PROMPT
        self.finish: Finish | None = None
        self.state: StepsState

    def begin(self) -> None:
        """Begin, or go on from what has been committed as another edge would."""
        self.waiting, self.late = [], []
        committed = self.text[len(PROMPT) :]
        self.take(steps.begin(self.rule, PROMPT, self.most, committed))
        self.take(steps.step(self.state, STARTED))

    def take(self, done: steps.Step) -> None:
        self.state, effects = done
        for effect in effects:
            assert self.finish is None, "nothing follows a Finish"
            match effect:
                case DraftStep() | WriteStep():
                    self.waiting.append(effect)
                case DropSteps(first):
                    self.late += [each for each in self.waiting if each.index >= first]
                    self.waiting = [each for each in self.waiting if each.index < first]
                case CommitStep(_, start, tokens, accepted, _):
                    assert start == len(self.text) - len(PROMPT)
                    self.text += tokens
                    self.accepted.append(accepted)
                case Finish():
                    self.finish = effect
                case SeekPeer():
                    pass
        assert self.state.tokens == self.text
        drafts = [each for each in self.waiting if isinstance(each, DraftStep)]
        assert len(drafts) <= 1, "the draft writes one step at a time"
        assert len(self.waiting) - len(drafts) <= self.rule.ahead + 1

    def answer(self, effect: DraftStep | WriteStep) -> None:
        tokens = step_of(self.writers[type(effect)], effect.prefix, effect.max_tokens)
        kind = StepDrafted if isinstance(effect, DraftStep) else StepWritten
        self.take(steps.step(self.state, kind(effect.index, tokens, text_of(tokens))))


@given(
    st.integers(0, 10_000), st.sampled_from([0.6, 0.9, 0.98]), st.integers(0, 4),
    st.integers(1, 30), st.data(),
)  # fmt: skip
@settings(max_examples=300)
def test_the_text_does_not_depend_on_the_order_of_arrival(
    seed: int, agreement: float, ahead: int, most: int, data: Any
) -> None:
    """Nor on late answers, on a new beginning in mid-answer, or on how far ahead steps go."""
    draft, target = writers(seed, agreement)
    rule = Steps(SameText(), ahead=ahead + 1, max_tokens=RULE.max_tokens)
    shell = Shell(draft, target, rule, most)
    shell.begin()
    while shell.finish is None:
        choice = data.draw(st.integers(0, len(shell.waiting) + len(shell.late)))
        if choice < len(shell.waiting):
            shell.answer(shell.waiting.pop(choice))
        elif choice < len(shell.waiting) + len(shell.late):
            before = shell.state
            shell.answer(shell.late.pop(choice - len(shell.waiting)))
            assert shell.state == before, "what comes late changes nothing"
        elif data.draw(st.booleans()):
            shell.begin()
    text, accepted = in_sequence(draft, target, rule, most)
    assert shell.text == text
    assert shell.accepted == accepted
    ended = text[-1] == EOS
    assert shell.finish.reason is (FinishReason.STOP if ended else FinishReason.LENGTH)


def test_a_draft_that_writes_as_the_target_does_has_all_steps_accepted() -> None:
    def same(prefix: tuple[int, ...]) -> int:
        return BLANK if len(prefix) % 3 == 0 else 4

    shell = Shell(same, same, RULE, 40)
    shell.begin()
    while shell.finish is None:
        shell.answer(shell.waiting.pop())
    assert all(shell.accepted)
    assert len(shell.accepted) == 14


# --- effect by effect -------------------------------------------------------------------------


def begun(most: int = 100, committed: tuple[int, ...] = ()) -> tuple[StepsState, list[Effect]]:
    state, effects = steps.begin(RULE, PROMPT, most, committed)
    assert effects == (SeekPeer("new answer in steps"),)
    state, effects = steps.step(state, STARTED)
    return state, list(effects)


def drafted(index: int, *tokens: int) -> StepDrafted:
    return StepDrafted(index, tokens, text_of(tokens))


def written(index: int, *tokens: int) -> StepWritten:
    return StepWritten(index, tokens, text_of(tokens))


def run(*events: steps.Event, most: int = 100) -> list[Effect]:
    """The effects of the last event."""
    state, effects = begun(most)
    for event in events:
        state, found = steps.step(state, event)
        effects = list(found)
    return effects


def test_both_models_begin_at_once() -> None:
    _, effects = begun()
    assert effects == [WriteStep(1, PROMPT, 5), DraftStep(1, PROMPT, 5)]


def test_each_drafted_step_lets_the_target_write_the_next_one() -> None:
    prefix = (*PROMPT, 4, BLANK)
    assert run(drafted(1, 4, BLANK)) == [WriteStep(2, prefix, 5), DraftStep(2, prefix, 5)]


def test_no_more_than_so_many_steps_are_drafted_ahead() -> None:
    """The target still writes the one after them."""
    prefix = (*PROMPT, 4, BLANK, 5, BLANK)
    assert run(drafted(1, 4, BLANK), drafted(2, 5, BLANK)) == [WriteStep(3, prefix, 5)]


def test_an_accepted_step_is_the_drafts_and_makes_room_for_another() -> None:
    effects = run(drafted(1, 2, BLANK), drafted(2, 5, BLANK), written(1, 3, BLANK))
    prefix = (*PROMPT, 2, BLANK, 5, BLANK)
    assert effects == [CommitStep(1, 0, (2, BLANK), True, 2), DraftStep(3, prefix, 5)]


def test_at_a_mismatch_the_targets_step_is_committed_and_the_others_are_dropped() -> None:
    effects = run(drafted(1, 4, BLANK), drafted(2, 5, BLANK), written(1, 4, 4, BLANK))
    prefix = (*PROMPT, 4, 4, BLANK)
    assert effects == [
        CommitStep(1, 0, (4, 4, BLANK), False, 2), DropSteps(2), WriteStep(4, prefix, 5),
        DraftStep(4, prefix, 5),
    ]  # fmt: skip


def test_later_steps_wait_for_the_first() -> None:
    waiting = (drafted(1, 4, BLANK), drafted(2, 5, BLANK), written(2, 5, BLANK))
    assert run(*waiting) == []
    commits = [e for e in run(*waiting, written(1, 4, BLANK)) if isinstance(e, CommitStep)]
    assert [(c.index, c.start, c.tokens) for c in commits] == [
        (1, 0, (4, BLANK)), (2, 2, (5, BLANK)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((4, EOS), (4, BLANK)), ((4, BLANK), (4, EOS)), ((4,) * 5, (*(4,) * 4, EOS))],
)
def test_versions_that_end_for_different_reasons_are_not_equivalent(
    ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    commit = run(drafted(1, *ours), written(1, *theirs))[0]
    assert isinstance(commit, CommitStep)
    assert (commit.tokens, commit.accepted) == (theirs, False)


def test_nothing_follows_a_drafted_end_token() -> None:
    assert run(drafted(1, 4, EOS)) == []
    assert run(drafted(1, 2, EOS), written(1, 3, EOS)) == [
        CommitStep(1, 0, (2, EOS), True, 2), Finish(FinishReason.STOP),
    ]  # fmt: skip


def test_the_last_step_is_as_long_as_the_answer_may_be() -> None:
    _, effects = begun(most=3)
    assert effects == [WriteStep(1, PROMPT, 3), DraftStep(1, PROMPT, 3)]
    prefix = (*PROMPT, 4, BLANK)
    assert run(drafted(1, 4, BLANK), most=3) == [WriteStep(2, prefix, 1), DraftStep(2, prefix, 1)]
    assert run(drafted(1, 4, 4, 4), most=3) == []
    ends = run(drafted(1, 4, 4, 4), written(1, 4, 4, 4), most=3)
    assert ends[-1] == Finish(FinishReason.LENGTH)


def test_an_answer_that_was_at_its_end_is_finished_at_once() -> None:
    assert begun(committed=(4, EOS))[1] == [Finish(FinishReason.STOP)]
    assert begun(most=2, committed=(4, BLANK))[1] == [Finish(FinishReason.LENGTH)]


def test_a_stop_string_ends_the_answer_inside_a_committed_step() -> None:
    state, _ = begun()
    for event in (drafted(1, 4, 5, BLANK), written(1, 4, 5, BLANK)):
        state, _ = steps.step(state, event)
    over, effects = steps.step(state, StopMatched(2))
    assert effects == (Finish(FinishReason.STOP),)
    assert over.tokens == (*PROMPT, 4, 5)
    assert over.pending == ()
    with pytest.raises(ImpossibleEventError, match="token 4 of 3"):
        steps.step(state, StopMatched(4))


def test_whatever_comes_after_the_end_changes_nothing() -> None:
    state, _ = begun()
    state, effects = steps.step(state, Ended(FinishReason.CANCELLED))
    assert effects == (Finish(FinishReason.CANCELLED),)
    for event in (drafted(1, 4, BLANK), written(1, 4, BLANK), Ended(FinishReason.ERROR, "late")):
        assert steps.step(state, event) == (state, ())


@pytest.mark.parametrize(
    "event",
    [drafted(2, 4), written(9, 4), drafted(1), written(1, *(4,) * 6), written(1), STARTED],
    ids=["newer", "unknown", "empty", "long", "nothing written", "started twice"],
)
def test_events_that_cannot_happen_raise(event: steps.Event) -> None:
    state, _ = begun()
    with pytest.raises(ImpossibleEventError):
        steps.step(state, event)


def test_a_version_that_comes_twice_raises() -> None:
    state, _ = begun()
    state, _ = steps.step(state, drafted(1, 4, BLANK))
    with pytest.raises(ImpossibleEventError, match="twice"):
        steps.step(state, drafted(1, 4, BLANK))


@pytest.mark.parametrize(
    ("text", "whole"),
    [("a\n\n", True), ("a\n\nb", True), ("a\n", False), ("\n\n", False), ("\n\na\n\n", True)],
)
def test_a_step_ends_at_a_blank_line_after_something(text: str, whole: bool) -> None:
    assert steps.is_whole(text) is whole
