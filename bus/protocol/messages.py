"""The messages workers exchange, typed and validated.

One frozen struct per message, encoded as one MessagePack array `[version, tag, field, …]` (see
`bus.protocol.codec`). Positions are absolute: index 0 is the first prompt token. Arrays are
little-endian bytes whose dtype and shape are in the field's comment; `bus.protocol.arrays` packs
and unpacks them.
Durations are milliseconds, as float32 on the wire where `single_float` is set.

This module knows what a message may contain. It does not know sockets, sessions or models.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

from bus.protocol.arrays import (
    PROB_DTYPE,
    TOKEN_DTYPE,
    Float16Array,
    Int32Array,
    unpack_tokens,
)
from bus.protocol.attachments import (
    MAX_SPARSE,
    TokenFeatures,
    TokenRows,
    TokenScores,
)
from bus.protocol.bounds import MAX_LOGPROBS, SessionCoupling, Threshold

__all__ = [
    "HASH_BYTES",
    "MAX_SPARSE",
    "PROTOCOL_VERSION",
    "Ack",
    "CloseSession",
    "ControlUpdate",
    "DraftRows",
    "DraftWindow",
    "Fault",
    "FaultCode",
    "Feedback",
    "FinishReason",
    "Message",
    "OpenSession",
    "Outcome",
    "SessionClosed",
    "SessionOpened",
    "SessionReady",
    "TokenFeatures",
    "TokenRows",
    "TokenScores",
    "WindowReport",
]

PROTOCOL_VERSION = 9
HASH_BYTES = 8
"""Of `decoding.prefix_hash`."""

_MAX_MS = 1e9

Identifier = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[A-Za-z0-9_.:-]+\Z")]
MethodName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[A-Za-z0-9_.:+-]+\Z")]
Counter = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Millis = Annotated[float, Meta(ge=0, le=_MAX_MS)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Outcome(StrEnum):
    """What became of a window, or of a pass without one.

    `PREHIT_REJECTED`: rejected although none of its tokens was run. `OWN`: the target has written
    by itself.
    """

    ACCEPTED = "accepted"
    PARTIAL = "partial"
    PREHIT_REJECTED = "prehit_rejected"
    OWN = "own"


class FaultCode(StrEnum):
    """Why a message was refused."""

    BAD_FRAME = "bad_frame"
    BAD_VERSION = "bad_version"
    BAD_TOKENS = "bad_tokens"
    TOKENIZER_MISMATCH = "tokenizer_mismatch"
    UNKNOWN_METHOD = "unknown_method"
    CONTEXT_OVERFLOW = "context_overflow"
    OVERLOADED = "overloaded"
    MODEL_FAILED = "model_failed"
    STALE_INCARNATION = "stale_incarnation"
    UNKNOWN_SESSION = "unknown_session"


class FinishReason(StrEnum):
    """Why an answer ended; the first two are OpenAI's and vLLM's words."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages; subclasses set their tag."""

    single_float: ClassVar[bool] = False


def _check_tokens(data: bytes, name: str) -> None:
    if len(data) % TOKEN_DTYPE.itemsize:
        raise ValueError(f"{name}: {len(data)} bytes are not a whole number of int32 tokens")


