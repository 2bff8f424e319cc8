"""Round trip and bandwidth to a cloud or middle worker, over the sockets that edges use.

The doctor plays an edge of a name of its own and asks to open a session with a tokenizer that the
worker does not have. The worker refuses with a `Fault` on the topic of that name alone: no session
is made, no model runs, and no other edge receives anything. What it takes from the question to the
refusal is a round trip; a question with a long prompt takes as much longer as its bytes need. The
worker counts these refusals among its `faults` and logs them.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Sequence

import msgspec

from bench.doctor.checks import Check, Figure, failed, ok, warning
from bus.protocol.bounds import SessionCoupling
from bus.protocol.codec import AnyMessage
from bus.protocol.errors import ConfigurationError
from bus.protocol.messages import Fault, OpenSession
from bus.settings import BusSettings
from bus.store import Role, WorkerRecord
from bus.transport.sockets import Sockets

__all__ = ["LinkFigures", "check_links"]

SMALL, LARGE = 20, 4
LARGE_TOKENS = 2**16
"""Of a large question: 256 KiB, which a worker decodes in a few milliseconds."""
PATIENCE_S = 5.0
_REPEAT_S = 0.2
_FASTEST_MBIT = 1000.0
"""Above this the worker's decoding takes longer than the link, so the figure is a lower bound."""
_SLOW_MBIT = 1.0
_LOSSY = 0.05
_DIGEST = "doctor"


class LinkFigures(msgspec.Struct, frozen=True):
    """The way to one worker; measured.

    Attributes:
        rtt_ms: median of the round trips. rtt_min_ms, rtt_max_ms: their extremes.
        lost: share of the small questions without an answer.
        up_mbit_s: bandwidth towards the worker; None where large questions were not sent or not
            answered.
    """

    worker: str
    role: Role
    rtt_ms: float
    rtt_min_ms: float
    rtt_max_ms: float
    lost: float
    up_mbit_s: float | None = None
    source: str = "measured"


