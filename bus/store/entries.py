"""What the entries of the result streams look like, as structs and as Redis fields.

Formats only; `bus.store.queue` and `bus.store.results` say who may write them when.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from bus.protocol.errors import RemoteError
from bus.protocol.messages import FinishReason

__all__ = [
    "Alternative",
    "End",
    "EndEntry",
    "FinishReason",
    "ScoredToken",
    "TokensEntry",
    "Usage",
    "entry_time_s",
    "parse_result_entry",
    "text_fields",
]

Count = Annotated[int, Meta(ge=0)]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer took. Times are seconds, sizes bytes on the wire between edge and cloud.

    `drafted_tokens` are those in judged windows, `acceptance` is accepted ÷ drafted.
    `bytes_per_drafted_token` are those of windows and acknowledgements, for each token sent.
    `wasted_tokens` were drafted and not accepted, be it that nobody judged them. `passes` are
    target passes, of which the target ran `own_passes` by itself, without a draft; a window that
    failed at pre-hit, shared a pass or was overtaken is one of `passes_saved`. At `rescues` of the
    `rollbacks` the text turned to a branch that had been drafted.
    Where the target's speculator has proposed trees, `proposed` is the number of their tokens, and
    a tree counts as a window of its depth.
    Of an answer written in `steps`, `accepted_steps` are the draft's, as `judge` called them
    equivalent to the target's own; then a window is a step, and `passes` are those of all sessions
    in which the target wrote, one that several shared counted for each.
    `decode_tokens` came in `decode_seconds`, from the feedback of the first pass on to the last:
    a speed of decoding that neither prefill nor what was drafted during it touches. `edge_idle`,
    `cloud_idle` and `hidden` are shares of time as `edge_worker.timeline` defines
    them. `lossless` says whether the method promises the target's own text.

    `dtype` and `probe_digest` are those of the target that gave the last tokens
    (`bus.store.WorkerRecord`). `bitwise` says that every token came from bitwise targets of this
    one digest: then any target of this digest gives the same text again.

    What a middle worker did, where the method has one: it wrote `middle_tokens`, of them
    `middle_accepted_tokens` by accepting some of the `middle_drafted_tokens` judged there, in
    `middle_passes` (`middle_own_passes` without a draft) that took `middle_seconds`. It began again
    `middle_restarts` times, from the target's text. `middle_bytes` went between edge and middle.
    """

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    drafted_tokens: Count = 0
    accepted_tokens: Count = 0
    windows: Count = 0
    rollbacks: Count = 0
    acceptance: float = 0.0
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    bytes_up: Count = 0
    bytes_down: Count = 0
    bytes_per_drafted_token: float = 0.0
    lossless: bool = True
    wasted_tokens: Count = 0
    passes: Count = 0
    own_passes: Count = 0
    passes_saved: Count = 0
    prehit_rejections: Count = 0
    rescues: Count = 0
    proposed: Count = 0
    steps: Count = 0
    accepted_steps: Count = 0
    judge: str = ""
    edge_idle: float = 0.0
    cloud_idle: float = 0.0
    hidden: float = 0.0
    decode_tokens: Count = 0
    decode_seconds: float = 0.0
    dtype: str = ""
    bitwise: bool = False
    probe_digest: str = ""
    middle_tokens: Count = 0
    middle_drafted_tokens: Count = 0
    middle_accepted_tokens: Count = 0
    middle_passes: Count = 0
    middle_own_passes: Count = 0
    middle_restarts: Count = 0
    middle_seconds: float = 0.0
    middle_bytes: Count = 0


class End(msgspec.Struct, frozen=True):
    """How a request ended; `error` is empty unless `finish_reason` is `error`."""

    finish_reason: FinishReason
    error: str = ""
    usage: Usage = Usage()


class Alternative(msgspec.Struct, frozen=True, array_like=True):
    """A token that could have come, with its log-probability at temperature 1, in nats, under the
    target. `data` are its bytes; half a character is possible."""

    token: int
    logprob: float
    data: bytes

    @property
    def text(self) -> str:
        """Its bytes as text, with U+FFFD for half characters."""
        return self.data.decode("utf-8", "replace")


class ScoredToken(msgspec.Struct, frozen=True, array_like=True):
    """A token and the target's log-probabilities in its place: `chosen` is the token itself,
    `top` the most probable ones, falling. The first token of a prompt has none: `chosen.logprob`
    is 0 and `top` empty."""

    chosen: Alternative
    top: tuple[Alternative, ...] = ()


class TokensEntry(msgspec.Struct, frozen=True):
    """A piece of an answer.

    `start` is the index of its first token within the answer; `accepted[i]` tells whether
    `tokens[i]` was drafted and accepted; `text` is what the piece adds to the text, and
    `lengths[i]` how many characters of it token i brought (empty: nobody said). `probe` is the
    probe digest of the target that gave the tokens (empty: not known). `scores[i]` belongs to
    `tokens[i]`, where the request asks for log-probabilities; `prompt_scores` to the prompt's
    tokens, in the first entry of an answer whose request asks for them.
    """

    entry_id: str
    start: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    text: str
    term: int
    lengths: tuple[int, ...] = ()
    probe: str = ""
    scores: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()


class EndEntry(msgspec.Struct, frozen=True):
    """The last entry of an answer."""

    entry_id: str
    end: End
    term: int


def entry_time_s(entry_id: str) -> float:
    """When a stream entry was added, by Redis' clock, in seconds since the epoch."""
    return int(entry_id.partition("-")[0]) / 1000


def text_fields(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    """A stream entry or hash with its bytes decoded; what is not UTF-8 becomes U+FFFD."""
    return {
        name.decode("utf-8", "replace"): value.decode("utf-8", "replace")
        for name, value in fields.items()
    }


def parse_result_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> TokensEntry | EndEntry:
    """One entry of a result stream.

    Raises:
        RemoteError: the entry was not written by this project's scripts.
    """
    text = text_fields(fields)
    try:
        term = int(text["term"])
        if text["kind"] == "tokens":
            return TokensEntry(
                entry_id=entry_id.decode(),
                start=int(text["start"]),
                tokens=msgspec.json.decode(text["tokens"], type=tuple[int, ...]),
                accepted=_flags(text["accepted"]),
                text=text["text"],
                term=term,
                lengths=msgspec.json.decode(text.get("lengths", "[]"), type=tuple[int, ...]),
                probe=text.get("probe", ""),
                scores=_scores(text.get("scores", "[]")),
                prompt_scores=_scores(text.get("prompt_scores", "[]")),
            )
        usage = msgspec.json.decode(text["usage"], type=Usage)
        end = End(FinishReason(text["finish_reason"]), text["error"], usage)
        return EndEntry(entry_id.decode(), end, term)
    except (KeyError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise RemoteError(
            f"result entry {entry_id.decode()} cannot be read: {error!r}; "
            "is another program writing to this key?"
        ) from error


def _scores(text: str) -> tuple[ScoredToken, ...]:
    return msgspec.json.decode(text or "[]", type=tuple[ScoredToken, ...])


def _flags(text: str) -> tuple[bool, ...]:
    flags: Any = msgspec.json.decode(text, type=list[int])
    return tuple(bool(flag) for flag in flags)
