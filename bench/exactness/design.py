"""Which cells are answered: every two levels of different factors meet in one of them.

The covering array comes from the package covertable, deterministic by its salt. Combinations that
do not exist, such as a window for a method without a set window, are left out. Where too few
cells are asked for, levels are left out until every two of the rest meet.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import combinations
from typing import Any

from covertable import make

from bus.protocol.errors import ConfigurationError
from decoding import methods
from decoding.sampling import SamplingParams
from engines.kinds import DrafterKind

WINDOWS = (1, 8, 4, 16)
LINKS = ("loopback", "5g", "wan", "lossy")
TEMPERATURES = (0.0, 0.8, 1.2)
TOP_P = {0.8: 0.9}
"""Top-p that goes with a temperature; elsewhere 1."""
DRAFTERS = (DrafterKind.MODEL.value, DrafterKind.LOOKUP_MODEL.value)
THREADS = (1, 2)


class Disturbance(StrEnum):
    """What happens in the middle of some answers of a cell."""

    NONE = "none"
    KILL_EDGE = "kill-edge"
    KILL_CLOUD = "kill-cloud"
    PAUSE_EDGE = "pause-edge"
    PAUSE_CLOUD = "pause-cloud"
    KILL_MIDDLE = "kill-middle"
    PAUSE_MIDDLE = "pause-middle"


OF_MIDDLE = (Disturbance.KILL_MIDDLE, Disturbance.PAUSE_MIDDLE)
"""Those of a middle worker: each method that has one gets a cell more for each of them."""
DISTURBANCES = tuple(
    kind.value for kind in Disturbance if kind not in (Disturbance.NONE, *OF_MIDDLE)
)
"""Most answers of a disturbed cell are left alone (`bench.exactness.answers`)."""
SEED = 1234
OWN_WINDOW = 0
"""The level of methods without a set window."""
_NUM_SALTS = 12
_LEAST_USUAL = 24
_FACTORS = ("window", "link", "threads", "drafter", "method", "disturbance", "temperature")
"""In the order in which levels are left out, where several factors have equally many; temperatures
only where nothing else can be."""

Row = dict[str, Any]
Levels = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Installation:
    """Processes that are started once and answer several cells.

    Attributes:
        link: in front of the cloud worker, see `launch.link.profiles`.
        threads: CPU threads of each model worker.
    """

    link: str
    drafter: str
    threads: int


@dataclass(frozen=True, slots=True)
class DesignCell:
    """One way of answering all prompts.

    Attributes:
        window: tokens; None where it is not set.
        disturbance: of some of its answers.
    """

    method: str
    window: int | None
    temperature: float
    installation: Installation
    disturbance: Disturbance = Disturbance.NONE

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def sampling(self) -> SamplingParams:
        """What its requests ask for."""
        return sampling_at(self.temperature)

    @property
    def request_method(self) -> str:
        """The method as a request names it, with its window where a name can carry one."""
        return self.method if self.window is None or self.tuned else f"{self.method}:{self.window}"

    @property
    def tuned(self) -> bool:
        """Whether the window is the controller's to set."""
        return self.window is not None and not _in_lockstep(self.method)

    def __str__(self) -> str:
        window = "" if self.window is None else f" W={self.window}"
        inst = self.installation
        return (
            f"{self.method}{window} T={self.temperature:g} {inst.link} {inst.drafter} "
            f"{inst.threads} thread{'s' * (inst.threads > 1)} {self.disturbance.value}"
        )


def sampling_at(temperature: float) -> SamplingParams:
    """With the top-p that goes with the temperature, and the seed of all cells."""
    return SamplingParams(temperature, TOP_P.get(temperature, 1.0), seed=SEED)


def lossless_methods() -> tuple[str, ...]:
    """All the project knows."""
    found = ((name, methods.find(name)) for name in methods.names())
    return tuple(name for name, method in found if method is not None and method.lossless)


def usual_methods(speculators: Collection[str] = ()) -> tuple[str, ...]:
    """The lossless ones, but for those that can do nothing that another cannot: variants of one
    of them (`auto-chain` is `auto` without branches), and those that need what need not be here: a
    draft with a ranked head (`fr-spec`, which is `sd` by one) or that reads features
    (`eagle3-edge`), a middle worker (`pipespec`), a speculator beside the target (`medusa`).

    Args:
        speculators: those that the target has.
    """
    lossless = lossless_methods()
    found = ((name, methods.find(name)) for name in lossless)
    return tuple(
        name
        for name, method in found
        if method is None
        or (
            not (method.variant_of in lossless or method.drafter_needs or method.inner)
            and method.speculator in ("", *speculators)
        )
    )


