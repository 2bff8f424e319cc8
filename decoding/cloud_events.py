"""What can happen to a session at the cloud, and what the cloud's machine asks of its shell.

Times are milliseconds on the shell's monotonic clock.
"""

from __future__ import annotations

from msgspec import Struct

from bus.protocol.arrays import Float64Array, Int32Array
from bus.protocol.messages import DraftWindow, Feedback, Message, OpenSession
from decoding.engine import TargetRow
from decoding.verification import PreHit, Verification

# --- events -----------------------------------------------------------------------------------


class OpenArrived(Struct, frozen=True):
    """`OpenSession` again, or of a higher incarnation."""

    message: OpenSession


class WindowArrived(Struct, frozen=True):
    message: DraftWindow
    now_ms: float


class Prefilled(Struct, frozen=True):
    """The prompt has run."""

    job: int
    now_ms: float


class RowsReady(Struct, frozen=True):
    """The forward pass of job `job` is done.

    Attributes:
        rows: the kept row where `Forward.prehit` asked for it, then one for each of `row_ids`.
        verify_ms: what the pass took in the model thread.
        num_windows: how many the pass held in the end (`decoding.cloud.extended`).
        share: of the pass's rows that were this session's.
    """

    job: int
    rows: tuple[TargetRow, ...]
    verify_ms: float
    now_ms: float
    num_windows: int = 1
    share: float = 1.0


class PrehitFailed(Struct, frozen=True):
    """The kept row rejects the first token: nothing was run. `row` is that row, reduced."""

    job: int
    row: TargetRow
    now_ms: float


class FullRowReady(Struct, frozen=True):
    """float64[V], the warped target distribution that `FetchRow` asked for."""

    job: int
    probs: Float64Array
    now_ms: float


Event = OpenArrived | WindowArrived | Prefilled | RowsReady | PrehitFailed | FullRowReady

# --- effects ----------------------------------------------------------------------------------


class Prefill(Struct, frozen=True):
    """Run `tokens` (maybe none) and answer `Prefilled`."""

    job: int
    tokens: tuple[int, ...]


class Forward(Struct, frozen=True):
    """Run `feed` in one pass; reduce the last len(row_ids) rows at these ids (`TargetRow`).

    When the model is free, the shell asks `decoding.cloud.extended` for the windows that have come
    meanwhile. Where `prehit` is set, the kept row is reduced first, and where it rejects, nothing
    is run and `PrehitFailed` is the answer.

    Attributes:
        choices_at: for each row the absolute position at which the target's own choice is wanted
            with it, or None; empty where none is.
        num_windows: windows that the pass is about.
    """

    job: int
    feed: tuple[int, ...]
    row_ids: tuple[Int32Array, ...]
    choices_at: tuple[int | None, ...] = ()
    num_windows: int = 1
    prehit: PreHit | None = None


class FetchRow(Struct, frozen=True):
    """The full row `index` of the last forward pass, for a draw."""

    job: int
    index: int


class Crop(Struct, frozen=True):
    """Cut the target's cache to `length` tokens."""

    length: int


class Send(Struct, frozen=True):
    """Send to the session's edge."""

    message: Message


class Report(Struct, frozen=True):
    """Send to the controller."""

    message: Message


class ReportWindow(Struct, frozen=True):
    """Tell the controller (`decoding.verification.window_report`), once the edge has its answer."""

    verification: Verification
    feedback: Feedback


Effect = Prefill | Forward | FetchRow | Crop | Send | Report | ReportWindow
