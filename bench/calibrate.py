"""`e2sci calibrate`: what the pair does at each threshold, and the predictor trained on that.

Real processes answer sample prompts with the method `e2sci-explore`, which draws threshold and
window anew after each window. What controller and edge say of every window becomes a record; from
the records come the table and the predictor (`training.calibration`). Each sample is kept as soon
as it is complete, so a run that is cut off loses at most the one under way.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table as Printed

from bench.claims import claim
from bench.datasets import Question, mixed
from bench.lines import append_rows, read_all
from bench.progress import counting_bar
from bench.telemetry import newest_entry, told_of
from bus.client import Client
from bus.protocol.errors import ConfigurationError, RequestFailedError
from bus.protocol.requests import session_id
from bus.settings import BusSettings
from bus.store import FinishReason, ReportEntry, Store, WindowEntry, WorkerRecord
from controller.calibration import About, Calibration, load_calibration
from decoding.credit import CreditLaw, interpolated_neutral
from launch.stack import Stack, StackOptions
from training.calibration.curves import gains_of_following
from training.calibration.predictor import LABEL_STEPS, OBJECTIVE_STEPS, train
from training.calibration.records import WindowRecord, on_another_link, write_records
from training.calibration.table import (
    LOSS_NATS,
    Price,
    Table,
    differences,
    make_table,
    mean_token_ms,
    safe_thresholds,
)

SAMPLES, RECORDS, CALIBRATION = (
    "samples.jsonl", "records.parquet", "calibration.safetensors",
)  # fmt: skip
METHOD = "e2sci-explore"
_TABLE_WIDTH = 150
_LAST_REPORT_S = 5.0


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What is asked of which pair.

    Attributes:
        link: an emulated network (docs/link.md); None is this machine's loopback.
    """

    data: tuple[Path, ...]
    samples: int = 32
    max_new_tokens: int = 96
    target: str = "default"
    draft: str = "default"
    dtype: str = "auto"
    link: str | None = None


class Sample(msgspec.Struct, frozen=True):
    """One answered prompt: its records, and whose they are."""

    index: int
    dataset: str
    pair: tuple[str, str, str]  # target, draft, tokenizer digest
    records: tuple[WindowRecord, ...]


@dataclass(frozen=True, slots=True)
class Aims:
    """What is to be made of the windows.

    Attributes:
        loss_nats: δ. token_ms, joule_ms: γ (None: what a token takes) and γ_E, as in `table`.
        simulate_rtt_ms: price the records for a link with this round trip; nothing is measured.
        against: another calibration, to compare the table with.
    """

    loss_nats: float = LOSS_NATS
    token_ms: float | None = None
    joule_ms: float = 0.0
    simulate_rtt_ms: float | None = None
    against: Path | None = None

    def price(self, records: Sequence[WindowRecord]) -> Price:
        token_ms = mean_token_ms(records) if self.token_ms is None else self.token_ms
        return Price(token_ms, self.joule_ms)


def run(plan: CalibrationPlan, aims: Aims, out: Path, as_json: bool) -> Calibration:
    """Measure what is missing under `out`, and write records, table and predictor.

    Raises:
        ConfigurationError: `out` holds another plan's run, or nothing to price.
    """
    other = None if aims.against is None else load_calibration(aims.against)
    simulate_rtt_ms = aims.simulate_rtt_ms
    questions = mixed(plan.data, plan.samples)
    claim(out, plan, may_grow=("samples",))
    samples = read_all(out / SAMPLES, Sample)
    missing = [i for i in range(len(questions)) if i not in {sample.index for sample in samples}]
    if missing and simulate_rtt_ms is None:
        with counting_bar() as progress:
            task = progress.add_task("samples", total=len(missing))
            measuring = _measure(plan, questions, missing, out, lambda: progress.advance(task))
            asyncio.run(measuring)
        samples = read_all(out / SAMPLES, Sample)
    records = [record for sample in samples for record in sample.records]
    if not records:
        raise ConfigurationError(
            f"{out} holds no windows; run e2sci calibrate without a link first"
        )
    write_records(out / RECORDS, records)
    if simulate_rtt_ms is not None:
        records = on_another_link(records, _round_trip_ms(plan.link), simulate_rtt_ms)
    table = make_table(records, aims.price(records), aims.loss_nats)
    calibration = _train(plan, aims, table, records, samples[0].pair)
    calibration.save(out / CALIBRATION)
    compared = None if other is None else _compare(records, other)
    _show(table, calibration, compared, as_json)
    return calibration


