"""What is measured, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.datasets import Question, in_turns, read_questions
from bench.evaluation.rows import Key
from bench.paced import NONE, THIS_DEVICE, Device, short_name
from bench.prompts import SETS
from bus.protocol.errors import ConfigurationError
from decoding import methods
from decoding.pacing import MAX_LOCKSTEP_WINDOW

TARGET = "target"
"""The target alone, streaming its tokens over the same link."""
EDGE_TARGET = "edge-target"
"""The target alone on the edge's core, without a link."""
COLOCATED = "colocated"
"""Draft and target in one process on the cloud's core, streaming over the same link;
`colocated:W` sets the window."""
BASELINES = (TARGET, EDGE_TARGET, COLOCATED)
METHODS = (
    TARGET, "auto", "sd", "fsd", "plc", "e2sci", "e2sci-no-plc", "e2sci-no-threshold",
    "e2sci-no-history",
)  # fmt: skip
ORACLE = "oracle:"
SWEEP_QUESTIONS = 6
"""Prompts on which static windows are compared; none of them is measured."""
Variation = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Setting:
    """One installation: a link, a draft, and perhaps one setting of the workers that differs.

    Attributes:
        rtt_ms: round trip of the link.
        draft: who drafts (`engines.kinds.DrafterKind`), or `oracle:0.1`, a draft that is
            right but at one position in ten.
        variation: name and value of the setting; empty where all is as usual.
        device: whose times steps and passes take.
    """

    rtt_ms: float
    draft: str
    variation: Variation = ("", "")
    device: Device = THIS_DEVICE

    def __str__(self) -> str:
        varied = f", {self.variant}" if self.variant else ""
        padded = f", {short_name(self.device.name)}" if self.device.padded else ""
        return f"{self.rtt_ms:g} ms, draft {self.draft}{varied}{padded}"

    @property
    def variant(self) -> str:
        name, value = self.variation
        return f"{name}={value}" if name else ""

    @property
    def where(self) -> tuple[float, str, str, str]:
        """What tells its rows from those of other settings."""
        return self.rtt_ms, self.draft, self.variant, self.device.name

    def key(self, method: str, question: Question) -> Key:
        """Of an answer in this setting."""
        return Key(method, question.dataset, question.index, *self.where)

    @property
    def error_rate(self) -> float | None:
        """Of an oracle; None for a real draft."""
        return float(self.draft.removeprefix(ORACLE)) if self.draft.startswith(ORACLE) else None


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run.

    Attributes:
        files: data sets; none stands for this project's own prompts.
        limit: prompts of each. skip: rows of each that come before them.
        methods: names, those of `BASELINES` among them. A method in lockstep whose window nobody
            sets gets the best static one of a sweep.
        variations: each one is another installation, beside the usual one where there are none.
        clients: prompts answered at once.
        speculator: the cloud worker's setting; None leaves it to that. dtype: number format of all
            models.
        paced: devices by name (`bench.paced.split_paced`), each one another installation.
        run_code: whether code that models write is run, to mark it.
    """

    files: tuple[Path, ...]
    methods: tuple[str, ...] = METHODS
    limit: int = 20
    skip: int = 0
    max_new_tokens: int = 96
    rtts_ms: tuple[float, ...] = (40.0,)
    drafts: tuple[str, ...] = ("model",)
    variations: tuple[Variation, ...] = (("", ""),)
    clients: int = 1
    target: str = "default"
    draft: str = "default"
    calibration: str = "default"
    speculator: str | None = None
    dtype: str = "auto"
    paced: tuple[str, ...] = (NONE,)
    run_code: bool = False

    def settings(self, devices: Sequence[Device]) -> tuple[Setting, ...]:
        """All installations, on the devices that `paced` names."""
        return tuple(
            Setting(*parts)
            for parts in itertools.product(self.rtts_ms, self.drafts, self.variations, devices)
        )

    def questions(self) -> tuple[list[Question], list[Question]]:
        """Those that are measured, data sets in turns, and those of the sweep.

        Raises:
            ConfigurationError: a data set cannot be read, or has too few rows.
        """
        end = self.skip + self.limit
        columns = [read_questions(path, end + SWEEP_QUESTIONS) for path in self.files]
        if not self.files:
            columns = own_questions()
            end = min(end, *map(len, columns))
        for column in columns:
            if len(column) < end:
                raise ConfigurationError(
                    f"{column[0].dataset} has {len(column)} rows; {end} are needed (--skip and "
                    "--limit)"
                )
        measured = in_turns([column[self.skip : end] for column in columns])
        others = in_turns([column[end:] or column[self.skip : end] for column in columns])
        return measured, others[:SWEEP_QUESTIONS]


def own_questions() -> list[list[Question]]:
    """This project's own prompts, which nobody marks."""
    return [
        [Question(name, index, prompt) for index, prompt in enumerate(prompts)]
        for name, prompts in SETS.items()
    ]


def needs_sweep(name: str) -> bool:
    """Whether a method runs in lockstep with a window that nobody sets: neither its name nor
    credit."""
    if name == COLOCATED:
        return True
    method = methods.find(name)
    return method is not None and method.lockstep and method.takes_window


def colocated_window(name: str) -> int | None:
    """W of `colocated:W`; None where it is no such name, or W is not 1 … `MAX_LOCKSTEP_WINDOW`."""
    base, colon, text = name.partition(":")
    if base != COLOCATED or not colon or not text.isdecimal():
        return None
    window = int(text)
    return window if 1 <= window <= MAX_LOCKSTEP_WINDOW else None


def is_baseline(name: str) -> bool:
    """Whether one process answers it, without edge, cloud and queue."""
    return name in BASELINES or colocated_window(name) is not None


def check_baselines(plan: Plan) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigurationError: co-located SD with an oracle, which needs an edge worker.
    """
    colocated = any(name.partition(":")[0] == COLOCATED for name in plan.methods)
    if colocated and any(draft.startswith(ORACLE) for draft in plan.drafts):
        raise ConfigurationError(
            f"{COLOCATED} has no oracle drafts; leave it out of --methods, or oracles out of "
            "--drafts"
        )