def checked_lossless(method: str) -> str:
    """A method's name.

    Raises:
        ConfigurationError: its text is not the target's own, so there is nothing to check.
    """
    found = methods.find(method)
    if found is None or not found.lossless:
        raise ConfigurationError(
            f"--method {method}: expected a lossless method, as only their text is the target's "
            f"own; use {', '.join(lossless_methods())}"
        )
    return method


@dataclass(frozen=True, slots=True)
class Factors:
    """Levels to combine, the first ones the last to be left out.

    Attributes:
        windows: of methods that take one.
        named: attributes whose levels somebody asked for: none of them is left out.
    """

    methods: tuple[str, ...] = field(default_factory=usual_methods)
    windows: tuple[int, ...] = WINDOWS
    links: tuple[str, ...] = LINKS
    temperatures: tuple[float, ...] = TEMPERATURES
    drafters: tuple[str, ...] = DRAFTERS
    threads: tuple[int, ...] = THREADS
    disturbances: tuple[str, ...] = DISTURBANCES
    named: frozenset[str] = frozenset()


def takes_window(method: str) -> bool:
    """Whether somebody else than the method itself sets its window."""
    found = methods.find(method)
    return found is not None and found.takes_window


def is_valid(method: str, window: int) -> bool:
    """Whether a method runs with a window, or with `OWN_WINDOW`."""
    if window == OWN_WINDOW or not takes_window(method):
        return window == OWN_WINDOW and not takes_window(method)
    return not _in_lockstep(method) or methods.find(f"{method}:{window}") is not None


def usual_cells(factors: Factors) -> int:
    """Cells in which all levels usually find a place: at least 24, and a fifth more than the most
    pairs that two factors have; and those of middle workers."""
    covering = max(_LEAST_USUAL, math.ceil(1.2 * _least(_levels(factors))))
    return covering + len(OF_MIDDLE) * len(_staged(factors))


def design(factors: Factors, most: int) -> tuple[DesignCell, ...]:
    """At most `most` cells in which every two levels that can meet do, and each middle worker is
    disturbed; those of one installation one after the other.

    Raises:
        ConfigurationError: a method takes none of the windows, or `most` cells are too few for
            levels that somebody asked for.
    """
    levels, staged = _levels(factors), _staged(factors)
    room = most - len(OF_MIDDLE) * len(staged)
    while True:
        rows = _covering(levels, room)
        if rows is not None:
            cells = [_cell(row) for row in rows]
            firsts = {cell.method: cell for cell in reversed(cells) if cell.method in staged}
            cells += [replace(c, disturbance=kind) for c in firsts.values() for kind in OF_MIDDLE]
            levels = {**levels, "disturbance": [*levels["disturbance"], *OF_MIDDLE]}
            return tuple(sorted(cells, key=lambda c: _place(c, levels)))
        fewer = _without_one(levels, factors.named)
        if fewer is None:
            raise ConfigurationError(_too_few(levels, most))
        levels = fewer


def _staged(factors: Factors) -> list[str]:
    """Methods with a middle worker."""
    return [method for method in factors.methods if methods.need_middle((method,))]


def _levels(factors: Factors) -> Levels:
    """By factor. Windows are those that some method takes."""
    windows = [*factors.windows, OWN_WINDOW]
    for method in factors.methods:
        if not any(is_valid(method, window) for window in windows):
            asked = ", ".join(map(str, factors.windows))
            raise ConfigurationError(
                f"{method} takes no window of {asked}; use --window 1 … 32, or another --method"
            )
    return {
        "link": factors.links,
        "window": [w for w in windows if any(is_valid(m, w) for m in factors.methods)],
        "method": factors.methods,
        "threads": factors.threads,
        "drafter": factors.drafters,
        "temperature": factors.temperatures,
        "disturbance": factors.disturbances,
    }


