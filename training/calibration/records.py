"""One row for each window that calibration tried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from bus.protocol.errors import ConfigurationError


class WindowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A window in lockstep, measured.

    Attributes:
        sample: index of the prompt. index: of the window in its answer.
        credit, credit_delta: r̂ and Δr̂ before it.
        threshold: nats; below 0 is exact verification. num_drafted: W.
        num_committed: accepted tokens and the one after them.
        expected_accepted: E[L_acc].
        draft_ms, verify_ms, queue_ms: of this window. rtt_ms: its link, without the last two.
        num_scored, log_likelihood, num_greedy, regret: quality, as
        `bus.protocol.messages.WindowReport`.
        energy_j: of both models for this window; None where nobody has said.
    """

    sample: int
    index: int
    credit: float
    credit_delta: float
    threshold: float
    num_drafted: int
    num_accepted: int
    num_committed: int
    expected_accepted: float
    draft_ms: float
    verify_ms: float
    queue_ms: float
    rtt_ms: float
    num_scored: int
    log_likelihood: float
    num_greedy: int
    regret: float
    energy_j: float | None = None

    @property
    def segment_ms(self) -> float:
        """T_seg in lockstep: draft, link and verification, one after the other."""
        return self.draft_ms + self.rtt_ms + self.queue_ms + self.verify_ms

    @property
    def acceptance(self) -> float:
        """p_acc = E[L_acc]/W."""
        return min(self.expected_accepted / self.num_drafted, 1.0)


def write_records(path: Path, records: Sequence[WindowRecord]) -> None:
    """As Parquet, a column for each attribute."""
    rows = [msgspec.to_builtins(record) for record in records]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)


def read_records(path: Path) -> list[WindowRecord]:
    """What `write_records` wrote.

    Raises:
        ConfigurationError: there is no such file, or it is another one.
    """
    try:
        rows = pq.read_table(path).to_pylist()
        return msgspec.convert(rows, list[WindowRecord])
    except (OSError, pa.ArrowException, msgspec.ValidationError) as error:
        raise ConfigurationError(f"{path} holds no records of a calibration: {error}") from error


_TYPES = {"int": pa.int64(), "float": pa.float64(), "float | None": pa.float64()}
_SCHEMA = pa.schema(
    [(name, _TYPES[str(kind)]) for name, kind in WindowRecord.__annotations__.items()]
)


def on_another_link(
    records: Sequence[WindowRecord], measured_rtt_ms: float, rtt_ms: float
) -> list[WindowRecord]:
    """The same windows with the round trip of another link, the models not run again; simulated.

    What a message took besides the link stays.
    """
    return [
        msgspec.structs.replace(record, rtt_ms=max(0.0, record.rtt_ms - measured_rtt_ms) + rtt_ms)
        for record in records
    ]
