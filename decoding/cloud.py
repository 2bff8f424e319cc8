"""One session at the cloud, as a pure state machine: `step(state, event) → (state, effects)`.

    stage       event                    next        effects
    ----------  -----------------------  ----------  -----------------------------------------
    (open)                               PREFILLING  Send SessionReady, Report, Prefill
    PREFILLING  Prefilled                then as IDLE
    IDLE        a draft continues the    VERIFYING   Forward
                text, or the method runs
                on and the lease holds
    VERIFYING   RowsReady                IDLE        Send Feedback; ReportWindow for each window
                                                     judged; Crop where one was rejected
                … of a tree              IDLE        Crop to the accepted path; Send Feedback;
                                                     ReportTree
                PrehitFailed             IDLE        the same, without a pass
                … rejected, residual     RECOVERING  FetchRow
    RECOVERING  FullRowReady             IDLE        as after RowsReady
    any         WindowArrived            same        hangs in the tree of drafts; where the text has
                                                     passed or contradicts it, ReportWindow
                … repeated               same        Send Feedback, from what is acknowledged on
                AckArrived               same        the lease goes on
                … again                  same        Send Feedback, from the acknowledged length on
                OpenArrived, same        same        Send SessionReady
                … lower incarnation      same        nothing; `check_reopen` says so to its sender
                … higher incarnation     PREFILLING  Crop to the common prefix, Prefill

A window is addressed by what it follows: its start, and the hash of the whole text before it. So
windows may come in any order, early, late or twice; one drafted after another text never matches
and needs no answer. Committed text is sent once, from where the last feedback ended, and all that
is not acknowledged can be asked for again: a lost message costs time and no token.

Invariant between passes: either all of `tokens` has run and the last pass's last row, the kept one,
is the next token's distribution; or all but the last token has, and the next pass begins with it.
What a pass holds, and what its rows decide, is in `decoding.cloud_passes`.

This module knows no clock, no socket and no model.
"""

from __future__ import annotations

from msgspec.structs import replace

from bus.protocol.arrays import unpack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.errors import ImpossibleEventError
from bus.protocol.messages import (
    Ack,
    DraftWindow,
    Fault,
    FaultCode,
    OpenSession,
    SessionOpened,
    SessionReady,
)
from decoding.cloud_events import (
    AckArrived,
    Crop,
    Event,
    FullRowReady,
    OpenArrived,
    Prefill,
    Prefilled,
    PrehitFailed,
    Report,
    RowsReady,
    Send,
    WindowArrived,
)
from decoding.cloud_passes import (
    compared,
    feedback,
    judge,
    next_pass,
    plan,
    prehit_failed,
    recovered,
    reported,
)
from decoding.cloud_state import (
    MAX_JUDGED,
    CloudState,
    Heard,
    Idle,
    Limits,
    Prefilling,
    Recovering,
    Stage,
    Step,
    Verifying,
    refusal,
)
from decoding.cloud_trees import judge_tree
from decoding.common import common_length
from decoding.draft_tree import drafted
from decoding.engine import TargetRow
from decoding.methods import Method
from decoding.prefix_hash import chain, prompt_hash
from decoding.sampling import SamplingParams
from decoding.token_scores import scored
from decoding.verification import Arrived, arrived

__all__ = [
    "CloudState",
    "Idle",
    "Limits",
    "Prefilling",
    "Recovering",
    "Stage",
    "Step",
    "Verifying",
    "begin",
    "check_open",
    "check_reopen",
    "plan",
    "ready",
    "step",
    "unknown_session",
]


def begin(message: OpenSession, method: Method, cloud: str, limits: Limits, handle: int) -> Step:
    """A session that is not known here yet. The message has passed `check_open`.

    Args:
        handle: what its windows will be addressed by; no other session of this worker has it.
    """
    return _prefill(_opened(message, method, cloud, limits, handle))


def _opened(
    message: OpenSession, method: Method, cloud: str, limits: Limits, handle: int
) -> CloudState:
    """With the text of the message, of which nothing has run."""
    prompt = unpack_tokens(message.prompt)
    tokens = prompt + unpack_tokens(message.committed)
    return CloudState(
        cloud=cloud,
        session=message.session,
        client=message.client,
        edge=message.edge,
        method=method,
        sampling=SamplingParams(
            message.temperature, message.top_p, message.top_k, message.seed, message.coupling
        ),
        limits=replace(limits, eos=frozenset()) if message.ignore_eos else limits,
        incarnation=message.incarnation,
        handle=handle,
        num_prompt=len(prompt),
        end=len(prompt) + message.max_new_tokens,
        tokens=tokens,
        hashes=_hashes(tokens, len(prompt)),
        acknowledged=len(tokens),
        sent_length=len(tokens),
        rows=message.rows,
        features=message.features,
        logprobs=message.logprobs,
        prompt_logprobs=message.prompt_logprobs and not message.committed,
    )


