"""The state of one session at the edge, as frozen data; `decoding.edge` moves it."""

from __future__ import annotations

from enum import Enum

from msgspec import Struct, field
from msgspec.structs import replace

from bus.protocol.messages import ControlUpdate, DraftWindow, FinishReason
from decoding.methods import Method
from decoding.methods.base import Flow
from decoding.pacing import Measures
from decoding.sampling import SamplingParams
from decoding.timing import ReplyTimer

CONTROL_TTL_MS = 5000.0
"""Without a `ControlUpdate` for this long, the conservative threshold is used [ours]; default of
the edge's setting."""


MAX_INCARNATION = 2**31 - 1
"""What a message can carry."""


class Phase(Enum):
    SEEKING = "seeking"
    OPENING = "opening"
    RUNNING = "running"
    FINISHED = "finished"


class SessionSpec(Struct, frozen=True):
    """What does not change while a session lives.

    Attributes:
        prompt: token ids, at least one.
        tokenizer_digest: both ends must agree on it.
    """

    session: str
    client: str
    edge: str
    method: Method
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    tokenizer_digest: str


class Control(Struct, frozen=True):
    """Threshold and window in force, when the controller last spoke, how long that holds."""

    threshold: float
    window: int
    conservative_threshold: float
    credit: float = 0.0
    term: int = 0
    version: int = 0
    heard_ms: float | None = None
    ttl_ms: float = CONTROL_TTL_MS

    def updated(self, update: ControlUpdate, now_ms: float) -> Control:
        """With `update` applied unless it is older; a repeat proves the controller alive."""
        if (update.term, update.version) < (self.term, self.version):
            return self
        return replace(
            self,
            threshold=update.threshold,
            window=update.window,
            credit=update.credit,
            term=update.term,
            version=update.version,
            heard_ms=now_ms,
        )

    def threshold_at(self, now_ms: float) -> float:
        silent = self.heard_ms is None or now_ms - self.heard_ms > self.ttl_ms
        return min(self.threshold, self.conservative_threshold) if silent else self.threshold


class InFlight(Struct, frozen=True):
    """A window that waits for its feedback."""

    message: DraftWindow
    drafted_ms: float
    sent_ms: float
    num_sends: int


class PreviousWindow(Struct, frozen=True):
    """Costs of the window before, as the next `DraftWindow` reports them."""

    edge_ms: float = 0.0
    rework_ms: float = 0.0
    rtt_ms: float = 0.0


class EdgeState(Struct, frozen=True):
    """One session at the edge.

    Attributes:
        tokens: prompt and committed tokens.
        drafted: tokens after them that were drafted and not judged yet.
        num_cached: length of the draft's cache once the effects so far have run.
        job: number of the newest draft job; `drafting` while it runs; `job_awaits` where it is
            one of lockstep, `issued_ms` when it was asked for.
        flow: what the pace wants in flight, by `growth` = Π(1 + η_j) and `measures`.
        heard_ms: when the last feedback of this incarnation arrived.
        opens_sent, open_sent_ms: of `OpenSession` in this incarnation.
        last_incarnation: the last one this owner may use. unused: the present one was refused
            before any window went out under it.
        setbacks: times the session had to be opened again, failures: times a cloud worker failed,
            both since the last feedback.
        eos: tokens that end the answer, the target's.
    """

    spec: SessionSpec
    control: Control
    phase: Phase
    incarnation: int
    tokens: tuple[int, ...]
    epoch: int = 0
    next_seq: int = 0
    drafted: tuple[int, ...] = ()
    in_flight: tuple[InFlight, ...] = ()
    num_cached: int = 0
    job: int = 0
    drafting: bool = False
    job_awaits: bool = True
    issued_ms: float = 0.0
    flow: Flow = Flow(message=0, budget=0, awaits=True)
    growth: float = 1.0
    measures: Measures = Measures()
    heard_ms: float | None = None
    opens_sent: int = 0
    last_incarnation: int = MAX_INCARNATION
    unused: bool = False
    setbacks: int = 0
    failures: int = 0
    open_sent_ms: float = 0.0
    eos: frozenset[int] = frozenset()
    timer: ReplyTimer = field(default_factory=ReplyTimer)
    previous: PreviousWindow = field(default_factory=PreviousWindow)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.spec.prompt)

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be committed."""
        return self.spec.max_new_tokens - self.num_generated

    def threshold_at(self, now_ms: float) -> float:
        """The threshold of a window drafted now."""
        fixed = self.spec.method.fixed_threshold
        return self.control.threshold_at(now_ms) if fixed is None else fixed

    def num_ahead_of(self, flight: InFlight) -> int:
        """Drafted tokens in the windows up to `flight`, it included."""
        end = flight.message.start + flight.message.num_tokens
        return end - len(self.tokens)

    def until_end(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """`tokens` cut after the first EOS and at max_new_tokens."""
        tokens = tokens[: self.num_remaining]
        for i, token in enumerate(tokens):
            if token in self.eos:
                return tokens[: i + 1]
        return tokens

    def end_reached(self) -> FinishReason | None:
        """Why the answer is over, if it is."""
        if self.num_generated and self.tokens[-1] in self.eos:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_remaining <= 0 else None
