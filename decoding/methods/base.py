"""What a method is: an acceptance rule, a pace, and who controls threshold and window."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Protocol

from msgspec import Struct

from bus.protocol.arrays import Float16Array, Float64Array, Int32Array
from bus.protocol.bounds import SessionCoupling
from decoding.engine import Capabilities, DrafterCapabilities, TargetRow
from decoding.judges import Judge
from decoding.pacing import Forecast
from decoding.sampling import SamplingParams, SparseDistribution, from_wire, warp


@dataclass(frozen=True, eq=False)
class Proposal:
    """One drafted token and the two distributions behind it (`decoding.sampling`).

    They are worked out when asked for: the greedy exact test needs neither, and the report
    needs q₁ only after the edge has its answer.

    Attributes:
        ids: int32[K], probs: float16[K]: the row as it was sent, in canonical order; empty where
            the window carries none.
    """

    token: int
    ids: Int32Array
    probs: Float16Array
    sampling: SamplingParams

    @cached_property
    def q1(self) -> SparseDistribution:
        return from_wire(self.ids, self.probs)

    @cached_property
    def q(self) -> SparseDistribution:
        return warp(self.q1, self.sampling)

    @property
    def possible(self) -> bool:
        """Whether its own distribution allows the token at all."""
        if self.sampling.coupled and not self.ids.size:
            return True
        if self.sampling.greedy:
            return self.token == int(self.ids[0])
        return self.q.prob(self.token) > 0.0


class AcceptanceRule(Protocol):
    """Decides about one drafted token, and what replaces the first rejected one.

    Attributes:
        lossless: no token is accepted but the target's own.
        compares: it compares the draft's distribution with the target's, under a threshold.
        every_child: in a tree any child may be accepted, and the longest accepted path is taken;
            else the target's own token is looked for, and then the first child alone is asked.
        entropy: it needs the entropy of the target's row.
    """

    lossless: bool
    compares: bool
    every_child: bool
    entropy: bool

    def accepts(
        self,
        proposal: Proposal,
        row: TargetRow,
        params: SamplingParams,
        position: int,
        threshold: float,
    ) -> bool:
        """Whether the token at absolute `position` is accepted. Pure."""
        ...

    def recover(
        self, proposal: Proposal, target: Float64Array, params: SamplingParams, position: int
    ) -> int:
        """The token in place of a rejected one, above temperature 0, with residual coupling.

        Args:
            target: float64[V], the target's warped distribution at `position`.
        """
        ...


class PaceView(Struct, frozen=True):
    """What a pace decides by.

    Attributes:
        window: W, as the controller has it.
        ahead: whether it was not lockstep the last time.
        growth: Π(1 + η_j) since the last rollback (`decoding.pacing.eta`).
        forecast: None before everything it needs has been measured.
        idle_ms: how long nothing has been drafted.
    """

    window: int
    ahead: bool
    growth: float
    forecast: Forecast | None
    idle_ms: float = 0.0


class Flow(Struct, frozen=True):
    """How tokens flow to the cloud from now on.

    Attributes:
        message: tokens a window; 0: nothing is drafted.
        budget: most tokens drafted and not judged yet, those being drafted included.
        awaits: lockstep: nothing is drafted after a window before its feedback.
        rescue: the least chance of being reached at which a branch is drafted (`decoding.rescue`);
            None: there are none.
    """

    message: int
    budget: int
    awaits: bool
    rescue: float | None = None


class Pace(Protocol):
    """How far the edge drafts ahead of feedback, in messages of which size.

    Attributes:
        forecasts: whether it looks at `PaceView.forecast`; else none is computed.
    """

    name: str
    forecasts: bool

    def flow(self, view: PaceView) -> Flow:
        """Pure: asked again after each feedback and each message of the controller."""
        ...


class Control(StrEnum):
    """What the controller makes of a session's reports (`decoding.credit`).

    FIXED: threshold and window stay. CREDIT: they follow the recent windows (credit inertia).
    LATEST: they follow the last window alone, an ablation. EXPLORE: they are drawn anew after
    each window, for calibration.
    """

    FIXED = "fixed"
    CREDIT = "credit"
    LATEST = "latest"
    EXPLORE = "explore"


class Steps(Struct, frozen=True):
    """How an answer is written in steps (`decoding.steps`).

    Attributes:
        judge: decides whether the drafted version of a step is committed.
        ahead: most drafted steps that are not decided yet. max_tokens: of a step.
    """

    judge: Judge
    ahead: int = 4
    max_tokens: int = 100


@dataclass(frozen=True, slots=True)
class Method:
    """A decoding method.

    Attributes:
        name: as users write it.
        summary: one line for help texts.
        threshold: given with the name, in nats: that of a fixed control, the base of credit's;
            None leaves it to settings.
        needs: names of `decoding.engine.Capabilities` without which it cannot run.
        drafter_needs: the same of `decoding.engine.DrafterCapabilities`.
        runs_on: where no draft continues the text, the target writes by itself; else it waits.
        variant_of: the method that it is with one part changed, to compare.
        steps: whole steps are drafted and judged, and acceptance, pace and control are those of the
            target's own version of each step; None: there are no steps.
        inner: the method of an inner session that a middle worker verifies, and whose text are this
            one's drafts (`decoding.cascade`); empty: a drafter drafts.
        speculator: the kind of speculator beside the target that proposes trees of tokens
            (`decoding.engine.Target.propose`), so that the edge drafts nothing; empty: there is
            none.
    """

    name: str
    summary: str
    acceptance: AcceptanceRule
    pace: Pace
    control: Control
    threshold: float | None = None
    needs: tuple[str, ...] = ()
    drafter_needs: tuple[str, ...] = ()
    runs_on: bool = False
    variant_of: str = ""
    steps: Steps | None = None
    inner: str = ""
    speculator: str = ""

    def missing(self, capabilities: Capabilities) -> list[str]:
        """What it needs and a target has not."""
        return [name for name in self.needs if not getattr(capabilities, name)]

    def missing_of_drafter(self, capabilities: DrafterCapabilities) -> list[str]:
        """What it needs and a drafter has not."""
        return [name for name in self.drafter_needs if not getattr(capabilities, name)]

    @property
    def lossless(self) -> bool:
        """Whether the text is the target's own (docs/invariants.md, Exactness)."""
        return self.acceptance.lossless and self.steps is None

    def needs_rows(self, sampling: SamplingParams) -> bool:
        """Whether windows carry the draft's probabilities."""
        return not self.acceptance.lossless or sampling.coupling is SessionCoupling.RESIDUAL

    @property
    def reads_features(self) -> bool:
        """Whether its draft reads the target's features, which feedback then carries."""
        return "features" in self.drafter_needs

    @property
    def sends_threshold(self) -> bool:
        """Whether acknowledgements carry the threshold: the target's speculator drafts, so no
        window does."""
        return bool(self.speculator) and self.acceptance.compares

    @property
    def needs_draft(self) -> bool:
        """Whether an edge without a draft cannot answer by it."""
        return not self.runs_on or self.steps is not None

    @property
    def lockstep(self) -> bool:
        """Whether its pace waits for the feedback of each window before it drafts the next."""
        return self.pace.name == "lockstep"

    @property
    def takes_window(self) -> bool:
        """Whether a setting gives its window: neither its name, nor its pace, nor credit does."""
        flows = {
            self.pace.flow(PaceView(window, ahead=False, growth=1.0, forecast=None))
            for window in (1, 2)
        }
        return self.control is Control.FIXED and len(flows) > 1

    @property
    def fixed_threshold(self) -> float | None:
        """The threshold of all its windows, where its name says so."""
        return self.threshold if self.control is Control.FIXED else None