class OpenSession(Message, frozen=True, tag=1):
    """Edge → cloud: begin or take up a session. Repeated until `SessionReady` arrives.

    `temperature` and `top_p` are float64: both ends must warp the very same distribution.
    `top_k` 0 and `top_p` 1.0 mean "off"; `temperature` 0 is greedy. With `rows` feedback
    carries the distributions that its tokens were chosen from, with `features` the target's
    features there. With `logprobs` it carries log-probabilities, each token's own and so many
    others; with `prompt_logprobs` the first feedback has the prompt's too. `traceparent` is the
    request's (W3C), "" where it has none. With `ignore_eos` no token ends the answer.
    """

    session: Identifier
    client: Identifier
    edge: Identifier
    incarnation: Counter
    method: MethodName
    prompt: bytes  # i32[P], P ≥ 1
    committed: bytes  # i32[C], tokens already promised to the user
    seed: Seed
    max_new_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    temperature: Annotated[float, Meta(ge=0, le=100)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    top_k: Counter
    coupling: SessionCoupling
    tokenizer_digest: Annotated[str, Meta(min_length=1, max_length=128)]
    rows: bool = False
    features: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: bool = False
    traceparent: Annotated[str, Meta(max_length=64)] = ""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_tokens(self.prompt, "prompt")
        _check_tokens(self.committed, "committed")
        if not self.prompt:
            raise ValueError("prompt: at least one token is needed")


class DraftRows(TokenRows, frozen=True):
    """What drafted tokens were drawn from (docs/invariants.md, Sample from what is sent), where
    verification or credit needs it: both ends must add up and draw in the same order, and the edge
    has sorted them anyway."""

    threshold: Threshold
    control_version: Counter
    edge_ms: Millis  # of the window before: first draft step to feedback handled
    rework_ms: Millis  # of the window before: drafting time spent on tokens thrown away


class DraftWindow(Message, frozen=True, tag=2):
    """Edge → cloud: W drafted tokens from position `start`, after a text with the hash `follows`.

    `handle` is that of `SessionReady`. `number` counts the session's windows and acknowledgements;
    `acknowledged` is as `Ack.length`. Lossless methods with Gumbel coupling send no rows. A
    `branch` follows a second choice of the draft (`decoding.rescue`): where the text goes another
    way, that is no error of the draft's.
    """

    single_float: ClassVar[bool] = True

    handle: Counter
    number: Counter
    acknowledged: Counter
    start: Counter
    follows: bytes  # 8 bytes of `decoding.prefix_hash`
    tokens: bytes  # i32[W], W ≥ 1
    rows: DraftRows | None = None
    branch: bool = False

    def __post_init__(self) -> None:
        _check_tokens(self.tokens, "tokens")
        if not self.tokens:
            raise ValueError("tokens: a window holds at least one token")
        if len(self.follows) != HASH_BYTES:
            raise ValueError(f"follows: expected {HASH_BYTES} bytes, got {len(self.follows)}")
        if self.rows is not None:
            self.rows.check(self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """W, the number of drafted tokens."""
        return len(self.tokens) // TOKEN_DTYPE.itemsize

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The drafted tokens as Python ints."""
        return unpack_tokens(self.tokens)

    @property
    def q_id_rows(self) -> Int32Array:
        """int32[W, K], a read-only view; K is 0 without rows."""
        data = b"" if self.rows is None else self.rows.q_ids
        return np.frombuffer(data, dtype=TOKEN_DTYPE).reshape(self.num_tokens, -1)

    @property
    def q_prob_rows(self) -> Float16Array:
        """float16[W, K], a read-only view; K is 0 without rows."""
        data = b"" if self.rows is None else self.rows.q_probs
        return np.frombuffer(data, dtype=PROB_DTYPE).reshape(self.num_tokens, -1)


class Ack(Message, frozen=True, tag=11):
    """Edge → cloud: the edge has the text up to `length` tokens, prompt included.

    It renews the lease within which the target writes by itself. With `again`, everything beyond
    `length` is sent again: feedback was lost, or nothing has come for long.

    `threshold` is that of acceptance from now on, where the target's own speculator drafts: then
    there are no windows that would carry one.
    """

    single_float: ClassVar[bool] = True

    handle: Counter
    number: Counter
    length: Counter
    again: bool = False
    threshold: Threshold | None = None


class CloseSession(Message, frozen=True, tag=3):
    """Edge → cloud: the session is over; free its cache."""

    session: Identifier
    incarnation: Counter
    reason: Annotated[str, Meta(max_length=200)]


class SessionReady(Message, frozen=True, tag=4):
    """Cloud → edge: the session is known here. Its windows, acknowledgements and feedback carry the
    `handle` instead of its name; each incarnation has its own."""

    session: Identifier
    incarnation: Counter
    cloud: Identifier
    handle: Counter


class Feedback(Message, frozen=True, tag=5):
    """Cloud → edge: tokens that a pass has committed, from position `start` on.

    Whether they are drafted ones, the edge sees by its own drafts. `number` is that of the window
    or acknowledgement that came last, `held_ms` the time since then, so that any feedback measures
    the round trip; None where none has come. `pass_tokens` is the session's share of the pass, 0
    where none was run. `prehit` where a window was rejected of which no token was run. `rows` and
    `features` where the session asks for them and the pass has them: text that is sent again comes
    without.
    `proposed` tokens of a speculator, a tree of `depth`, were in the pass; all tokens but the last
    are then accepted ones.
    `scores` are the tokens' log-probabilities where the session asks for them, also of text that is
    sent again. `prompt_scores` are those of the prompt's tokens from the second on, in any
    feedback of an answer's first token.
    """

    single_float: ClassVar[bool] = True

    handle: Counter
    start: Counter
    tokens: bytes  # i32[n], n ≥ 0
    number: Counter | None
    held_ms: Millis
    verify_ms: Millis
    queue_ms: Millis  # that the first window of the pass waited
    pass_tokens: Counter
    prehit: bool = False
    rows: TokenRows | None = None
    proposed: Counter = 0
    depth: Counter = 0
    features: TokenFeatures | None = None
    scores: TokenScores | None = None
    prompt_scores: TokenScores | None = None

    def __post_init__(self) -> None:
        _check_tokens(self.tokens, "tokens")
        for carried in (self.rows, self.features, self.scores):
            if carried is not None:
                carried.check(len(self.tokens) // TOKEN_DTYPE.itemsize)
        if self.prompt_scores is not None:
            self.prompt_scores.check(self.prompt_scores.num_tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens as Python ints."""
        return unpack_tokens(self.tokens)


class WindowReport(Message, frozen=True, tag=6):
    """Cloud → controller: what became of a window, and what it cost.

    Of `num_drafted` tokens the first `num_accepted` are accepted, those included that the target
    had reached by itself before they came; `num_own` tokens of the target followed. One without
    drafted tokens, of outcome `own`, adds up passes that the target ran by itself.

    `expected_accepted` is E[L_acc] = Σᵢ Πⱼ≤ᵢ (1 − TV(pⱼ, qⱼ)) on temperature-1 distributions
    (docs/method.md, Credit), and `mean_jsd` in nats, over the judged positions. Where windows carry
    no distributions the first is the number of leading tokens that are the target's own, and the
    second None.

    Quality: of `num_scored` committed tokens the pass has shown the probability: all of them at
    temperature 0; above, not what follows a rejection, and none where windows carry no
    distributions. `log_likelihood` is the sum of ln p₁ over them, in nats, and `num_greedy` of them
    are the target's own first choice. `regret` is the sum of ln p₁(first choice) − ln p₁(token):
    what they lose against it on their own text, 0 for exact verification at temperature 0.

    `energy_j` is that of the target pass, in the report of the window that began it; 0 in those of
    windows that shared it.
    """

    single_float: ClassVar[bool] = True

    session: Identifier
    incarnation: Counter
    number: Counter
    edge: Identifier
    client: Identifier
    method: MethodName
    outcome: Outcome
    num_drafted: Counter
    num_accepted: Counter
    num_own: Counter
    threshold: Threshold
    expected_accepted: Annotated[float, Meta(ge=0, le=1e6)]
    mean_jsd: Unit | None
    edge_ms: Millis
    cloud_ms: Millis
    rework_ms: Millis
    verify_ms: Millis
    queue_ms: Millis
    energy_j: Annotated[float, Meta(ge=0, le=1e9)] | None
    num_scored: Counter
    log_likelihood: Annotated[float, Meta(ge=-1e9, le=0)]
    num_greedy: Counter
    regret: Annotated[float, Meta(ge=0, le=1e9)]


class SessionOpened(Message, frozen=True, tag=7):
    """Cloud → controller: a session began or moved here; publish its first update."""

    session: Identifier
    client: Identifier
    edge: Identifier
    cloud: Identifier
    method: MethodName
    incarnation: Counter


class SessionClosed(Message, frozen=True, tag=10):
    """Cloud → controller: a session ended or expired here."""

    session: Identifier
    cloud: Identifier
    incarnation: Counter
    reason: Annotated[str, Meta(max_length=200)]


class ControlUpdate(Message, frozen=True, tag=8):
    """Controller → edge and cloud: threshold and window for one session.

    The newer (term, version) wins. `term` rises with every controller that takes over.
    """

    session: Identifier
    term: Counter
    version: Counter
    threshold: Threshold
    window: Annotated[int, Meta(ge=1, le=1024)]
    credit: Unit
    credit_delta: Annotated[float, Meta(ge=-1, le=1)]


class Fault(Message, frozen=True, tag=9):
    """Anyone → the sender of a message that was refused. `session` is "-" where unknown; then
    `handle` may name what was."""

    session: Identifier
    code: FaultCode
    detail: Annotated[str, Meta(max_length=500)]
    handle: Counter | None = None