def _hashes(tokens: tuple[int, ...], num_prompt: int) -> tuple[bytes, ...]:
    return tuple(chain(prompt_hash(tokens[:num_prompt]), tokens[num_prompt:]))


def check_open(message: OpenSession, digest: str, limits: Limits) -> Fault | None:
    """Why a session cannot be opened here, or None."""
    tokens = unpack_tokens(message.prompt) + unpack_tokens(message.committed)
    if message.tokenizer_digest != digest:
        return refusal(
            message.session,
            FaultCode.TOKENIZER_MISMATCH,
            "draft and target do not share a tokenizer; use a draft of the target's family",
        )
    if not all(0 <= token < limits.vocab_size for token in tokens):
        return refusal(
            message.session,
            FaultCode.BAD_TOKENS,
            f"token ids must lie in 0 … {limits.vocab_size - 1}",
        )
    if message.logprobs is not None and message.coupling is not SessionCoupling.GUMBEL:
        return refusal(
            message.session,
            FaultCode.UNKNOWN_METHOD,
            f"log-probabilities need coupling 'gumbel', got {message.coupling.value!r}",
        )
    length = len(unpack_tokens(message.prompt)) + message.max_new_tokens
    if length > limits.context_length:
        return refusal(
            message.session,
            FaultCode.CONTEXT_OVERFLOW,
            f"prompt and max_new_tokens take {length} tokens, the target's context holds "
            f"{limits.context_length}",
        )
    return None


def check_reopen(incarnation: int, message: OpenSession) -> Fault | None:
    """Why a session of which `incarnation` is open cannot be opened again so, or None; for the
    sender, who may not be the session's edge any more."""
    if message.incarnation >= incarnation:
        return None
    return refusal(
        message.session,
        FaultCode.STALE_INCARNATION,
        f"incarnation {message.incarnation} is older than {incarnation}, which runs here: another "
        "edge worker has taken the request over",
    )


def step(state: CloudState, event: Event) -> Step:
    """Advance one session by one event.

    Raises:
        ImpossibleEventError: work is complete that was never asked for, or of another kind.
    """
    match event:
        case OpenArrived(message, handle):
            return _open_again(state, message, handle)
        case WindowArrived(message, now_ms):
            return _window(state, message, now_ms)
        case AckArrived(message, now_ms):
            return _ack(state, message, now_ms)
    if event.job < state.job:  # opened again meanwhile
        return state, ()
    match event, state.stage:
        case Prefilled(job=state.job, rows=rows), Prefilling():
            return next_pass(_prompt_scored(replace(state, stage=Idle()), rows))
        case RowsReady(job=state.job), Verifying():
            return judge(state, event) if event.plan.tree is None else judge_tree(state, event)
        case PrehitFailed(job=state.job), Verifying():
            return prehit_failed(state, event)
        case FullRowReady(job=state.job), Recovering() as stage:
            return recovered(state, stage, event.probs)
    raise ImpossibleEventError(
        f"{type(event).__name__} of job {event.job} in stage {state.stage.name}; job {state.job} "
        "is the newest"
    )


# --- opening ----------------------------------------------------------------------------------


def ready(state: CloudState, incarnation: int, handle: int) -> SessionReady:
    """The session is known here, under this incarnation and handle."""
    return SessionReady(state.session, incarnation, state.cloud, handle)


def _ready(state: CloudState) -> Send:
    return Send(ready(state, state.incarnation, state.handle))


def _prefill(state: CloudState) -> Step:
    """Run what the cache lacks, all but the last token: that one yields the first pass's row."""
    job = state.job + 1
    missing = state.tokens[state.num_run : -1]
    following = state.tokens[1:] if _prompt_waits(state) else ()
    state = replace(
        state, job=job, stage=Prefilling(), num_run=max(state.num_run, len(state.tokens) - 1)
    )
    opened = SessionOpened(
        session=state.session,
        client=state.client,
        edge=state.edge,
        cloud=state.cloud,
        method=state.method.name,
        incarnation=state.incarnation,
    )
    return state, (_ready(state), Report(opened), Prefill(job, missing, following))


def _prompt_waits(state: CloudState) -> bool:
    """Whether log-probabilities of the prompt are wanted and not known yet."""
    return state.prompt_logprobs and not state.prompt_scores


def _prompt_scored(state: CloudState, rows: tuple[TargetRow, ...]) -> CloudState:
    """With the prompt's log-probabilities, where its rows were wanted."""
    if not rows or state.logprobs is None:
        return state
    found = scored(rows, state.tokens[1 : state.num_prompt], state.logprobs)
    return replace(state, prompt_scores=found)


