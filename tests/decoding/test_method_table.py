"""The table of methods, that the documentation shows it, and that a method is one small file."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from bench.exactness.design import lossless_methods
from cli.main import app
from dashboard.views.playground import offered_methods
from decoding import methods
from decoding.methods import table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/method.md"
MOST_LINES = 150


def test_the_table_holds_every_method_as_it_is() -> None:
    rows = {row.method: row for row in table.table()}
    assert tuple(rows) == methods.names()
    fsd, amusd, auto = rows["fsd"], rows["amusd"], rows["auto"]
    assert (fsd.lossless, fsd.pace, fsd.runs_on, fsd.sends_rows) == (False, "lockstep", False, True)
    assert (amusd.lossless, amusd.pace, amusd.sends_rows) == (True, "continuous", False)
    assert (auto.runs_on, auto.sends_rows) == (True, False)
    assert rows["e2sci+amusd"].cells[:7] == (
        "e2sci+amusd", "lossy", "continuous", "waits", "ids and rows", "–", "required, with rows"
    )  # fmt: skip


def test_what_a_method_needs_of_its_target_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    needy = replace(methods.sd.METHOD, needs=("trees", "hidden_states"))
    monkeypatch.setitem(methods._METHODS, "sd", needy)
    row = next(row for row in table.table() if row.method == "sd")
    assert row.cells[5] == "trees, hidden states"


def test_what_a_method_needs_of_the_draft_is_shown() -> None:
    rows = {row.method: row.cells[6] for row in table.table()}
    assert rows["fr-spec"] == "required, with ranked head"
    assert rows["e2sci+fr-spec"] == "optional, with rows and ranked head"


def test_docs_show_the_table_as_it_is() -> None:
    assert table.markdown() in PAGE.read_text("utf-8"), "run `e2sci methods --markdown`"


def test_the_command_prints_it() -> None:
    run = CliRunner().invoke
    printed = msgspec.json.decode(run(app, ["methods", "--json"]).stdout, type=list[table.Row])
    assert tuple(printed) == table.table()
    assert run(app, ["methods", "--markdown"]).stdout == table.markdown() + "\n"
    shown = run(app, ["methods"], env={"COLUMNS": "200"}).stdout
    assert all(name in shown for name in methods.names())


@pytest.mark.parametrize("command", ["submit", "generate"])
def test_help_has_a_line_for_each_method(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    lines = [line.strip(" │") for line in shown.splitlines()]
    for name, summary in methods.summaries():
        assert any(f"{name}: {summary}" in line for line in lines), name


def test_a_method_is_a_small_file() -> None:
    sizes = {}
    for module in pkgutil.iter_modules(methods.__path__):
        loaded = importlib.import_module(f"decoding.methods.{module.name}")
        if hasattr(loaded, "METHOD"):
            sizes[module.name] = len(Path(str(loaded.__file__)).read_text("utf-8").splitlines())
    assert {"auto", "sd", "amusd", "e2sci"} <= set(sizes)
    assert {name: size for name, size in sizes.items() if size >= MOST_LINES} == {}


def test_a_line_in_the_registry_is_all_that_a_new_method_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Commands, bench, dashboard and the overlay know it."""
    new = replace(methods.sd.METHOD, name="brand-new", summary="as sd (lossless)")
    monkeypatch.setitem(methods._METHODS, "brand-new", new)
    assert {"brand-new", "e2sci+brand-new"} < set(methods.names())
    assert methods.find("brand-new:6") is not None
    assert methods.find("e2sci+brand-new:0.1") is not None
    assert "brand-new" in lossless_methods()
    assert {"brand-new", "e2sci+brand-new"} < set(offered_methods())
    assert {"brand-new", "e2sci+brand-new"} < {row.method for row in table.table()}
    assert "brand-new" in methods.why_unknown("nonsense")