def _without_one(levels: Levels, named: frozenset[str]) -> Levels | None:
    """The last level of the factor with most of them left out; None where all were asked for."""
    free = [f for f in _FACTORS if _attribute(f) not in named and _num_given(f, levels) > 1]
    if not free:
        return None
    others = [factor for factor in free if factor != "temperature"] or free
    factor = max(others, key=lambda f: _num_given(f, levels))  # the first of equals
    given = [level for level in levels[factor] if factor != "window" or level != OWN_WINDOW]
    fewer = dict(levels) | {factor: given[:-1]}
    kept = levels["window"] if factor != "window" else [*given[:-1], OWN_WINDOW]
    fewer["window"] = [w for w in kept if any(is_valid(m, w) for m in fewer["method"])]
    return fewer


def _num_given(factor: str, levels: Levels) -> int:
    return sum(factor != "window" or level != OWN_WINDOW for level in levels[factor])


def _attribute(factor: str) -> str:
    """Of `Factors`."""
    return factor if factor == "threads" else f"{factor}s"


def _covering(levels: Levels, most: int) -> list[Row] | None:
    """Rows that cover all pairs, or None where `most` do not suffice.

    First with two installations for each link, which saves starting processes; then with any.
    """
    if _least(levels) > most:
        return None
    for rules in ([_real(levels), _few_installations(levels)], [_real(levels)]):
        for salt in range(_NUM_SALTS):
            rows: list[Row] = make(dict(levels), salt=str(salt), constraints=rules)
            if len(rows) <= most and not missing_pairs(rows, levels):
                return rows
    return None


def _least(levels: Levels) -> int:
    """No fewer cells can do: the most pairs that two factors have."""
    return max(len(_pairs(*two, levels)) for two in combinations(_FACTORS, 2))


def _pairs(one: str, other: str, levels: Levels) -> set[tuple[Any, Any]]:
    """Pairs of levels of two factors that can meet."""
    pairs = {(a, b) for a in levels[one] for b in levels[other]}
    if (one, other) == ("window", "method"):
        return {(window, method) for window, method in pairs if is_valid(method, window)}
    return pairs


def missing_pairs(rows: Iterable[Row], levels: Levels) -> list[tuple[str, Any, str, Any]]:
    """Pairs (factor, level, factor, level) that can meet and do so in no row."""
    listed = list(rows)
    return [
        (one, a, other, b)
        for one, other in combinations(_FACTORS, 2)
        for a, b in _pairs(one, other, levels) - {(row[one], row[other]) for row in listed}
    ]


def _real(levels: Levels) -> Row:
    """covertable's rule: methods with windows that they take."""
    return _any_of(
        {"method": method, "window": window}
        for method in levels["method"]
        for window in levels["window"]
        if is_valid(method, window)
    )


def _few_installations(levels: Levels) -> Row:
    """covertable's rule: a link has as many installations as drafters or threads, whichever are
    more, and not their product; links differ in which."""
    threads, drafters = levels["threads"], levels["drafter"]
    return _any_of(
        {
            "link": link,
            "threads": threads[turn % len(threads)],
            "drafter": drafters[(turn + at) % len(drafters)],
        }
        for at, link in enumerate(levels["link"])
        for turn in range(max(len(threads), len(drafters)))
    )


def _any_of(allowed: Iterable[Row]) -> Row:
    conditions = [
        {
            "operator": "and",
            "conditions": [
                {"operator": "eq", "left": name, "value": value} for name, value in row.items()
            ],
        }
        for row in allowed
    ]
    return {"operator": "or", "conditions": conditions}


def _cell(row: Row) -> DesignCell:
    return DesignCell(
        row["method"], row["window"] or None, row["temperature"],
        Installation(row["link"], row["drafter"], row["threads"]),
        Disturbance(row["disturbance"]),
    )  # fmt: skip


def _place(cell: DesignCell, levels: Levels) -> tuple[int, ...]:
    """Where a cell stands in the order."""
    inst = cell.installation
    values = (
        ("link", inst.link), ("drafter", inst.drafter), ("threads", inst.threads),
        ("temperature", cell.temperature), ("method", cell.method),
        ("window", cell.window or OWN_WINDOW), ("disturbance", cell.disturbance.value),
    )  # fmt: skip
    return tuple(list(levels[factor]).index(value) for factor, value in values)


def _too_few(levels: Levels, most: int) -> str:
    counts = ", ".join(f"{factor} {len(levels[factor])}" for factor in _FACTORS)
    return (
        f"{most} cells are too few for every two of these levels to meet ({counts}); "
        f"at least {_least(levels)} are needed, often some more: give more --cells or name fewer "
        "levels"
    )


def _in_lockstep(method: str) -> bool:
    found = methods.find(method)
    return found is not None and found.lockstep