class _Questioner:
    """One worker's sockets, and the questions that wait for its refusals."""

    def __init__(self, sockets: Sockets, record: WorkerRecord, edge: str) -> None:
        self._edge = edge
        self._number = 0
        self._waiting: dict[str, asyncio.Future[float]] = {}
        self._listener = sockets.listener(record.endpoints.get("feedback", ""), edge)
        self._outbox = sockets.outbox(record.endpoints.get("windows", ""))
        self._task = asyncio.create_task(self._listener.deliver(self._answered))

    def _answered(self, message: AnyMessage, _size: int) -> None:
        if isinstance(message, Fault):
            waiting = self._waiting.pop(message.session, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(time.perf_counter())

    async def ask(self, num_tokens: int, limit_s: float) -> float | None:
        """Milliseconds from a question to its refusal; None where there is none in time."""
        self._number += 1
        name = f"{self._edge}-{self._number}"
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[name] = answer
        message = _question(name, self._edge, num_tokens)
        began = time.perf_counter()
        self._outbox.send(message)
        try:
            async with asyncio.timeout(limit_s):
                return 1e3 * (await answer - began)
        except TimeoutError:
            self._waiting.pop(name, None)
            return None

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._outbox.close()
        self._listener.close()


def _question(session: str, edge: str, num_tokens: int) -> OpenSession:
    """Its prompt is random, so that nothing on the way can compress it."""
    return OpenSession(
        session=session, client="doctor", edge=edge, incarnation=0, method="auto",
        prompt=secrets.token_bytes(4 * num_tokens), committed=b"", seed=0, max_new_tokens=1,
        temperature=0.0, top_p=1.0, top_k=0, coupling=SessionCoupling.GUMBEL,
        tokenizer_digest=_DIGEST,
    )  # fmt: skip


async def measure_link(
    sockets: Sockets, record: WorkerRecord, bandwidth: bool, patience_s: float = PATIENCE_S
) -> LinkFigures | None:
    """Round trip and, if asked for, bandwidth; None where the worker does not answer.

    Raises:
        ConfigurationError: an endpoint of the record is no address.
    """
    asking = _Questioner(sockets, record, f"doctor-{secrets.token_hex(4)}")
    try:
        deadline = time.monotonic() + patience_s
        while await asking.ask(1, _REPEAT_S) is None:  # the subscription takes a moment
            if time.monotonic() > deadline:
                # A link may be slower than the repeats above.
                if await asking.ask(1, patience_s) is None:
                    return None
                break
        found = [await asking.ask(1, patience_s) for _ in range(SMALL)]
        times_ms = [ms for ms in found if ms is not None]
        if not times_ms:
            return None
        rtt_ms = statistics.median(times_ms)
        rate = await _bandwidth(asking, rtt_ms, patience_s) if bandwidth else None
    finally:
        await asking.close()
    return LinkFigures(
        record.worker_id, record.role, rtt_ms, min(times_ms), max(times_ms),
        1 - len(times_ms) / SMALL, rate,
    )  # fmt: skip


async def _bandwidth(asking: _Questioner, rtt_ms: float, patience_s: float) -> float | None:
    """Mbit/s towards the worker: bytes ÷ (time − round trip), the best of `LARGE`, since the first
    ones widen TCP's window and others meet other traffic. At most `_FASTEST_MBIT`."""
    num_bits = 8 * 4 * LARGE_TOKENS
    times_ms = [await asking.ask(LARGE_TOKENS, 4 * patience_s) for _ in range(LARGE)]
    rates = [
        num_bits / 1e3 / max(ms - rtt_ms, num_bits / 1e3 / _FASTEST_MBIT)
        for ms in times_ms if ms is not None
    ]  # fmt: skip
    return max(rates, default=None)


async def check_links(
    settings: BusSettings, live: Sequence[WorkerRecord], bandwidth: bool,
    patience_s: float = PATIENCE_S,
) -> tuple[list[Check], list[LinkFigures]]:  # fmt: skip
    """Measure the way to each live cloud and middle worker, one after the other."""
    checks, links = list[Check](), list[LinkFigures]()
    sockets = Sockets(settings)
    try:
        for record in live:
            if record.role not in (Role.CLOUD, Role.MIDDLE):
                continue
            try:
                found = await measure_link(sockets, record, bandwidth, patience_s)
            except ConfigurationError as error:
                checks.append(failed("links", f"The address of {record.worker_id} is none: "
                                     f"{error}.", "Set its E2SCI_ADVERTISE_HOST."))  # fmt: skip
                continue
            checks.append(_silent(record) if found is None else _described(found))
            if found is not None:
                links.append(found)
    finally:
        sockets.close()
    return checks, links


def _silent(record: WorkerRecord) -> Check:
    where = f"{record.endpoints.get('windows')} and {record.endpoints.get('feedback')}"
    return failed(
        "links", f"{record.role.capitalize()} worker {record.worker_id} has a live heartbeat, but "
        f"does not answer from here at {where}.",
        "Open both ports in its firewall; set its E2SCI_ADVERTISE_HOST to an address that this "
        "machine reaches; use the same CURVE keys and the same release on both.",
        worker=record.worker_id,
    )  # fmt: skip


def _described(link: LinkFigures) -> Check:
    rate = link.up_mbit_s
    up = ""
    if rate is not None:
        least = "at least " if rate >= _FASTEST_MBIT else ""
        up = f", {least}{rate:.{0 if rate >= 10 else 1}f} Mbit/s towards it"
    sentence = f"Round trip to {link.worker}: {link.rtt_ms:.2f} ms{up} (measured)"
    figures: dict[str, Figure] = {"worker": link.worker, "rtt_ms": round(link.rtt_ms, 3),
               "up_mbit_s": None if rate is None else round(rate, 1),
               "lost": round(link.lost, 3)}  # fmt: skip
    if link.lost > _LOSSY:
        return warning("links", f"{sentence}; {link.lost:.0%} of the messages had no answer.",
                       "Look for losses on the way, or for a worker that keeps restarting.",
                       **figures)  # fmt: skip
    if rate is not None and rate < _SLOW_MBIT:
        return warning("links", f"{sentence}.", "Lossy methods send about 300 bytes for each "
                       "drafted token; prefer auto, which sends token ids alone.",
                       **figures)  # fmt: skip
    return ok("links", f"{sentence}.", **figures)
