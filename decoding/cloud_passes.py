"""Passes of one session at the cloud: what they run, and what their rows decide.

    a draft continues the text     verify it: run the path of drafted tokens, keep those accepted
    none does, within the lease    run the last token, with what a speculator proposes after it, or
                                   alone: the target writes one by itself
    neither                        wait

After a rejection, and wherever a method is lossless, the target's own choice follows at once: it is
what the text goes on with whatever comes. A lossy method may yet accept another token there:
where a pass is accepted in full its last row is kept, and the next drafted token is judged by it
before anything is run (docs/invariants.md, Pre-hit is free).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from msgspec.structs import replace

from bus.protocol.arrays import Float64Array, pack_tokens
from bus.protocol.messages import Feedback, Outcome
from decoding import token_features
from decoding.cloud_events import (
    Crop,
    Effect,
    FetchRow,
    Forward,
    PrehitFailed,
    ReportOwn,
    ReportWindow,
    RowsReady,
    Send,
)
from decoding.cloud_state import (
    MAX_JUDGED,
    MAX_PASS_TOKENS,
    CloudState,
    Idle,
    Kept,
    Ran,
    Recovering,
    Step,
    Verifying,
    clipped,
)
from decoding.common import common_length
from decoding.draft_tree import Drafted, DraftTree, Place
from decoding.engine import NO_IDS, TargetRow
from decoding.prefix_hash import chain
from decoding.token_rows import packed
from decoding.token_scores import TokenScore, joined, scored
from decoding.verification import (
    OWN_PASSES,
    Arrived,
    Judged,
    OwnPasses,
    Plan,
    PreHit,
    Test,
    own_token,
)

Path = tuple[Place[Arrived], ...]


def next_pass(state: CloudState) -> Step:
    """Ask for the model where there is something to run and nothing runs."""
    if not isinstance(state.stage, Idle) or state.ended:
        return state, ()
    if state.drafts.continues(len(state.tokens), state.hashes[-1]):
        return _forward(state)
    if not state.method.runs_on or len(state.tokens) - state.acknowledged >= state.lease:
        return state, ()
    if state.kept is None:
        return _forward(state)
    state, effects = committed(state, (state.kept.own,), None, scores=state.kept.scores)
    state, more = next_pass(state)
    return state, (*effects, *more)


def _forward(state: CloudState) -> Step:
    state = replace(state, job=state.job + 1, stage=Verifying())
    return state, (Forward(state.job),)


def plan(state: CloudState, forward: Forward) -> Plan:
    """What a pass holds that begins now; pure, so that the shell may ask when the model is free.

    It ends with a row after the last token, for the target's own choice.
    """
    if state.job != forward.job:  # opened again meanwhile
        return Plan()
    path, length = _path(state), len(state.tokens)
    row_ids = [place.drafted.source.proposals[place.index].ids for place in path]
    feed = state.tokens[state.num_run :] + tuple(place.token for place in path)
    prehit = None
    if path and state.kept is not None:
        prehit = _prehit(state, state.kept, path[0])
        row_ids = row_ids[1:]  # the kept row is its row
    first = length + (prehit is not None)
    choosing = state.sampling.choosing
    choices_at = tuple(first + i if choosing else None for i in range(len(row_ids)))
    own_at = None if state.sampling.greedy else length + len(path)
    return Plan(
        feed, (*row_ids, NO_IDS), (*choices_at, own_at), path, prehit, wants_top(state),
        state.method.acceptance.entropy, 0 if path else _tree_room(state), features=state.features,
        scored=_scored(state, path[prehit is not None :]),
    )  # fmt: skip


def wants_top(state: CloudState) -> bool:
    """Whether the most probable tokens of each row are wanted."""
    return state.rows or state.logprobs is not None


def _scored(state: CloudState, path: Path) -> tuple[tuple[int, ...], ...]:
    """For each row of a pass the drafted token after it, where log-probabilities are wanted."""
    if state.logprobs is None:
        return ()
    return (*((place.token,) for place in path), ())


def _tree_room(state: CloudState) -> int:
    """Most tokens of a tree after the text: the target's own token follows it before the end."""
    if not state.method.speculator:
        return 0
    return max(0, min(state.limits.tree_tokens, state.room - 1))