def _open_again(state: CloudState, message: OpenSession, handle: int) -> Step:
    if message.incarnation < state.incarnation:
        return state, ()
    if message.incarnation == state.incarnation:
        return state, (_ready(state),)
    opened = _opened(message, state.method, state.cloud, state.limits, handle)
    common = common_length(state.tokens, opened.tokens)
    num_run = min(state.num_run, common, len(opened.tokens) - 1)
    state = replace(
        opened,
        client=state.client,
        sampling=state.sampling,  # the cache was opened with it
        num_run=num_run,
        job=state.job,
        own=state.own,
        pass_ms=state.pass_ms,
        prompt_scores=state.prompt_scores,
    )
    if _prompt_waits(state):
        state = replace(state, num_run=0)
    crop = Crop(state.num_run)
    state, effects = _prefill(state)
    return state, (crop, *effects)


# --- windows and acknowledgements ---------------------------------------------------------------


def _window(state: CloudState, message: DraftWindow, now_ms: float) -> Step:
    window = arrived(message, now_ms, state.sampling)
    fault = _check(state, window)
    if fault is not None:
        return state, (Send(fault),)
    state = _heard(state, message, message.acknowledged, now_ms)
    known = {w.source.message.number for w in state.drafts.windows}
    if message.number in state.judged or message.number in known:
        return state, (Send(feedback(state, state.acknowledged)),)
    hung = drafted(message.start, message.follows, message.token_ids, window, message.branch)
    judged = compared(state, hung, now_ms)
    if judged is not None:
        numbers = (*state.judged, message.number)[-MAX_JUDGED:]
        return replace(state, judged=numbers), reported([judged])
    text = len(state.tokens), state.hashes[-1]
    drafts = state.drafts.add(hung, *text).after(*text)
    return next_pass(replace(state, drafts=drafts))


def _ack(state: CloudState, message: Ack, now_ms: float) -> Step:
    if not state.num_prompt <= message.length <= len(state.tokens):
        detail = f"{message.length} tokens are acknowledged of {len(state.tokens)}"
        return state, (Send(refusal(state.session, FaultCode.BAD_TOKENS, detail)),)
    newest = state.heard is None or message.number > state.heard.number
    if newest and message.threshold is not None:
        state = replace(state, threshold=message.threshold)
    state = _heard(state, message, message.length, now_ms)
    state, effects = next_pass(state)
    if message.again:
        effects = (Send(feedback(state, message.length)), *effects)
    return state, effects


def _heard(
    state: CloudState, message: DraftWindow | Ack, acknowledged: int, now_ms: float
) -> CloudState:
    if state.heard is None or message.number > state.heard.number:
        state = replace(state, heard=Heard(message.number, now_ms))
    acknowledged = max(state.acknowledged, acknowledged)
    unknown = len(state.tokens) - acknowledged  # to the edge
    scores = state.scores[max(0, len(state.scores) - unknown) :]
    return replace(state, acknowledged=acknowledged, scores=scores)


def _check(state: CloudState, window: Arrived) -> Fault | None:
    """Why a window cannot be judged, whenever that might be."""
    message = window.message
    known = state.num_prompt <= message.acknowledged <= len(state.tokens)
    if message.start < state.num_prompt or not known:
        return refusal(
            state.session,
            FaultCode.BAD_TOKENS,
            f"a window from position {message.start} acknowledges {message.acknowledged} tokens; "
            f"the text has {len(state.tokens)}, its prompt {state.num_prompt}",
        )
    if message.start + message.num_tokens > state.limits.context_length:
        return refusal(
            state.session, FaultCode.CONTEXT_OVERFLOW, "the window ends beyond the context"
        )
    if state.method.needs_rows(state.sampling) and message.rows is None:
        return refusal(
            state.session, FaultCode.BAD_TOKENS,
            f"{state.method.name} needs the draft's probabilities of each token, with coupling "
            f"{state.sampling.coupling.value}; the window has none",
        )  # fmt: skip
    ids = [proposal.token for proposal in window.proposals]
    if message.rows is not None:
        ids += unpack_tokens(message.rows.q_ids)
    if not (min(ids) >= 0 and max(ids) < state.limits.vocab_size):
        return refusal(
            state.session,
            FaultCode.BAD_TOKENS,
            f"token ids must lie in 0 … {state.limits.vocab_size - 1}",
        )
    if not all(proposal.possible for proposal in window.proposals):
        return refusal(
            state.session, FaultCode.BAD_TOKENS, "a token that its own distribution rules out"
        )
    return None


def unknown_session(message: DraftWindow | Ack) -> Fault:
    """The answer to a message of a session this worker does not know; the edge opens it again."""
    detail = f"handle {message.handle} is not known here"
    return Fault("-", FaultCode.UNKNOWN_SESSION, detail, message.handle)
