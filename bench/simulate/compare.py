"""A measured run of `e2sci bench pace` beside what the simulation predicts for it.

The device is read off the run's own timelines, once for all its links and drafts; which tokens the
draft got right is known: an oracle's errors by their seeds, a draft model's by running it on the
recorded answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.pace.plan import Plan
from bench.pace.rows import read_rows, read_stack_rows, read_timeline_rows
from bench.pace.run import ANSWERS, ROWS, STACKS, TIMELINES, load_plan
from bench.pace.summary import PaceCell, summarise
from bench.simulate.choices import recorded_choices
from bench.simulate.device import Device, fit_device
from bench.simulate.predict import Hits, named, predict
from engines.torch.oracle import RecordedAnswer, is_wrong, read_answers


@dataclass(frozen=True, slots=True)
class Comparison:
    """One cell of a run, measured and simulated; tokens a second."""

    draft: str
    error_rate: float | None
    rtt_ms: float
    method: str
    measured: float
    simulated: float

    @property
    def ratio(self) -> float:
        """Simulated ÷ measured."""
        return self.simulated / self.measured


def compare(out: Path) -> tuple[Device, list[Comparison]]:
    """Every measured cell with its prediction.

    Raises:
        ConfigurationError: there is no complete run in `out`.
    """
    plan, cells = load_plan(out), summarise(read_rows(out / ROWS), read_stack_rows(out / STACKS))
    timelines = [(row.timeline, row.rtt_ms) for row in read_timeline_rows(out / TIMELINES)]
    device = fit_device(timelines)
    recorded = [RecordedAnswer(*pair) for pair in read_answers(out / ANSWERS).items()]
    agreement: dict[str, list[Hits]] = {}
    rows = []
    for cell in cells:
        if cell.error_rate is None and cell.draft not in agreement:
            agreement[cell.draft] = draft_agreement(cell.draft, recorded)
        predicted = predict(
            named(cell.method), _answers(plan, cell, recorded, agreement), cell.rtt_ms, device
        )
        rows.append(
            Comparison(
                cell.draft, cell.error_rate, cell.rtt_ms, cell.method, cell.speed.median,
                predicted.tokens_per_s,
            )
        )  # fmt: skip
    return device, rows


def _answers(
    plan: Plan,
    cell: PaceCell,
    recorded: Sequence[RecordedAnswer],
    agreement: Mapping[str, list[Hits]],
) -> list[Hits]:
    """In the order in which they were answered, once for each repetition."""
    if cell.error_rate is None:
        return agreement[cell.draft] * plan.repeats
    return [
        oracle_answer(answer, plan.seed(prompt_id, repeat), cell.error_rate)
        for repeat in range(plan.repeats)
        for prompt_id, answer in enumerate(recorded)
    ]


def oracle_answer(recorded: RecordedAnswer, seed: int, error_rate: float) -> Hits:
    """Where an oracle is right."""
    begin = len(recorded.prompt)
    return tuple(
        not is_wrong(seed, begin + index, error_rate) for index in range(len(recorded.answer))
    )


def draft_agreement(spec: str, recorded: Sequence[RecordedAnswer]) -> list[Hits]:
    """Where a draft model, given the answer so far, would have written the answer's token."""
    return [
        tuple(choice.rank == 0 for choice in choices)
        for choices in recorded_choices(spec, recorded)
    ]
