"""The state of one session at the cloud, as frozen data; `decoding.cloud` moves it."""

from __future__ import annotations

from msgspec import Struct

from bus.protocol.messages import Fault, FaultCode
from decoding.cloud_events import Effect
from decoding.draft_tree import DraftTree
from decoding.engine import TargetRow
from decoding.methods import Method
from decoding.sampling import SamplingParams
from decoding.token_scores import TokenScore
from decoding.verification import Arrived, OwnPasses, Plan

MAX_PASS_TOKENS = 256
"""Drafted tokens of one pass; others' passes come between [ours]."""
MAX_JUDGED = 64
"""Numbers of judged windows that are kept, so that a repeated one is not judged again [ours]."""
TREE_TOKENS = 3
"""Most tokens of a proposed tree, where nothing is set [ours]: a pass of int8 on a CPU takes little
longer for four rows than for one, and about twice as long for nine (docs/results.md)."""
LEASE_MS = 2000.0
LEASE_TOKENS, LEAST_LEASE = 256, 8
"""How far the target writes beyond what the edge has acknowledged: for so long at its own pace, and
no more than so many tokens; a few always [ours]."""
EXACT = -1.0
"""The threshold before any is known."""
_NEW = 0.2  # weight of a pass against those before it

Step = tuple["CloudState", tuple[Effect, ...]]


class Prefilling(Struct, frozen=True):
    """The text is being run."""

    name = "prefilling"


class Idle(Struct, frozen=True):
    """Nothing is asked of the model."""

    name = "idle"


class Verifying(Struct, frozen=True):
    """A pass waits for the model, or runs."""

    name = "verifying"


class Ran(Struct, frozen=True):
    """A pass that is over.

    Attributes:
        num_tokens: how many it ran. verify_ms, share: as in `RowsReady`.
    """

    num_tokens: int
    verify_ms: float
    now_ms: float
    share: float = 1.0


class Recovering(Struct, frozen=True):
    """The pass is judged up to a rejection; the full row of it is being fetched, to draw from.

    Attributes:
        accepted: drafted tokens that are accepted. rows: those judged.
    """

    name = "recovering"

    plan: Plan
    accepted: int
    rows: tuple[TargetRow, ...]
    ran: Ran


Stage = Prefilling | Idle | Verifying | Recovering


class Kept(Struct, frozen=True):
    """The row after the text, of which no token has been decided yet.

    Attributes:
        index: among the rows of the last pass. own: the target's own choice there, with its
            log-probabilities where the session asks for them.
    """

    index: int
    own: int
    scores: tuple[TokenScore, ...] = ()


class Limits(Struct, frozen=True):
    """What this worker's model and operator allow.

    Attributes:
        vocab_size: real tokens, shared by draft and target.
        threshold_min, threshold_max: bounds a window's threshold is clipped to.
        eos: tokens that end an answer; the target writes nothing after them by itself.
        lease: most tokens beyond what is acknowledged.
        tree_tokens: most tokens of a tree that a speculator proposes for one pass; 0: none is asked
            for one.
    """

    vocab_size: int
    context_length: int
    threshold_min: float
    threshold_max: float
    eos: frozenset[int] = frozenset()
    lease: int = LEASE_TOKENS
    tree_tokens: int = TREE_TOKENS


class Heard(Struct, frozen=True):
    """The latest window or acknowledgement, and when it came."""

    number: int
    at_ms: float


class CloudState(Struct, frozen=True):
    """One session at the cloud.

    Attributes:
        handle: what windows and feedback are addressed by.
        num_prompt: tokens of the prompt; end: the longest text that is asked for.
        tokens: prompt and committed tokens.
        hashes: of the text at the end of the prompt, then with each token after it.
        acknowledged: length of the text that the edge is known to have.
        sent_length: of the text that has been sent to it.
        num_run: how many tokens the target's cache holds once the effects so far have run.
        drafts: the windows that wait.
        judged: numbers of the windows that have been judged, the latest last.
        job: number of the newest model job; answers to older ones are ignored.
        kept: the row after `tokens`, where no choice has been made of it: the next drafted token is
            judged by it.
        own: passes without drafts, not reported yet.
        rows, features: feedback carries the distributions of its tokens, the features there.
        logprobs: it carries log-probabilities, of so many most probable tokens each; None: none.
        prompt_logprobs: the prompt's too.
        scores: of the last tokens of the text, back to what is acknowledged at least.
        prompt_scores: of the prompt's tokens from the second on, once they have run.
        pass_ms: a pass takes about so long; None before the first.
        threshold: as the latest acknowledgement gives it, for trees; below 0 is exact.
    """

    cloud: str
    session: str
    client: str
    edge: str
    method: Method
    sampling: SamplingParams
    limits: Limits
    incarnation: int
    handle: int
    num_prompt: int
    end: int
    tokens: tuple[int, ...]
    hashes: tuple[bytes, ...]
    acknowledged: int
    sent_length: int
    num_run: int = 0
    stage: Stage = Prefilling()
    drafts: DraftTree[Arrived] = DraftTree()
    judged: tuple[int, ...] = ()
    heard: Heard | None = None
    job: int = 0
    kept: Kept | None = None
    own: OwnPasses = OwnPasses()
    rows: bool = False
    features: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()
    pass_ms: float | None = None
    threshold: float = EXACT

    def hash_at(self, length: int) -> bytes:
        """Of the text's first `length` tokens; the prompt at least."""
        return self.hashes[length - self.num_prompt]

    @property
    def room(self) -> int:
        """Tokens that may still be written before the answer or the context ends."""
        return min(self.end, self.limits.context_length) - len(self.tokens)

    @property
    def lease(self) -> int:
        """Tokens that the target may write beyond what is acknowledged."""
        if self.pass_ms is None:
            return min(LEAST_LEASE, self.limits.lease)
        wanted = max(LEAST_LEASE, int(LEASE_MS / max(self.pass_ms, 1e-3)))
        return min(wanted, self.limits.lease)

    @property
    def ended(self) -> bool:
        """Whether nothing more can be asked for."""
        over = self.room <= 0
        last = len(self.tokens) > self.num_prompt and self.tokens[-1] in self.limits.eos
        return over or last

    def timed(self, verify_ms: float) -> float:
        """`pass_ms` with one more pass."""
        return (
            verify_ms if self.pass_ms is None else self.pass_ms + _NEW * (verify_ms - self.pass_ms)
        )


def clipped(state: CloudState, threshold: float) -> float:
    """Within the operator's bounds."""
    return min(max(threshold, state.limits.threshold_min), state.limits.threshold_max)


def refusal(session: str, code: FaultCode, detail: str) -> Fault:
    """A `Fault` about a session."""
    return Fault(session=session, code=code, detail=detail)
