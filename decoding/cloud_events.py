"""What can happen to a session at the cloud, and what the cloud's machine asks of its shell.

Times are milliseconds on the shell's monotonic clock.
"""

from __future__ import annotations

from msgspec import Struct

from bus.protocol.arrays import Float64Array
from bus.protocol.messages import Ack, DraftWindow, Message, OpenSession
from decoding.engine import TargetRow
from decoding.tree_reports import JudgedTree
from decoding.verification import Judged, OwnPasses, Plan

# --- events -----------------------------------------------------------------------------------


class OpenArrived(Struct, frozen=True):
    """`OpenSession` again, or of a higher incarnation, for which `handle` is meant."""

    message: OpenSession
    handle: int


class WindowArrived(Struct, frozen=True):
    message: DraftWindow
    now_ms: float


class AckArrived(Struct, frozen=True):
    message: Ack
    now_ms: float


class Prefilled(Struct, frozen=True):
    """The prompt has run; `rows` are those after its tokens, where they were wanted."""

    job: int
    now_ms: float
    rows: tuple[TargetRow, ...] = ()


class RowsReady(Struct, frozen=True):
    """The pass of job `job` is done.

    Attributes:
        plan: what it was about.
        rows: the kept row where the plan asked for it, then one for each of its wants.
        verify_ms: what the pass took in the model thread.
        share: of the pass's rows that were this session's.
    """

    job: int
    plan: Plan
    rows: tuple[TargetRow, ...]
    verify_ms: float
    now_ms: float
    share: float = 1.0


class PrehitFailed(Struct, frozen=True):
    """The kept row rejects the first token: nothing was run. `row` is that row, reduced."""

    job: int
    plan: Plan
    row: TargetRow
    now_ms: float


class FullRowReady(Struct, frozen=True):
    """float64[V], the warped target distribution that `FetchRow` asked for."""

    job: int
    probs: Float64Array
    now_ms: float


Event = (
    OpenArrived | WindowArrived | AckArrived | Prefilled | RowsReady | PrehitFailed | FullRowReady
)

# --- effects ----------------------------------------------------------------------------------


class Prefill(Struct, frozen=True):
    """Run `tokens` (maybe none) and answer `Prefilled`.

    Attributes:
        scored: for each of them the one that follows it, whose log-probability is wanted, with
            those of the most probable; none: no rows are wanted.
    """

    job: int
    tokens: tuple[int, ...]
    scored: tuple[int, ...] = ()


class Forward(Struct, frozen=True):
    """Run a pass when the model is free: what it holds, `decoding.cloud_passes.plan` says then."""

    job: int


class FetchRow(Struct, frozen=True):
    """The full row `index` of the last forward pass, for a draw."""

    job: int
    index: int


class Crop(Struct, frozen=True):
    """Cut the target's cache to `length` tokens.

    Attributes:
        path: after a pass with a tree, its tokens that are kept beyond that, by their index in the
            pass, each the parent of the next.
    """

    length: int
    path: tuple[int, ...] = ()


class Send(Struct, frozen=True):
    """Send to the session's edge."""

    message: Message


class Report(Struct, frozen=True):
    """Send to the controller."""

    message: Message


class ReportWindow(Struct, frozen=True):
    """Tell the controller (`decoding.verification.window_report`), once the edge has its answer."""

    judged: Judged


class ReportTree(Struct, frozen=True):
    """The same about a tree (`decoding.tree_reports.tree_report`)."""

    judged: JudgedTree


class ReportOwn(Struct, frozen=True):
    """The same about passes without drafts (`decoding.verification.own_report`)."""

    own: OwnPasses


Effect = Prefill | Forward | FetchRow | Crop | Send | Report | ReportWindow | ReportTree | ReportOwn
