"""What a pass costs in int8, and in float32 and in llama.cpp, on one core.

Every kind of pass runs once in each repeat, in the same order, so that drift hits all alike.
Our passes are timed as the workers make them: a target pass with its rows reduced at 48 ids each, a
draft step with its draw. llama.cpp's is an evaluation with the logits of every token, copied once.
The floor is the bytes of weights that an int8 pass reads ÷ the memory bandwidth of the same run.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.cores import one_core
from bench.int8.llamacpp import LlamaCpp
from bench.passes import CONTEXT, PASS_SIZES, DraftStep, TargetPass, alternate, memory_bandwidth
from bus.protocol.errors import ConfigurationError
from engines.catalog.registry import Specs
from engines.catalog.sources import find_source
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

INT8, FLOAT32, LLAMA_CPP, DRAFT = "int8", "float32", "llama.cpp", "draft step"
_FLOAT_BYTES = 4
_SPARE = 1.3  # of memory, while a float32 model is read and its matrices are packed


@dataclass(frozen=True, slots=True)
class Timing:
    """One kind of pass; milliseconds over all repeats."""

    kind: str
    num_tokens: int
    median_ms: float
    min_ms: float


@dataclass(frozen=True, slots=True)
class PassTable:
    """All kinds, in one run.

    Attributes:
        weight_bytes, draft_bytes: read by a pass of the target and a step of the draft, in int8.
        bandwidth: bytes a second that one core reads from memory.
        gguf: the file that llama.cpp ran, or None. llama_cpp: the version of llama-cpp-python.
    """

    weight_bytes: int
    draft_bytes: int
    bandwidth: float
    timings: tuple[Timing, ...]
    gguf: str | None = None
    llama_cpp: str | None = None

    def median_ms(self, kind: str, num_tokens: int) -> float | None:
        """None where it was not measured."""
        for timing in self.timings:
            if (timing.kind, timing.num_tokens) == (kind, num_tokens):
                return timing.median_ms
        return None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of target passes."""
        return tuple(dict.fromkeys(t.kind for t in self.timings if t.kind != DRAFT))

    @property
    def floor_ms(self) -> float:
        """What reading the int8 weights alone takes."""
        return 1e3 * self.weight_bytes / self.bandwidth

    def ratios(self) -> dict[str, float]:
        """By name, of medians: t(n) is int8's time for n tokens."""
        one, eight = self._int8_ms(1), self._int8_ms(8)
        step = self.median_ms(DRAFT, 1)
        assert step is not None
        found = {
            "t(8)/t(1)": eight / one,
            "t(1)/floor": one / self.floor_ms,
            "draft step/t(1)": step / one,
        }
        for kind in self.kinds[1:]:
            for size in PASS_SIZES:
                other = self.median_ms(kind, size)
                assert other is not None
                found[f"int8/{kind} at {size}"] = self._int8_ms(size) / other
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"floor_ms": self.floor_ms, "ratios": self.ratios()}

    def _int8_ms(self, num_tokens: int) -> float:
        found = self.median_ms(INT8, num_tokens)
        assert found is not None
        return found


def measure(
    specs: Specs,
    float32: bool,
    llama_python: Path | None,
    repeats: int,
    tick: Callable[[], None],
) -> PassTable:
    """Time passes of `PASS_SIZES` tokens after a context of `CONTEXT`, and a draft step.

    Args:
        float32: whether the target also runs in float32.
        llama_python: an interpreter with llama-cpp-python, to run the same GGUF file.
        tick: called after each of `repeats`.

    Raises:
        ConfigurationError: too little memory for float32, or llama.cpp cannot run the target.
        ModelError: a model cannot be loaded.
    """
    gguf = None if llama_python is None else _gguf(specs.target)
    with one_core(), ExitStack() as exits:
        target, draft = (
            TargetModel.load(specs.target, "int8"),
            ModelDrafter.load(specs.draft, "int8"),
        )
        rng = np.random.default_rng(0)
        context: list[int] = rng.integers(0, target.vocab_size, CONTEXT).tolist()
        tokens: list[list[int]] = [
            rng.integers(0, target.vocab_size, size).tolist() for size in PASS_SIZES
        ]
        runs: dict[tuple[str, int], Callable[[], float]] = {
            (DRAFT, 1): DraftStep(draft, context).run
        }
        runs |= _ours(INT8, target, context, tokens)
        if float32:
            _require_memory(target)
            runs |= _ours(FLOAT32, TargetModel.load(specs.target, "float32"), context, tokens)
        llama: LlamaCpp | None = None
        if llama_python is not None and gguf is not None:
            core = min(os.sched_getaffinity(0))
            llama = exits.enter_context(LlamaCpp(llama_python, gguf, core, context))
            for fed in tokens:
                runs[LLAMA_CPP, len(fed)] = partial(llama.time_ms, fed)
        bandwidth = memory_bandwidth()
        samples = alternate(list(runs.values()), repeats, tick)
    return PassTable(
        target.network.weight_bytes, draft.weight_bytes, bandwidth,
        tuple(
            Timing(*run, statistics.median(times), min(times))
            for run, times in zip(runs, samples, strict=True)
        ),
        None if gguf is None else gguf.name, None if llama is None else llama.version,
    )  # fmt: skip


def _ours(
    kind: str, target: TargetModel, context: list[int], tokens: Sequence[list[int]]
) -> dict[tuple[str, int], Callable[[], float]]:
    return {(kind, len(fed)): TargetPass(target, context, fed).run for fed in tokens}


def _gguf(spec: str) -> Path:
    found = find_source(spec).gguf
    if found is None:
        raise ConfigurationError(
            f"llama.cpp runs GGUF files, and the target {spec!r} is none; choose a pair or a "
            "--target that is one, or leave --llama-cpp out"
        )
    return found


def _require_memory(target: TargetModel) -> None:
    """A target in float32 takes about four times the bytes of its int8 weights, and its head is
    held twice where the embedding is tied to it."""
    needed = _SPARE * _FLOAT_BYTES * target.network.weight_bytes
    free = psutil.virtual_memory().available
    if free < needed:
        raise ConfigurationError(
            f"--compare float32 needs about {needed / 1e9:.1f} GB of free memory, here are "
            f"{free / 1e9:.1f}; free some, or leave --compare out"
        )