# --- measuring --------------------------------------------------------------------------------


async def _measure(
    plan: CalibrationPlan, questions: Sequence[Question], missing: Sequence[int], out: Path,
    tick: Callable[[], None],
) -> None:  # fmt: skip
    options = StackOptions(
        target=plan.target, draft=plan.draft, dtype=plan.dtype, drafter="model", link=plan.link
    )
    stack = Stack(options, log=lambda _: None, quiet=True, env={"E2SCI_REPORTS": "1"})
    async with stack, Client(redis_url=stack.redis_url) as client:
        store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
        try:
            pair = _pair(await store.registry.workers())
            for index in missing:
                question = questions[index]
                records = await _answer(client, store, question.prompt, index, plan.max_new_tokens)
                append_rows(out / SAMPLES, [Sample(index, question.dataset, pair, tuple(records))])
                tick()
        finally:
            await store.close()


def _pair(workers: Sequence[WorkerRecord]) -> tuple[str, str, str]:
    target = next(worker for worker in workers if worker.role == "cloud")
    draft = next(worker for worker in workers if worker.role == "edge")
    return target.model, draft.model, target.tokenizer_digest


async def _answer(
    client: Client, store: Store, prompt: str, index: int, max_new_tokens: int
) -> list[WindowRecord]:
    """Answer one prompt; the records of its windows but the first, which waited for the prompt."""
    after = await newest_entry(store)
    request = await client.submit(
        prompt, method=METHOD, temperature=0.0, max_new_tokens=max_new_tokens, seed=index
    )
    async for chunk in client.stream(request):
        if chunk.end is not None and chunk.end.finish_reason is FinishReason.ERROR:
            raise RequestFailedError(f"sample {index}: {chunk.end.error}")
    told = await told_of(store, session_id(request), after, _LAST_REPORT_S)
    return [
        _record(index, number, window, told.reports[window.incarnation, window.number])
        for number, window in enumerate(told.windows)
        if number and (window.incarnation, window.number) in told.reports
    ]


def _record(sample: int, index: int, window: WindowEntry, report: ReportEntry) -> WindowRecord:
    return WindowRecord(
        sample=sample, index=index, credit=report.credit, credit_delta=report.credit_delta,
        threshold=round(report.threshold, 4), num_drafted=report.num_drafted,
        num_accepted=report.num_accepted, num_committed=report.num_accepted + report.num_own,
        expected_accepted=report.expected_accepted, draft_ms=window.draft_ms,
        verify_ms=report.verify_ms, queue_ms=report.queue_ms, rtt_ms=window.rtt_ms,
        num_scored=report.num_scored, log_likelihood=report.log_likelihood,
        num_greedy=report.num_greedy, regret=report.regret, energy_j=report.energy_j,
    )  # fmt: skip


# --- making something of it -------------------------------------------------------------------


def _round_trip_ms(link: str | None) -> float:
    """Of the link that was measured over, by its name; 0 for the loopback.

    Raises:
        ConfigurationError: it has no fixed round trip.
    """
    if link is None:
        return 0.0
    number = link.removesuffix("ms")
    try:
        return float(number)
    except ValueError:
        raise ConfigurationError(
            f"records of the link {link!r} cannot be priced for another; measure over one such as "
            "40ms, or without"
        ) from None


