"""`e2sci bench timeline`: files in, figures out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from typer.testing import CliRunner

from bench.lines import append_rows
from bench.pace.rows import TimelineRow
from bench.timeline import checked_out, draw, keep_timeline, read_timeline
from bus.protocol.errors import ConfigurationError
from cli.main import app
from tests.dashboard.test_timeline_chart import EVENTS, entry


def test_a_timeline_that_was_kept_is_read_again_and_of_many_the_last(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    keep_timeline(path, entry(*EVENTS))
    assert read_timeline(path) == entry(*EVENTS)
    path.write_bytes(2 * path.read_bytes())
    with path.open("ab") as file:
        keep_timeline(tmp_path / "one.json", entry(*EVENTS, method="sd"))
        file.write((tmp_path / "one.json").read_bytes())
    assert read_timeline(path).method == "sd"


def test_the_timelines_of_a_pace_run_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "timelines.jsonl"
    append_rows(
        path, [TimelineRow("default", None, 40.0, entry(*EVENTS, method=m)) for m in ("a", "b")]
    )
    assert read_timeline(path) == entry(*EVENTS, method="b")


@pytest.mark.parametrize("text", ["", "{}", "no json"])
def test_a_file_without_timelines_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigurationError, match=r"empty\.json holds no timelines"):
        read_timeline(path)
    with pytest.raises(ConfigurationError, match="holds no timelines"):
        read_timeline(tmp_path / "missing.json")


def test_a_name_that_says_no_format_is_refused_before_anything_starts() -> None:
    assert checked_out(Path("figure.svg")) == Path("figure.svg")
    with pytest.raises(ConfigurationError, match=r"\.html, \.svg, \.png"):
        checked_out(Path("figure.pdf"))


def test_a_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """The command, too: with --from it starts nothing."""
    saved, out = tmp_path / "timeline.json", tmp_path / "figure.html"
    keep_timeline(saved, entry(*EVENTS))
    arguments = ["bench", "timeline", "--from", str(saved), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    page = out.read_text("utf-8")
    assert "the token is discarded" in page
    assert "<script src=" not in page


def test_without_a_chromium_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n")

    monkeypatch.setattr(go.Figure, "write_image", missing)
    with pytest.raises(ConfigurationError) as caught:
        draw(entry(*EVENTS), tmp_path / "figure.png")
    assert "\n" not in str(caught.value)
    assert "Chromium" in str(caught.value)
    assert ".html" in str(caught.value)
