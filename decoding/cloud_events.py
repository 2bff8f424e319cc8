"""What can happen to a session at the cloud, and what the cloud's machine asks of its shell.

Times are milliseconds on the shell's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus.arrays import Float64Array, Int32Array
from bus.messages import DraftWindow, Feedback, Message, OpenSession
from decoding.acceptance import TargetRow
from decoding.verification import Verification

# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenArrived:
    """`OpenSession` again, or of a higher incarnation."""

    message: OpenSession


@dataclass(frozen=True, slots=True)
class WindowArrived:
    message: DraftWindow
    now_ms: float


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt has run."""

    job: int
    now_ms: float


@dataclass(frozen=True, slots=True)
class RowsReady:
    """The forward pass of job `job` is done.

    Attributes:
        rows: one for each entry of `Forward.row_ids`.
        verify_ms: what the pass took in the model thread.
    """

    job: int
    rows: tuple[TargetRow, ...]
    verify_ms: float
    now_ms: float


@dataclass(frozen=True, slots=True)
class FullRowReady:
    """float64[V], the warped target distribution that `FetchRow` asked for."""

    job: int
    probs: Float64Array
    now_ms: float


Event = OpenArrived | WindowArrived | Prefilled | RowsReady | FullRowReady

# --- effects ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prefill:
    """Run `tokens` (maybe none) and answer `Prefilled`."""

    job: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forward:
    """Run `feed` in one pass; reduce the last len(row_ids) rows at these ids (`TargetRow`)."""

    job: int
    feed: tuple[int, ...]
    row_ids: tuple[Int32Array, ...]


@dataclass(frozen=True, slots=True)
class FetchRow:
    """The full row `index` of the last forward pass, for a draw."""

    job: int
    index: int


@dataclass(frozen=True, slots=True)
class Crop:
    """Cut the target's cache to `length` tokens."""

    length: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send to the session's edge."""

    message: Message


@dataclass(frozen=True, slots=True)
class Report:
    """Send to the controller."""

    message: Message


@dataclass(frozen=True, slots=True)
class ReportWindow:
    """Tell the controller (`decoding.verification.window_report`), once the edge has its answer."""

    verification: Verification
    feedback: Feedback


Effect = Prefill | Forward | FetchRow | Crop | Send | Report | ReportWindow