def _prehit(state: CloudState, kept: Kept, place: Place[Arrived]) -> PreHit:
    return PreHit(kept.index, _test(state, place, 0), state.features, wants_top(state))


def _test(state: CloudState, place: Place[Arrived], index: int) -> Test:
    """Of the drafted token at an index of the path."""
    source = place.drafted.source
    return Test(
        rule=state.method.acceptance,
        proposal=source.proposals[place.index],
        sampling=state.sampling,
        position=len(state.tokens) + index,
        threshold=_threshold(state, source),
    )


def _path(state: CloudState) -> Path:
    """The drafted tokens that continue the text, in whole windows."""
    most = min(MAX_PASS_TOKENS, state.limits.context_length - len(state.tokens))
    path = state.drafts.path(len(state.tokens), state.hashes[-1], most)
    whole = len(path)
    while whole and path[whole - 1].index + 1 < len(path[whole - 1].drafted.tokens):
        whole -= 1
    return path[:whole] or path


def _threshold(state: CloudState, source: Arrived) -> float:
    rows = source.message.rows
    return clipped(state, 0.0 if rows is None else rows.threshold)


# --- judging ----------------------------------------------------------------------------------


def judge(state: CloudState, ready: RowsReady) -> Step:
    """Accept the longest prefix the rule accepts; decide what follows it."""
    done = ready.plan
    ran = Ran(len(done.feed), ready.verify_ms, ready.now_ms, ready.share)
    state = replace(
        state, num_run=state.num_run + ran.num_tokens, pass_ms=state.timed(ran.verify_ms)
    )
    return _judge_from(state, done, 0, ready.rows, ran)


def _judge_from(
    state: CloudState, done: Plan, first: int, rows: tuple[TargetRow, ...], ran: Ran
) -> Step:
    """Judge the path from its token `first` on; those before it are accepted."""
    tests = (_test(state, place, i) for i, place in enumerate(done.path[first:], first))
    passed = (test.passes(row) for test, row in zip(tests, rows[first:], strict=False))
    accepted = next((i for i, ok in enumerate(passed, first) if not ok), len(done.path))
    num_kept = 0 if done.prehit is None else 1
    if accepted < len(done.path):
        return _reject(state, done, accepted, rows, ran, accepted - num_kept)
    own = own_token(rows[-1])
    exact = state.method.acceptance.lossless and state.sampling.coupled
    if exact or state.method.lockstep or not done.path:
        return _conclude(state, done, accepted, rows, ran, own)
    state, effects = _conclude_path(state, done, accepted, rows, ran, None)
    state = replace(
        state, kept=Kept(len(rows) - 1 - num_kept, own, _scores(state, rows[-1:], (own,)))
    )
    return go_on(state, effects)


def prehit_failed(state: CloudState, failed: PrehitFailed) -> Step:
    """The kept row has rejected the first token: nothing was run."""
    assert state.kept is not None
    ran = Ran(0, 0.0, failed.now_ms)
    return _reject(state, failed.plan, 0, (failed.row,), ran, state.kept.index)


def _reject(
    state: CloudState, done: Plan, accepted: int, rows: tuple[TargetRow, ...], ran: Ran, index: int
) -> Step:
    """The target's own token follows; with residual coupling a draw from the full row."""
    if state.sampling.coupled:
        return _conclude(state, done, accepted, rows, ran, own_token(rows[accepted]))
    state = replace(state, stage=Recovering(done, accepted, rows, ran))
    return state, (FetchRow(state.job, index),)


def recovered(state: CloudState, stage: Recovering, probs: Float64Array) -> Step:
    """The row of the rejection has come: draw what replaces the rejected token. Where that is
    the very same, the drafts after it go on being useful."""
    place, accepted = stage.plan.path[stage.accepted], stage.accepted
    token = state.method.acceptance.recover(
        place.drafted.source.proposals[place.index], probs, state.sampling,
        len(state.tokens) + accepted,
    )  # fmt: skip
    if token != place.token:
        return _conclude(state, stage.plan, accepted, stage.rows, stage.ran, token)
    if stage.ran.num_tokens:
        return _judge_from(state, stage.plan, accepted + 1, stage.rows, stage.ran)
    return go_on(*committed(state, (token,), stage.ran))


