"""A measured run of `e2sci bench` beside what the simulation predicts for it.

The device is what the run has measured itself: a draft step, and passes by their tokens, alone and
while the other model runs (`contention.json`, of a run with `--paced contended`). Which tokens the
draft gets right is found by running it on the target's own answers of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.claims import PLAN
from bench.contention import CONTENTION, Contention, read_contention
from bench.datasets import Question, read_questions
from bench.evaluation.plan import COLOCATED, EDGE_TARGET, TARGET
from bench.evaluation.rows import AnswerRow
from bench.evaluation.run import ROWS
from bench.lines import read_all
from bench.paced import AS_IT_IS
from bench.simulate.compare import Comparison, draft_agreement
from bench.simulate.device import Device
from bench.simulate.predict import Hits, Prediction, alone, named, predict
from bench.tasks import prompt_of
from bus.protocol.errors import ConfigurationError
from engines.chat import encode_prompt
from engines.torch.oracle import RecordedAnswer
from engines.torch.thin import NoDrafter

Prompt = tuple[str, int]


def is_evaluation(out: Path) -> bool:
    """Whether a directory holds such a run."""
    return (out / CONTENTION).exists()


def compare_evaluation(out: Path) -> list[Comparison]:
    """Every method on every device of the run, all prompts together.

    Raises:
        ConfigurationError: there is no such run in `out`, or its data sets are gone.
    """
    rows = [row for row in read_all(out / ROWS, AnswerRow) if row.draft == "model"]
    own = {_prompt(row): row.token_ids for row in rows if row.method == TARGET}
    if not own:
        raise ConfigurationError(f"{out} has no answers of the method `{TARGET}` to simulate on")
    plan, found = json.loads((out / PLAN).read_bytes()), read_contention(out)
    hits = _hits(own, [Path(name) for name in plan["files"]], plan["draft"])
    settings = dict.fromkeys((row.device, row.rtt_ms, row.method) for row in rows)
    return [
        _compared([r for r in rows if (r.device, r.rtt_ms, r.method) == at], hits, found)
        for at in settings
    ]


def _prompt(row: AnswerRow) -> Prompt:
    return row.dataset, row.prompt_id


def _hits(
    own: dict[Prompt, tuple[int, ...]], files: Sequence[Path], draft: str
) -> dict[Prompt, Hits]:
    tokenizer = NoDrafter.load(draft).tokenizer
    last = max(prompt_id for _, prompt_id in own)
    questions: list[Question] = [q for path in files for q in read_questions(path, last + 1)]
    asked = [q for q in questions if (q.dataset, q.index) in own]
    answers = [
        RecordedAnswer(encode_prompt(tokenizer, prompt_of(q), raw=False), own[q.dataset, q.index])
        for q in asked
    ]
    agreement = draft_agreement(draft, answers)
    return {(q.dataset, q.index): hits for q, hits in zip(asked, agreement, strict=True)}


def _compared(rows: Sequence[AnswerRow], hits: dict[Prompt, Hits], found: Contention) -> Comparison:
    """Rows of one method on one device, in the order in which they were measured."""
    first = rows[0]
    device = device_of(found, padded=first.device != AS_IT_IS)
    predicted = simulated(first.ran, [hits[_prompt(row)] for row in rows], first.rtt_ms, device)
    seconds = sum(row.decode_seconds for row in rows)
    return Comparison(
        "as it is" if first.device == AS_IT_IS else "padded", None, first.rtt_ms, first.ran,
        sum(row.decode_tokens for row in rows) / seconds, predicted.tokens_per_s,
    )  # fmt: skip


def device_of(found: Contention, padded: bool) -> Device:
    """As measured, or with contended times throughout."""
    times = {
        size: timing.contended_ms if padded else timing.alone_ms
        for size, timing in sorted(found.passes.items())
    }
    step, one = found.step, found.passes[min(found.passes)]
    return Device(
        step_ms=step.contended_ms if padded else step.alone_ms,
        pass_ms=times[min(times)],
        passes=tuple(times.items()),
        step_slowdown=1.0 if padded else max(1.0, step.slowdown),
        pass_slowdown=1.0 if padded else max(1.0, one.slowdown),
    )


def simulated(method: str, answers: Sequence[Hits], rtt_ms: float, device: Device) -> Prediction:
    """A method, or one of the baselines of one process: their tokens travel one way, so that the
    link costs them nothing after the first; draft and target take turns on one core."""
    if method == TARGET:
        return alone(answers, rtt_ms, device)
    if method == EDGE_TARGET:
        return alone(answers, 0.0, device)
    if method.startswith(COLOCATED):
        return predict(named(method.replace(COLOCATED, "sd")), answers, 0.0, device)
    return predict(named(method), answers, rtt_ms, device)
