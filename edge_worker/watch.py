"""What an edge worker's requests add to metrics, logs and traces.

`EdgeTally` holds the worker's totals, `RequestWatch` follows one request. Both are called on the
event loop, a window costs them a few additions. What `usage` reports is `edge_worker.usage`'s.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence, Sized

from msgspec.structs import replace

from bus.protocol.messages import FinishReason
from bus.runtime.metrics import LONG_LATENCIES_S, Metrics, register_shared
from bus.runtime.tracing import Tracing
from bus.store import Claim, Role, Usage, WorkerRecord
from bus.transport.sockets import Sockets
from decoding.edge_events import WindowJudged
from decoding.edge_state import SessionSpec
from engines.metrics import register_prefixes
from engines.thread import ModelThread
from engines.torch.prefixes import PrefixCache

log = logging.getLogger(__name__)

NUM_POSITIONS = 16
"""Positions of a window that have a count of their own; later ones share `16+`."""


class EdgeTally:
    """Totals of all requests of one edge worker since its start."""

    def __init__(self, metrics: Metrics) -> None:
        self.finished: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})
        self.faults: Counter[str] = Counter()
        self.prompt_tokens = self.generation_tokens = 0
        self.drafts = self.draft_tokens = self.accepted_tokens = self.rollbacks = 0
        self._accepted = [0] * (NUM_POSITIONS + 1)  # windows by accepted tokens; the last: or more
        self._accepted_later = 0  # tokens at later positions
        self.first_token_s = metrics.histogram(
            "time_to_first_token_seconds", "From submission to the first tokens, in seconds.",
            LONG_LATENCIES_S,
        )  # fmt: skip
        self.inter_token_s = metrics.histogram(
            "inter_token_latency_seconds",
            "Time between tokens after the first ones, in seconds; tokens that come together share "
            "the time since those before.",
        )
        self.request_s = metrics.histogram(
            "e2e_request_latency_seconds", "From submission to the end, in seconds.",
            LONG_LATENCIES_S,
        )  # fmt: skip
        self.queue_s = metrics.histogram(
            "request_queue_time_seconds", "From submission until an edge takes it, in seconds.",
            LONG_LATENCIES_S,
        )  # fmt: skip
        self._register(metrics)

    def _register(self, metrics: Metrics) -> None:
        counter = metrics.counter
        counter("request_success", "Requests that have ended, by reason.",
                lambda: self.finished, "finished_reason")  # fmt: skip
        counter("faults", "Faults received from cloud workers, by code.",
                lambda: self.faults, "code")  # fmt: skip
        counter("prompt_tokens", "Tokens of prompts.", lambda: self.prompt_tokens)
        counter("generation_tokens", "Tokens of answers.", lambda: self.generation_tokens)
        counter("spec_decode_num_drafts", "Windows of drafted tokens that were judged.",
                lambda: self.drafts)  # fmt: skip
        counter("spec_decode_num_draft_tokens", "Drafted tokens that were judged.",
                lambda: self.draft_tokens)  # fmt: skip
        counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.",
                lambda: self.accepted_tokens)  # fmt: skip
        counter("spec_decode_num_accepted_tokens_per_pos",
                "Accepted tokens by their position in the window.",
                self.accepted_per_position, "position")  # fmt: skip
        counter("rollbacks", "Windows after which the draft was rolled back.",
                lambda: self.rollbacks)  # fmt: skip

    def accepted_per_position(self) -> dict[str, float]:
        """Position, from 0, to the number of windows of which that token was accepted."""
        counts, total = {}, 0
        for position in reversed(range(NUM_POSITIONS)):
            total += self._accepted[position + 1]
            counts[str(position)] = float(total)
        return {**dict(reversed(counts.items())), f"{NUM_POSITIONS}+": float(self._accepted_later)}

    def judged(self, effect: WindowJudged) -> None:
        """A window, or a pass without one."""
        self.generation_tokens += effect.num_committed
        if effect.num_drafted:
            self.drafts += 1
            self.draft_tokens += effect.num_drafted
            accepted = effect.num_accepted
            self.accepted_tokens += accepted
            self._accepted[min(accepted, NUM_POSITIONS)] += 1
            self._accepted_later += max(0, accepted - NUM_POSITIONS)
            self.rollbacks += effect.rolled_back


def register_worker(
    metrics: Metrics, running: Sized, sockets: Sockets, prefixes: PrefixCache
) -> None:
    """What an edge worker counts anyway.

    Args:
        running: the requests that run.
    """
    metrics.gauge("num_requests_running", "Requests being answered.", lambda: len(running))
    metrics.counter("lease_losses", "Requests that another edge has taken over.",
                    lambda: sockets.counters["lost_leases"])  # fmt: skip
    register_shared(metrics, sockets.counters, sockets.traffic)
    register_prefixes(metrics, prefixes)


def why_not_ready(
    thread: ModelThread, tokenizer_digest: str, workers: Sequence[WorkerRecord]
) -> str:
    """Why an edge cannot answer a request now, given the workers that live; "" where it can."""
    if not thread.alive:
        return "the model thread has ended"
    targets = [worker for worker in workers if worker.role is Role.CLOUD]
    if any(target.tokenizer_digest == tokenizer_digest for target in targets):
        return ""
    return "no cloud worker with this tokenizer is live"


class RequestWatch:
    """One request, from its claim to its end here.

    Durations begin with the submission, as the id of its queue entry says by Redis' clock; a
    request that was delivered before counts only from its claim on, and has no time to the first
    token.
    """

    def __init__(self, tally: EdgeTally, tracing: Tracing, claim: Claim) -> None:
        request = claim.request
        method = request.method if request is not None else "unreadable"
        traceparent = request.traceparent if request is not None else ""
        self._tally = tally
        self._request_id = claim.request_id
        self._is_first = claim.deliveries <= 1
        self._waited_s = _waited_s(claim.entry_id) if self._is_first else 0.0
        self._began_s = time.monotonic()
        self._last_s: float | None = None
        self._ended = False
        attributes = {"request": claim.request_id, "method": method}
        self.span = tracing.span("request", traceparent, attributes)
        self._prefill = tracing.span("prefill", self.span.traceparent, {})
        if self._is_first:
            tally.queue_s.observe(self._waited_s)
        log.info("request %s begins: %s, delivery %d", claim.request_id, method, claim.deliveries)

    def begun(self, spec: SessionSpec) -> SessionSpec:
        """Its session begins. Returns the specification with this request's span as the parent of
        what others record."""
        if self._is_first:
            self._tally.prompt_tokens += len(spec.prompt)
        return replace(spec, traceparent=self.span.traceparent)

    def judged(self, effect: WindowJudged) -> None:
        """A window, or a pass without one; what of it is part of the answer."""
        self._tally.judged(effect)
        if effect.num_committed:
            self._came(effect.num_committed)
        if self.span.recorded:
            self.span.event("window", {
                "drafted": effect.num_drafted, "accepted": effect.num_accepted,
                "committed": effect.num_committed, "rtt_ms": effect.rtt_ms,
                "verify_ms": effect.verify_ms,
            })  # fmt: skip

    def _came(self, num_tokens: int) -> None:
        now_s, last_s = time.monotonic(), self._last_s
        self._last_s = now_s
        if last_s is not None:
            self._tally.inter_token_s.observe((now_s - last_s) / num_tokens, num_tokens)
            return
        self._prefill.end()
        if self._is_first:
            self._tally.first_token_s.observe(self._waited_s + now_s - self._began_s)

    def ended(self, reason: FinishReason, usage: Usage, error: str = "") -> None:
        """Its answer is complete. A second end changes nothing."""
        if self._ended:
            return
        self._ended = True
        self._tally.finished[reason.value] += 1
        if self._is_first:
            seconds = self._waited_s + time.monotonic() - self._began_s
            self._tally.request_s.observe(seconds)
        self._close(
            {
                "finish_reason": reason.value, "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens, "acceptance": usage.acceptance,
                "windows": usage.windows, "rollbacks": usage.rollbacks,
            },
            error,
        )  # fmt: skip
        log.info(
            "request %s ends: %s, %d tokens in %.2f s%s", self._request_id, reason,
            usage.completion_tokens, usage.seconds, f"; {error}" if error else "",
        )  # fmt: skip

    def refused(self, why: str) -> None:
        """It cannot be answered."""
        self.ended(FinishReason.ERROR, Usage(), why)

    def disowned(self) -> None:
        """Another edge answers it: it has not ended."""
        if not self._ended:
            self._ended = True
            self._close({"finish_reason": "disowned"}, "")

    def _close(self, attributes: dict[str, str | int | float | bool], error: str) -> None:
        self._prefill.end()
        self.span.end(attributes, error)


def _waited_s(entry_id: str) -> float:
    """Seconds since an entry came into the queue, as this machine's clock has it."""
    return max(0.0, time.time() - int(entry_id.partition("-")[0]) / 1e3)