def _conclude(
    state: CloudState, done: Plan, accepted: int, rows: tuple[TargetRow, ...], ran: Ran, own: int
) -> Step:
    """Commit, answer, report; then go on."""
    if done.path:
        state, effects = _conclude_path(state, done, accepted, rows, ran, own)
        return go_on(state, effects)
    greedy = state.sampling.greedy
    passes = state.own.added(rows[-1], ran.verify_ms * ran.share, greedy)
    state, effects = committed(replace(state, own=passes), (own,), ran, rows[-1:])
    if passes.num_tokens >= OWN_PASSES:
        state, effects = replace(state, own=OwnPasses()), (*effects, ReportOwn(passes))
    return go_on(state, effects)


def _conclude_path(
    state: CloudState, done: Plan, accepted: int, rows: tuple[TargetRow, ...], ran: Ran,
    own: int | None,
) -> Step:  # fmt: skip
    """The accepted drafted tokens, and what the target has put after them."""
    reports = _reports(state, done, accepted, rows, ran, own)
    judged = tuple(report.judged.window.message.number for report in reports)
    new = tuple(place.token for place in done.path[:accepted])
    num_run = min(state.num_run, len(state.tokens) + accepted)
    effects: tuple[Effect, ...] = (Crop(num_run),) if num_run < state.num_run else ()
    state = _passed(replace(state, num_run=num_run), judged)
    began_ms = ran.now_ms - ran.verify_ms
    queue_ms = max(0.0, began_ms - done.path[0].drafted.source.arrived_ms)
    new = new if own is None else (*new, own)
    prehit = not ran.num_tokens
    state, more = committed(state, new, ran, rows[: len(new)], queue_ms, prehit)
    return state, (*effects, *more, *reports)


def _reports(
    state: CloudState, done: Plan, accepted: int, rows: tuple[TargetRow, ...], ran: Ran,
    own: int | None,
) -> tuple[ReportWindow, ...]:  # fmt: skip
    """One for each window of the path up to the rejection; a later one is void, unless it has been
    judged to its first token."""
    reports: list[ReportWindow] = []
    begin = 0
    for _, group in groupby(done.path, key=lambda place: id(place.drafted)):
        places = tuple(group)
        end = begin + len(places)
        num_good = min(accepted, end) - begin
        window, is_last = places[0].drafted.source, end == len(done.path)
        rejected = accepted < end
        if not rejected and places[-1].index + 1 < len(places[-1].drafted.tokens):
            begin = end  # the path leaves it for another branch: the text will judge it
            continue
        judged = Judged(
            window=window,
            reached=places[0].index,
            num_accepted=places[0].index + num_good,
            outcome=_outcome(rejected, ran),
            threshold=_threshold(state, window),
            done_ms=ran.now_ms,
            rows=rows[begin : end + is_last],
            own=own if rejected or is_last else None,
            verify_ms=ran.verify_ms,
            pass_tokens=0 if reports else ran.num_tokens,
            share=ran.share,
        )
        reports.append(ReportWindow(judged))
        if rejected:
            break
        begin = end
    return tuple(reports)


def _outcome(rejected: bool, ran: Ran) -> Outcome:
    if not rejected:
        return Outcome.ACCEPTED
    return Outcome.PARTIAL if ran.num_tokens else Outcome.PREHIT_REJECTED


# --- committing -------------------------------------------------------------------------------


