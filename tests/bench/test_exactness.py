"""`bench/exactness`: the design of cells, and the judging of answers made by hand."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.exactness.answers import Asked, CellAnswers, Tokens, installations
from bench.exactness.design import (
    DISTURBANCES,
    DRAFTERS,
    LINKS,
    OF_MIDDLE,
    TEMPERATURES,
    THREADS,
    WINDOWS,
    DesignCell,
    Factors,
    Installation,
    design,
    lossless_methods,
    usual_cells,
    usual_methods,
)
from bench.exactness.judge import Allowance, CellResult, allowance_of, judge
from bench.exactness.run import ExactnessResult, closing_lines, own_prompts
from bus.protocol.errors import ConfigurationError
from cli.main import app
from decoding import methods
from launch.link.profiles import PROFILES

WITHOUT_WINDOW = {
    "amusd",
    "pipespec",
    "pipespec-2",
    "e2sci-no-threshold",
    "sd:6",
    "medusa",
    "eagle3",
}


def factors_of(cell: DesignCell) -> dict[str, Any]:
    where = cell.installation
    return {
        "method": cell.method, "window": cell.window, "temperature": cell.temperature,
        "link": where.link, "drafter": where.drafter, "threads": where.threads,
    }  # fmt: skip


def can_meet(one: str, a: Any, other: str, b: Any) -> bool:
    """Written down apart from `is_valid`: what is known of the methods there are."""
    pair = {one: a, other: b}
    if set(pair) != {"method", "window"}:
        return True
    if pair["method"] in WITHOUT_WINDOW:
        return pair["window"] is None
    return pair["window"] is not None and (
        pair["method"] not in ("sd", "fr-spec") or pair["window"] <= 32
    )


def check(cells: tuple[DesignCell, ...], levels: dict[str, set[Any]]) -> None:
    """Every two levels that can meet do, and nothing else does."""
    rows = [factors_of(cell) for cell in cells]
    for one, other in combinations(levels, 2):
        met = {(row[one], row[other]) for row in rows}
        possible = {
            (a, b) for a in levels[one] for b in levels[other] if can_meet(one, a, other, b)
        }
        assert met == possible, f"{one} × {other}"


def present(cells: tuple[DesignCell, ...]) -> dict[str, set[Any]]:
    rows = [factors_of(cell) for cell in cells]
    return {name: {row[name] for row in rows} for name in rows[0]}


def test_the_usual_design_has_every_usual_method_and_level() -> None:
    most = usual_cells(Factors())
    cells = design(Factors(), most)
    assert len(cells) <= most
    levels: dict[str, set[Any]] = {
        "method": set(usual_methods()), "window": {*WINDOWS, None}, "link": set(LINKS),
        "temperature": set(TEMPERATURES), "drafter": set(DRAFTERS), "threads": set(THREADS),
    }  # fmt: skip
    check(cells, levels)
    assert (
        {*usual_methods(), "auto-chain", "fr-spec", "pipespec", "medusa", "eagle3", "eagle3-edge"}
        == set(lossless_methods())
        == {name for name in methods.names() if getattr(methods.find(name), "lossless", False)}
    )
    assert cells == design(Factors(), most)


def test_methods_of_speculators_are_usual_where_the_target_has_them() -> None:
    assert set(usual_methods(("eagle3",))) - set(usual_methods()) == {"eagle3"}
    assert {*usual_methods(("eagle3", "medusa"))} == {*usual_methods(), "medusa", "eagle3"}


def test_a_middle_worker_is_disturbed_where_there_is_one() -> None:
    def met(*names: str) -> set[tuple[str, str]]:
        cells = design(Factors(names), usual_cells(Factors(names)))
        assert len(cells) <= usual_cells(Factors(names))
        return {(cell.method, cell.disturbance.value) for cell in cells}

    kinds = {*DISTURBANCES, *OF_MIDDLE}
    pairs = met("auto", "pipespec")
    assert {kind for name, kind in pairs if name == "pipespec"} == kinds
    assert {kind for name, kind in pairs if name == "auto"} == set(DISTURBANCES)
    assert {kind for _, kind in met("auto", "sd")} == set(DISTURBANCES)


def test_a_run_starts_each_installation_once() -> None:
    cells = design(Factors(), usual_cells(Factors()))
    started = [where for where, _ in installations(cells)]
    assert len(started) == len(set(started)) <= 2 * len(LINKS)
    assert sum(len(group) for _, group in installations(cells)) == len(cells)


@settings(max_examples=12, deadline=None)
@given(
    names=st.sets(st.sampled_from([*lossless_methods(), "sd:6"]), min_size=1, max_size=4),
    windows=st.sets(st.sampled_from([1, 3, 8, 32, 40]), min_size=2, max_size=4),
    links=st.sets(st.sampled_from(sorted(PROFILES)), min_size=1, max_size=4),
    temperatures=st.sets(st.sampled_from([0.0, 0.5, 1.0]), min_size=1),
)
def test_any_named_levels_are_all_covered(
    names: set[str], windows: set[int], links: set[str], temperatures: set[float]
) -> None:
    factors = Factors(
        tuple(sorted(names)), tuple(sorted(windows)), tuple(sorted(links)),
        tuple(sorted(temperatures)),
        named=frozenset({"methods", "windows", "links", "temperatures", "drafters", "threads"}),
    )  # fmt: skip
    cells = design(factors, 60)
    assert len(cells) <= 60
    taken: set[int | None] = {
        window
        for window in [*windows, None]
        if any(can_meet("method", name, "window", window) for name in names)
    }
    levels: dict[str, set[Any]] = {
        "method": names, "window": taken, "link": links, "temperature": temperatures,
        "drafter": set(DRAFTERS), "threads": set(THREADS),
    }  # fmt: skip
    check(cells, levels)


@pytest.mark.parametrize(
    "most", [6, 8, *(pytest.param(n, marks=pytest.mark.long) for n in (12, 17))]
)
def test_few_cells_cover_fewer_levels(most: int) -> None:
    cells = design(Factors(), most)
    assert len(cells) <= most
    check(cells, present(cells))
    levels = present(cells)
    assert levels["temperature"] == set(TEMPERATURES)
    assert len(levels["method"]) > 1


def test_named_levels_are_not_left_out() -> None:
    named = Factors(links=("5g", "wan", "lan"), named=frozenset({"links"}))
    assert present(design(named, 14))["link"] == {"5g", "wan", "lan"}
    many = Factors(windows=tuple(range(1, 12)), named=frozenset({"windows", "methods"}))
    with pytest.raises(ConfigurationError, match="10 cells are too few"):
        design(many, 10)


def test_a_method_that_takes_none_of_the_windows_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sd takes no window of 40"):
        design(Factors(methods=("sd", "plc"), windows=(40,)), 24)


def test_how_a_request_says_the_window() -> None:
    where = Installation("loopback", "model", 1)
    assert DesignCell("sd", 7, 0.0, where).request_method == "sd:7"
    ahead = DesignCell("plc", 7, 0.0, where)
    assert (ahead.request_method, ahead.tuned) == ("plc", True)
    own = DesignCell("e2sci-no-threshold", None, 0.0, where)
    assert (own.request_method, own.tuned) == ("e2sci-no-threshold", False)


def test_prompts_are_of_all_kinds() -> None:
    assert len(set(own_prompts(8))) == 8
    assert sum(text.startswith(("Repeat", "Rewrite", "Copy")) for text in own_prompts(8)) == 2


# --- judging ----------------------------------------------------------------------------------


WHERE = Installation("loopback", "model", 1)
GREEDY, SAMPLED = DesignCell("sd", 4, 0.0, WHERE), DesignCell("sd", 4, 0.8, WHERE)
ALONE: tuple[Tokens, ...] = ((1, 2, 3, 4), (5, 6, 7))


NOT_ALL = (
    "identical to the target alone: not all, but every token lies within 2ε of the target's first "
    "choice"
)


class Said:
    """Evidence with the same number for everything; notes what it was asked."""

    def __init__(self, lead: float = 1.0, epsilon: float = 0.5, shortfall: float = 0.0) -> None:
        self.values = lead, epsilon, shortfall
        self.asked: list[tuple[int, Tokens]] = []

    def lead(self, prompt: int, tokens: Tokens, cell: DesignCell) -> float:
        self.asked.append((prompt, tokens))
        return self.values[0]

    def margin(self, prompt: int, tokens: Tokens, cell: DesignCell) -> float:
        return 10 * self.values[0]

    def epsilon(self, prompt: int, answer: Tokens) -> float:
        return self.values[1]

    def shortfall(self, prompt: int, answer: Tokens) -> float:
        return self.values[2]


def judged(
    answers: tuple[Tokens, ...], said: Said, dtype: str = "float32", cell: DesignCell = GREEDY
) -> CellResult:
    first = CellAnswers(cell, ALONE, 1.0, dtype)
    alone = {0.0: ALONE, 0.8: ALONE}
    return judge(
        [first, CellAnswers(cell, answers, 1.0, dtype)], alone, allowance_of(dtype), said
    )[1]  # fmt: skip


def test_formats_and_what_they_excuse() -> None:
    assert allowance_of("int8") is Allowance.NONE
    assert allowance_of("float32") is Allowance.NEAR_TIES
    assert allowance_of("bfloat16") is Allowance.EPSILON
    assert allowance_of("some other") is Allowance.NONE


@pytest.mark.parametrize("cell", [GREEDY, SAMPLED])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_identical_answers_hold_and_no_model_is_asked(cell: DesignCell, dtype: str) -> None:
    said = Said()
    result = judged(ALONE, said, dtype, cell)
    assert (result.holds, result.identical, result.num_identical) == (True, True, 2)
    assert result.difference is None
    assert said.asked == []


@pytest.mark.parametrize(("cell", "near"), [(GREEDY, 9e-4), (SAMPLED, 9e-4)])
def test_a_near_tie_is_excused_in_float32_alone(cell: DesignCell, near: float) -> None:
    parted = ((1, 2, 9, 9), ALONE[1])
    said = Said(lead=near)
    result = judged(parted, said, "float32", cell)
    assert (result.holds, result.identical, result.num_excused) == (True, False, 1)
    assert said.asked == [(0, (1, 2, 3))]
    strict = judged(parted, Said(lead=near), "int8", cell)
    assert (strict.holds, strict.num_identical, strict.num_excused) == (False, 1, 0)


@pytest.mark.parametrize(("cell", "far"), [(GREEDY, 1e-3), (SAMPLED, 1e-3)])
def test_a_difference_elsewhere_is_not_excused(cell: DesignCell, far: float) -> None:
    result = judged((ALONE[0], (5, 9, 7)), Said(lead=far), "float32", cell)
    assert (result.holds, result.num_excused) == (False, 0)
    difference = result.difference
    assert difference is not None
    assert (difference.prompt, difference.position) == (1, 1)
    assert (difference.expected, difference.got) == (6, 9)
    assert difference.lead == far
    assert difference.margin == (None if cell.greedy else 10 * far)


@pytest.mark.parametrize("cell", [GREEDY, SAMPLED])
@pytest.mark.parametrize("answer", [(1, 2, 3), (1, 2, 3, 4, 5), ()])
def test_a_shorter_or_longer_answer_is_not_excused(cell: DesignCell, answer: Tokens) -> None:
    result = judged((answer, ALONE[1]), Said(lead=0.0), "float32", cell)
    assert not result.holds
    assert result.difference is not None
    assert None in (result.difference.expected, result.difference.got)


def test_the_difference_told_is_one_that_is_not_excused() -> None:
    said = Said()
    said.lead = lambda prompt, tokens, cell: 0.0 if prompt == 0 else 1.0  # type: ignore[method-assign]
    result = judged(((9, 2, 3, 4), (5, 6, 9)), said)
    assert (result.num_excused, result.holds) == (1, False)
    assert result.difference is not None
    assert result.difference.prompt == 1


def test_bfloat16_holds_within_two_epsilon() -> None:
    parted = ((9, 2, 3, 4), ALONE[1])
    assert judged(parted, Said(epsilon=0.5, shortfall=1.0), "bfloat16").holds
    assert not judged(parted, Said(epsilon=0.5, shortfall=1.1), "bfloat16").holds
    assert not judged(parted, Said(epsilon=9.0), "bfloat16", SAMPLED).holds


def test_a_border_of_top_p_excuses_in_float32() -> None:
    said = Said()
    said.margin = lambda prompt, tokens, cell: 9e-5  # type: ignore[method-assign]
    parted = ((1, 2, 9, 9), ALONE[1])
    assert judged(parted, said, "float32", SAMPLED).num_excused == 1
    assert judged(parted, said, "float32", GREEDY).num_excused == 0
    assert judged(parted, said, "int8", SAMPLED).num_excused == 0


def test_cells_are_compared_with_the_target_alone_at_their_temperature() -> None:
    theirs: tuple[Tokens, ...] = ((8,), (8,))
    answers = [(GREEDY, ALONE), (SAMPLED, theirs), (SAMPLED, ALONE), (GREEDY, theirs)]
    measured = [CellAnswers(cell, tokens, 1.0, "int8") for cell, tokens in answers]
    results = judge(measured, {0.0: ALONE, 0.8: theirs}, Allowance.NONE, Said())
    assert [result.holds for result in results] == [True, True, False, False]
    assert (SAMPLED.sampling.temperature, SAMPLED.sampling.top_p) == (0.8, 0.9)


@pytest.mark.parametrize(
    ("answers", "lead", "dtype", "line"),
    [
        (ALONE, 1.0, "int8", "identical to the target alone: yes"),
        (((9,), ALONE[1]), 0.0, "int8", "identical to the target alone: no"),
        (((9,), ALONE[1]), 1.0, "float32", "identical to the target alone: no"),
        (
            ((9, 2), ALONE[1]), 0.0, "float32",
            "identical to the target alone: yes, but for 1 near-ties that rounding decides",
        ),
        (
            ((9, 2), ALONE[1]), 1.0, "bfloat16",
            NOT_ALL,
        ),
    ],
)  # fmt: skip
def test_the_end_says_it_in_words(
    answers: tuple[Tokens, ...], lead: float, dtype: str, line: str
) -> None:
    result = ExactnessResult(Asked(("a", "b"), 4), dtype, (judged(answers, Said(lead), dtype),))
    assert closing_lines(result) == [line]
    printed = json.loads(json.dumps(result.as_dict()))
    assert printed["holds"] == (not line.endswith(": no"))
    assert printed["cells"][0]["method"] == "sd"


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "e2sci"], "e2sci: expected a lossless method"),
        (["--method", "fsd:0.1"], "use auto, auto-chain, sd, plc, plc-literal, amusd"),
        (["--method", "nonsense"], "there is no 'nonsense'"),
        (["--link", "pigeon"], "pigeon"),
        (["--dtype", "int3"], "int3"),
        (["--cells", "2"], "cells"),
        (["--window", "0"], "window"),
        (["--temperature", "-1"], "temperature"),
        (["--method", "sd", "--window", "40"], "sd takes no window of 40"),
        (
            ["--window", "1", "--window", "2", "--link", "all", "--cells", "9"],
            "9 cells are too few",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_is_started(
    flags: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["bench", "exactness", *flags])
    assert result.exit_code in {1, 2}
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
