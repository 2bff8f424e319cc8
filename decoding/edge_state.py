"""The state of one session at the edge, as frozen data; `decoding.edge` moves it."""

from __future__ import annotations

from msgspec import Struct, field
from msgspec.structs import replace

from bus.protocol.messages import ControlUpdate, DraftRows, FinishReason
from decoding.edge_events import Effect
from decoding.methods import Method
from decoding.methods.base import Flow
from decoding.pacing import Measures
from decoding.rescue import Doubt, Fork
from decoding.sampling import SamplingParams
from decoding.timing import ReplyTimer
from decoding.token_rows import Rows

CONTROL_TTL_MS = 5000.0
"""Without a `ControlUpdate` for this long, the conservative threshold is used [ours]; default of
the edge's setting."""
MAX_INCARNATION = 2**31 - 1
"""What a message can carry."""
MAX_CONTEXT = 2**31 - 1
"""Of a draft that holds any text."""


class Seeking(Struct, frozen=True):
    """A cloud worker is being looked for."""

    name = "seeking"


class Opening(Struct, frozen=True):
    """`OpenSession` has been sent so many times, last at `sent_ms`."""

    name = "opening"

    num_sends: int = 0
    sent_ms: float = 0.0


class Running(Struct, frozen=True):
    """The cloud worker knows the session.

    Attributes:
        handle: what windows and feedback are addressed by.
        waits_ms: since when an answer is waited for. heard_ms: when the last feedback arrived, None
            before the first.
        num_asks: times that the cloud has been asked since.
        acked_ms: when text was last acknowledged.
    """

    name = "running"

    handle: int
    waits_ms: float
    acked_ms: float
    heard_ms: float | None = None
    num_asks: int = 0


class Finished(Struct, frozen=True):
    """The answer is over."""

    name = "finished"


Stage = Seeking | Opening | Running | Finished


class SessionSpec(Struct, frozen=True):
    """What does not change while a session lives.

    Attributes:
        prompt: token ids, at least one.
        tokenizer_digest: both ends must agree on it.
        drafts: whether there is anything to draft with. draft_context: how much text that holds;
            beyond, the target goes on by itself.
        rows: the text's distributions are wanted (`EdgeState.rows`).
        logprobs: log-probabilities of its tokens are wanted, with those of so many others each;
            prompt_logprobs: those of the prompt's tokens too.
        traceparent: the trace it belongs to, for logs and spans.
        ignore_eos: no token ends the answer.
    """

    session: str
    client: str
    edge: str
    method: Method
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    tokenizer_digest: str
    drafts: bool = True
    draft_context: int = MAX_CONTEXT
    rows: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    traceparent: str = ""
    ignore_eos: bool = False

    @property
    def reads_features(self) -> bool:
        """Whether the draft reads the target's features."""
        return self.drafts and self.method.reads_features


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
        """With `update`, unless it is older. A repeated one still shows the controller alive."""
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
    """A window whose tokens have not all been decided.

    Attributes:
        start: absolute position of its first token. follows: hash of the text before it.
        num_sends: how often it was sent.
        branch: it is of a branch, not of the chain.
    """

    number: int
    start: int
    tokens: tuple[int, ...]
    follows: bytes
    rows: DraftRows | None
    threshold: float
    draft_ms: float
    drafted_ms: float
    num_sends: int
    branch: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Branch(Struct, frozen=True):
    """What has been drafted after a second choice (`decoding.rescue`).

    Attributes:
        start: absolute position of `tokens[0]`, the second choice there.
        text_hash: of the text with all its tokens. doubts: of those after the first.
        windows: in which they were sent, in order.
    """

    start: int
    tokens: tuple[int, ...]
    text_hash: bytes
    doubts: tuple[Doubt, ...]
    windows: tuple[InFlight, ...] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Job(Struct, frozen=True):
    """A draft job that runs.

    Attributes:
        start: absolute position of its first token. awaits: it is one of lockstep.
        fork: the branch that it begins or goes on with; None on the chain.
    """

    number: int
    start: int
    num_cached: int
    awaits: bool
    issued_ms: float
    fork: Fork | None = None


class PreviousWindow(Struct, frozen=True):
    """Costs of the window before, as the next `DraftWindow` reports them."""

    edge_ms: float = 0.0
    rework_ms: float = 0.0


class EdgeState(Struct, frozen=True):
    """One session at the edge.

    Attributes:
        tokens: prompt and committed tokens; text_hash: of that text. rows: of each of them, where
            the spec wants them; else empty.
        drafted: tokens after them that were drafted and not decided yet; draft_hash: of the text
            with them; doubts: of each, where the pace asks for branches.
        branches: what was drafted after second choices of these.
        in_flight: windows that are not wholly decided, in order.
        num_cached: length of the draft's cache once the effects so far have run.
        silent_at: length of the text, drafts included, after which the draft had nothing to say; it
            is not asked again before there is more.
        read: no text beyond this length is acknowledged; None: all that has come
            (`decoding.edge_events.Read`).
        last_job: number of the newest draft job; job: the one that runs, if any.
        last_number: of the newest window or acknowledgement; sent: the latest of them and when they
            went, by which round trips are measured.
        flow: what the pace wants in flight, by `growth` = Π(1 + η_j) and `measures`.
        idle_since_ms: since when the flow is nothing at all.
        last_incarnation: the last one this owner may use. unused: the present one was refused
            before any window went out under it.
        setbacks: times the session had to be opened again, failures: times a cloud worker failed,
            both since the last feedback.
        eos: tokens that end the answer, the target's.
    """

    spec: SessionSpec
    control: Control
    stage: Stage
    incarnation: int
    tokens: tuple[int, ...]
    text_hash: bytes
    draft_hash: bytes
    rows: Rows = ()
    drafted: tuple[int, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    branches: tuple[Branch, ...] = ()
    in_flight: tuple[InFlight, ...] = ()
    num_cached: int = 0
    silent_at: int | None = None
    read: int | None = None
    last_job: int = 0
    job: Job | None = None
    last_number: int = 0
    sent: tuple[tuple[int, float], ...] = ()
    flow: Flow = Flow(message=0, budget=0, awaits=True)
    growth: float = 1.0
    idle_since_ms: float | None = None
    measures: Measures = Measures()
    rtt_ms: float = 0.0
    last_incarnation: int = MAX_INCARNATION
    unused: bool = False
    setbacks: int = 0
    failures: int = 0
    eos: frozenset[int] = frozenset()
    timer: ReplyTimer = field(default_factory=ReplyTimer)
    previous: PreviousWindow = field(default_factory=PreviousWindow)

    @property
    def text(self) -> tuple[int, ...]:
        """Committed and drafted tokens."""
        return self.tokens + self.drafted

    @property
    def acknowledged(self) -> int:
        """Length of the text that is acknowledged to the cloud."""
        if self.read is None:
            return len(self.tokens)
        return min(len(self.tokens), max(self.read, len(self.spec.prompt)))

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


Step = tuple[EdgeState, tuple[Effect, ...]]
