"""Tables of the simulation: a device class over links and error rates, a measured run beside it,
what rescue branches gain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.simulate.choices import recorded_choices
from bench.simulate.compare import Comparison, compare
from bench.simulate.compare_evaluation import compare_evaluation, is_evaluation
from bench.simulate.device import Device
from bench.simulate.gains import BATCH, Gain, gain
from bench.simulate.predict import alone, best_static, ceiling, predict, random_answers
from bus.protocol.errors import ConfigurationError
from decoding.methods import Method
from engines.torch.oracle import RecordedAnswer, read_answers

_NAMES = ("draft", "device", "method")


@dataclass(frozen=True, slots=True)
class SimulatedCell:
    """A method at one error rate over one link; tokens a second, simulated.

    Attributes:
        alone: the target by itself over that link. sd: with its best static window, `window`.
        ceiling: the best of a single chain.
    """

    error_rate: float
    rtt_ms: float
    method: str
    tokens_per_s: float
    alone: float
    window: str
    sd: float
    ceiling: float
    edge_idle: float
    wasted: float
    source: str = "simulated"


def simulate(
    device: Device, rtts_ms: Sequence[float], error_rates: Sequence[float], prompts: int,
    tokens: int, seed: int, as_json: bool, tested: Sequence[Method],
) -> list[SimulatedCell]:  # fmt: skip
    """Simulate and print: a table for people, one JSON object a cell for programs."""
    grid = [(error, rtt) for error in error_rates for rtt in rtts_ms]
    cells = []
    for error, rtt in track(grid, "simulating", console=Console(stderr=True), transient=True):
        answers = random_answers(error, prompts, tokens, seed)
        own, sd = alone(answers, rtt, device), best_static(answers, rtt, device)
        for method in tested:
            found = predict(method, answers, rtt, device)
            cells.append(
                SimulatedCell(
                    error, rtt, method.name, found.tokens_per_s, own.tokens_per_s, sd.method,
                    sd.tokens_per_s, ceiling(error, rtt, device), found.edge_idle, found.wasted,
                )
            )  # fmt: skip
    if as_json:
        for cell in cells:
            print(json.dumps(asdict(cell) | {"device": msgspec.to_builtins(device)}))
    else:
        Console().print(_table(cells, device))
    return cells


def device_title(device: Device) -> str:
    """What a table of this device's figures is headed by."""
    return (
        f"Simulated: draft {device.step_ms:g} ms a token, target {device.pass_ms:g} ms a pass and "
        f"{device.pass_token_ms:g} ms a token more"
    )


def _table(cells: Sequence[SimulatedCell], device: Device) -> Table:
    table = Table(title=device_title(device), caption="tokens/s; nothing here is measured")
    headings = ("wrong", "RTT ms", "alone", "best sd", "", "method", "tokens/s", "÷ sd", "÷ alone",
                "ceiling")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for cell in cells:
        table.add_row(
            f"{cell.error_rate:.0%}", f"{cell.rtt_ms:g}", f"{cell.alone:.1f}", f"{cell.sd:.1f}",
            cell.window, cell.method, f"{cell.tokens_per_s:.1f}",
            f"{cell.tokens_per_s / cell.sd:.2f}", f"{cell.tokens_per_s / cell.alone:.2f}",
            f"{cell.tokens_per_s / cell.ceiling:.0%}",
        )  # fmt: skip
    return table


def rescue_gains(
    device: Device, rtts_ms: Sequence[float], error_rates: Sequence[float], answers: Path,
    draft: str, tokens: int, seed: int, as_json: bool,
) -> list[Gain]:  # fmt: skip
    """Simulate rescue branches by a draft's choices on recorded answers, and print.

    Args:
        answers: JSON Lines of prompts and answers in token ids, as `e2sci bench pace` keeps them.

    Raises:
        ConfigurationError: there are no answers in the file, or the draft is right at all of them.
    """
    recorded = [RecordedAnswer(*pair) for pair in read_answers(answers).items()]
    choices = [choice for found in recorded_choices(draft, recorded) for choice in found]
    wrong = [choice for choice in choices if choice.rank]
    if not wrong or len(wrong) == len(choices):
        raise ConfigurationError(
            f"{answers}: of {len(choices)} tokens {len(wrong)} are not the draft's first choice; "
            "some of both are needed, so give more answers"
        )
    grid = [(error, rtt) for error in error_rates for rtt in rtts_ms]
    progress = Console(stderr=True)
    gains = [
        gain(choices, error, rtt, device, tokens, seed)
        for error, rtt in track(grid, "simulating", console=progress, transient=True)
    ]
    if as_json:
        for found in gains:
            print(json.dumps(asdict(found) | {"device": msgspec.to_builtins(device)}))
        return gains
    Console().print(_gains_table(gains, device))
    second = sum(choice.rank == 1 for choice in wrong) / len(wrong)
    print(f"measured: {len(choices)} tokens, {len(wrong) / len(choices):.1%} wrong, "
          f"{second:.0%} of these the second choice")  # fmt: skip
    return gains


def _gains_table(gains: Sequence[Gain], device: Device) -> Table:
    table = Table(
        title=device_title(device),
        caption=f"tokens/s, ÷ the best single chain; batched: a draft step runs {BATCH} tokens; "
        "tree: all branches in one pass",
    )
    headings = ("wrong", "RTT ms", "chain", "branches", "÷ chain", "batched", "tree", "steps spent",
                "rescued", "weight", "longest", "least")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for found in gains:
        policy = found.policy
        table.add_row(
            f"{found.error_rate:.0%}", f"{found.rtt_ms:g}", f"{found.chain:.1f}",
            f"{found.branches:.1f}", f"{found.branches / found.chain:.2f}",
            f"{found.batched / found.chain:.2f}", f"{found.tree / found.chain:.2f}",
            f"{found.on_branches:.0%}", f"{found.rescued:.0%}",
            f"{policy.weight:g}", f"{policy.longest}", f"{policy.least:g}",
        )  # fmt: skip
    return table


def run_comparison(out: Path, as_json: bool) -> list[Comparison]:
    """Print a measured run beside its prediction."""
    if is_evaluation(out):
        device, rows = None, compare_evaluation(out)
    else:
        device, rows = compare(out)
    if as_json:
        if device is not None:
            print(json.dumps({"device": msgspec.to_builtins(device)}))
        for row in rows:
            print(json.dumps(asdict(row) | {"ratio": row.ratio}))
        return rows
    table = Table(title="Measured, and simulated for the device read off the run; tokens/s")
    for heading in (
        "draft" if device is not None else "device",
        "wrong",
        "RTT ms",
        "method",
        "measured",
        "simulated",
        "ratio",
    ):
        table.add_column(heading, justify="left" if heading in _NAMES else "right")
    for row in rows:
        wrong = "–" if row.error_rate is None else f"{row.error_rate:.0%}"
        table.add_row(
            row.draft, wrong, f"{row.rtt_ms:g}", row.method, f"{row.measured:.2f}",
            f"{row.simulated:.2f}", f"{row.ratio:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    if device is not None:
        console.print(f"device: {msgspec.to_builtins(device)}", soft_wrap=True)
    return rows