def committed(
    state: CloudState, new: tuple[int, ...], ran: Ran | None, rows: tuple[TargetRow, ...] = (),
    queue_ms: float = 0.0, prehit: bool = False, proposed: int = 0, depth: int = 0,
    scores: tuple[TokenScore, ...] | None = None,
) -> Step:  # fmt: skip
    """The text goes on with `new`, chosen from `rows`: send it, and judge by it the windows it has
    passed.

    Args:
        scores: of the new tokens, where they are known without rows.
        proposed, depth: of the tree that the pass has judged.
    """
    now_ms = 0.0 if ran is None else ran.now_ms
    if scores is None:
        scores = _scores(state, rows, new)
    state = replace(
        state,
        scores=state.scores + scores,
        tokens=state.tokens + new,
        hashes=(*state.hashes, *tuple(chain(state.hashes[-1], new))[1:]),
        kept=None,
    )
    passed = [
        judged
        for window in state.drafts.windows
        if (judged := compared(state, window, now_ms)) is not None
    ]
    state = replace(state, drafts=state.drafts.after(len(state.tokens), state.hashes[-1]))
    state = _passed(state, tuple(judged.window.message.number for judged in passed))
    reports = reported(passed)
    prehit |= any(r.judged.outcome is Outcome.PREHIT_REJECTED for r in reports)
    sent = feedback(state, state.sent_length, ran, queue_ms, prehit)
    if proposed:
        sent = replace(sent, proposed=proposed, depth=depth)
    if len(rows) == len(sent.token_ids):
        sent = replace(
            sent,
            rows=packed(rows) if state.rows else None,
            features=token_features.packed(rows) if state.features else None,
        )
    return replace(state, sent_length=len(state.tokens)), (Send(sent), *reports)


def _scores(
    state: CloudState, rows: tuple[TargetRow, ...], tokens: tuple[int, ...]
) -> tuple[TokenScore, ...]:
    """Of tokens by their rows; none where the session does not ask for them."""
    return () if state.logprobs is None else scored(rows, tokens, state.logprobs)


def compared(state: CloudState, window: Drafted[Arrived], now_ms: float) -> Judged | None:
    """A window that the text has passed or contradicts, judged by the text alone; None where it may
    go on, has been judged, or was drafted after another text."""
    length, number = len(state.tokens), window.source.message.number
    if window.start > length or number in state.judged:
        return None
    if state.hash_at(window.start) != window.hashes[0]:
        return None
    text = state.tokens[window.start : window.end]
    agreed = common_length(text, window.tokens)
    if agreed == len(text) < len(window.tokens):
        return None
    outcome = Outcome.ACCEPTED if agreed == len(window.tokens) else Outcome.PREHIT_REJECTED
    threshold = _threshold(state, window.source)
    done_ms = max(now_ms, window.source.arrived_ms)
    return Judged(window.source, agreed, agreed, outcome, threshold, done_ms)


def reported(passed: Iterable[Judged]) -> tuple[ReportWindow, ...]:
    """Reports of windows that the text has decided; none of a branch that it has not taken."""
    return tuple(
        ReportWindow(judged)
        for judged in passed
        if judged.num_accepted or not judged.window.message.branch
    )


def _passed(state: CloudState, numbers: tuple[int, ...]) -> CloudState:
    """With windows that have been judged."""
    if not numbers:
        return state
    windows = tuple(w for w in state.drafts.windows if w.source.message.number not in numbers)
    judged = (*state.judged, *numbers)[-MAX_JUDGED:]
    return replace(state, judged=judged, drafts=DraftTree(windows))


def feedback(
    state: CloudState, start: int, ran: Ran | None = None, queue_ms: float = 0.0,
    prehit: bool = False,
) -> Feedback:  # fmt: skip
    """The text from `start` on. It measures a round trip only where a pass was run."""
    heard = None if ran is None else state.heard
    num_tokens = len(state.tokens) - start
    scores = state.scores[-num_tokens:] if 0 < num_tokens <= len(state.scores) else ()
    first = start == state.num_prompt and state.prompt_logprobs
    return Feedback(
        handle=state.handle,
        start=start,
        tokens=pack_tokens(state.tokens[start:]),
        number=None if heard is None else heard.number,
        held_ms=0.0 if ran is None or heard is None else max(0.0, ran.now_ms - heard.at_ms),
        verify_ms=0.0 if ran is None else ran.verify_ms,
        queue_ms=queue_ms,
        pass_tokens=0 if ran is None else ran.num_tokens,
        prehit=prehit,
        scores=joined(scores) if scores else None,
        prompt_scores=joined(state.prompt_scores) if first else None,
    )


def go_on(state: CloudState, effects: tuple[Effect, ...]) -> Step:
    """The pass is over: the next one, where there is something to run."""
    state, more = next_pass(replace(state, stage=Idle()))
    return state, (*effects, *more)
