"""Tables of the simulation: a device class over links and error rates; a measured run beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.simulate.compare import Comparison, compare
from bench.simulate.device import Device
from bench.simulate.predict import best_static, ceiling, predict, random_answers


@dataclass(frozen=True, slots=True)
class SimulatedCell:
    """One error rate over one link; tokens a second, simulated.

    Attributes:
        alone: the target without a draft. sd: with its best static window, `window`.
        ceiling: the best of a single chain.
    """

    error_rate: float
    rtt_ms: float
    alone: float
    window: str
    sd: float
    plc: float
    ceiling: float
    edge_idle: float
    wasted: float
    source: str = "simulated"


def simulate(
    device: Device, rtts_ms: Sequence[float], error_rates: Sequence[float], prompts: int,
    tokens: int, seed: int, as_json: bool,
) -> list[SimulatedCell]:  # fmt: skip
    """Simulate and print: a table for people, one JSON object a cell for programs."""
    grid = [(error, rtt) for error in error_rates for rtt in rtts_ms]
    cells = []
    for error, rtt in track(grid, "simulating", console=Console(stderr=True), transient=True):
        answers = random_answers(error, prompts, tokens, seed)
        sd, plc = best_static(answers, rtt, device), predict("plc", answers, rtt, device)
        cells.append(
            SimulatedCell(
                error, rtt, 1e3 / device.pass_ms, sd.method, sd.tokens_per_s, plc.tokens_per_s,
                ceiling(error, rtt, device), plc.edge_idle, plc.wasted,
            )
        )  # fmt: skip
    if as_json:
        for cell in cells:
            print(json.dumps(asdict(cell) | {"device": msgspec.to_builtins(device)}))
    else:
        Console().print(_table(cells, device))
    return cells


def _table(cells: Sequence[SimulatedCell], device: Device) -> Table:
    table = Table(
        title=f"Simulated: draft {device.step_ms:g} ms a token, target {device.pass_ms:g} ms a "
        f"pass and {device.pass_token_ms:g} ms a token more",
        caption="tokens/s; nothing here is measured",
    )
    headings = ("wrong", "RTT ms", "alone", "best sd", "", "plc", "plc ÷ sd", "÷ alone", "ceiling")
    for heading in headings:
        table.add_column(heading, justify="right")
    for cell in cells:
        table.add_row(
            f"{cell.error_rate:.0%}", f"{cell.rtt_ms:g}", f"{cell.alone:.1f}", f"{cell.sd:.1f}",
            cell.window, f"{cell.plc:.1f}", f"{cell.plc / cell.sd:.2f}",
            f"{cell.plc / cell.alone:.2f}", f"{cell.plc / cell.ceiling:.0%}",
        )  # fmt: skip
    return table


def run_comparison(out: Path, as_json: bool) -> list[Comparison]:
    """Print a measured run beside its prediction."""
    device, rows = compare(out)
    if as_json:
        print(json.dumps({"device": msgspec.to_builtins(device)}))
        for row in rows:
            print(json.dumps(asdict(row) | {"ratio": row.ratio}))
        return rows
    table = Table(title="Measured, and simulated for the device read off the run; tokens/s")
    for heading in ("draft", "wrong", "RTT ms", "method", "measured", "simulated", "ratio"):
        table.add_column(heading, justify="left" if heading in ("draft", "method") else "right")
    for row in rows:
        wrong = "–" if row.error_rate is None else f"{row.error_rate:.0%}"
        table.add_row(
            row.draft, wrong, f"{row.rtt_ms:g}", row.method, f"{row.measured:.2f}",
            f"{row.simulated:.2f}", f"{row.ratio:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"device: {msgspec.to_builtins(device)}", soft_wrap=True)
    return rows
