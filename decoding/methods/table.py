"""What each method promises, sends and needs, as a table: `e2sci methods`, docs/method.md."""

from __future__ import annotations

from msgspec import Struct

from bus.protocol.bounds import SessionCoupling
from decoding.methods import find, names
from decoding.methods.base import Method
from decoding.sampling import SamplingParams

COLUMNS = ("method", "text", "pace", "without drafts", "sends", "target needs", "draft", "summary")
"""Without drafts the target runs on by itself, or waits."""


class Row(Struct, frozen=True):
    """A method.

    Attributes:
        lossless: whether the text is the target's own.
        pace: `Pace.name`.
        runs_on: where no draft continues the text, the target writes by itself; else it waits.
        sends_rows: windows carry the draft's probabilities, so that the draft must give them; else
            token ids alone. With residual coupling all do.
        speculator: the kind of speculator that proposes at the target; then there are no windows.
        needs: names of `decoding.engine.Capabilities` of the target, beyond verifying a chain.
        needs_draft: an edge without a draft cannot answer by it.
        drafter_needs: names of `decoding.engine.DrafterCapabilities`.
    """

    method: str
    lossless: bool
    pace: str
    runs_on: bool
    sends_rows: bool
    speculator: str
    needs: tuple[str, ...]
    needs_draft: bool
    drafter_needs: tuple[str, ...]
    summary: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As `COLUMNS` shows them."""
        text = "lossless" if self.lossless else "lossy"
        having = [*(["rows"] if self.sends_rows else []), *map(_words, self.drafter_needs)]
        needs = [*map(_words, self.needs)]
        if self.speculator:
            needs.append(f"speculator {self.speculator}")
        return (
            self.method,
            text,
            self.pace,
            "runs on" if self.runs_on else "waits",
            self._sent,
            ", ".join(needs) or "–",
            f"{self._draft}, with {' and '.join(having)}" if having else self._draft,
            self.summary.removesuffix(f" ({text})"),
        )

    @property
    def _sent(self) -> str:
        if self.speculator:
            return "nothing"
        return "ids and rows" if self.sends_rows else "ids"

    @property
    def _draft(self) -> str:
        if self.speculator:
            return "not used"
        return "required" if self.needs_draft else "optional"


def _words(capability: str) -> str:
    return capability.replace("_", " ")


def table() -> tuple[Row, ...]:
    """All methods, in the order they are offered."""
    found = (find(name) for name in names())
    return tuple(_row(method) for method in found if method is not None)


def _row(method: Method) -> Row:
    return Row(
        method=method.name,
        lossless=method.lossless,
        pace=method.pace.name,
        runs_on=method.runs_on,
        sends_rows=not method.speculator
        and method.needs_rows(SamplingParams(coupling=SessionCoupling.GUMBEL)),
        speculator=method.speculator,
        needs=method.needs,
        needs_draft=method.needs_draft,
        drafter_needs=method.drafter_needs,
        summary=method.summary,
    )


def markdown() -> str:
    """The table as docs/method.md shows it; names as code."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for row in table():
        name, *others = row.cells
        lines.append((f"`{name}`", *others))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