def _train(
    plan: CalibrationPlan, aims: Aims, table: Table, records: Sequence[WindowRecord],
    pair: tuple[str, str, str],
) -> Calibration:  # fmt: skip
    simulate_rtt_ms = aims.simulate_rtt_ms
    law = CreditLaw(neutral=lambda window: interpolated_neutral(table.neutral, window))
    with counting_bar() as progress:
        task = progress.add_task("training", total=LABEL_STEPS + OBJECTIVE_STEPS)
        layers = train(table, records, law, lambda: progress.advance(task))
    link = plan.link or "loopback"
    about = About(
        target=pair[0], draft=pair[1], tokenizer_digest=pair[2],
        data=", ".join(path.name for path in plan.data),
        link=link if simulate_rtt_ms is None else f"{simulate_rtt_ms:g}ms, simulated from {link}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        num_windows=len(records), neutral=table.neutral, edges=table.edges,
        safe=safe_thresholds(table, aims.loss_nats), table=table.to_json(),
    )  # fmt: skip
    return Calibration(about, layers)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two tables with the same bins.

    Attributes:
        num_figures: that both have. num_far: more than two standard errors of their difference
            apart; chance alone makes about one in twenty.
        median: standard errors. speed: how many times as long windows took; times are compared
            after this has been taken out.
    """

    num_figures: int
    num_far: int
    median: float
    speed: float


def _compare(records: Sequence[WindowRecord], other: Calibration) -> Comparison:
    """Raises ConfigurationError where there are too few windows."""
    theirs = Table.from_json(other.about.table)
    try:
        table = make_table(records, theirs.price, edges=theirs.edges)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    speed, apart = differences(table, theirs)
    if not apart:
        raise ConfigurationError("the tables share no cell with enough windows")
    return Comparison(len(apart), sum(a > 2 for a in apart), statistics.median(apart), speed)


def _gains(table: Table) -> dict[float, float]:
    return gains_of_following(
        table.curves, [sum(cell.num_windows for cell in b.cells) for b in table.bins]
    )


def _show(
    table: Table, calibration: Calibration, compared: Comparison | None, as_json: bool
) -> None:
    if as_json:
        found = {
            "about": json.loads(msgspec.json.encode(calibration.about)),
            "gains_of_following": _gains(table),
        }
        if compared is not None:
            found["against"] = asdict(compared)
        print(json.dumps(found))
        return
    about = calibration.about
    printed = Printed(
        title=f"{about.num_windows} windows of {about.target} with {about.draft}, {about.link}",
        caption="ms a window · tokens it commits · nats a token below the target's first choice. "
        "label: the threshold that is cheapest and keeps quality; safe: the greatest that keeps it",
    )
    thresholds = sorted({cell.threshold for b in table.bins for cell in b.cells})
    printed.add_column("credit", justify="right")
    for threshold in thresholds:
        name = "exact" if threshold < 0 else f"{threshold:g} nats"
        printed.add_column(name, justify="right")
    for heading in ("label", "safe", "W"):
        printed.add_column(heading, justify="right")
    for b, safe in zip(table.bins, about.safe, strict=True):
        cells = {cell.threshold: cell for cell in b.cells}
        shown = [
            f"{cells[t].segment_ms:.0f} · {cells[t].committed:.2f} · {cells[t].regret:.2f}"
            if t in cells else "–"
            for t in thresholds
        ]  # fmt: skip
        label = "exact" if b.label < 0 else f"{b.label:g}"
        printed.add_row(f"{b.credit:.2f}", *shown, label, f"{safe:.2f}", str(b.window))
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(printed)
    console.print(
        "the best that a threshold following credit can commit, against a fixed one with the same "
        "regret, known in hindsight: "
        + ", ".join(f"{gain:.3f} × at {t:g} nats" for t, gain in _gains(table).items() if t > 0)
    )
    if compared is not None:
        console.print(
            f"against the other table: {compared.num_far} of {compared.num_figures} figures lie "
            f"more than two standard errors apart, the median is {compared.median:.2f}; windows "
            f"took {compared.speed:.2f} × as long, which is taken out"
        )
