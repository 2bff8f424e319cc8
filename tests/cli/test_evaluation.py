"""`e2sci bench` refuses what it cannot measure, in one line, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "foo"], "there is no 'foo'"),
        (["--data", "/nowhere"], "/nowhere has no data set"),
        (["--datasets", "gsm8k"], "among the files of --data"),
        (["--rtt-ms", "x"], "expected a number"),
        (["--drafts", "oracle:2"], "expected a number in 0 … 1"),
        (["--drafts", "x"], "is unknown"),
        (["--vary", "credit_memory"], "expected NAME=VALUE"),
        (["--vary", "credit_memroy=3"], "no worker has a setting 'credit_memroy'"),
        (["--paced", "3"], "expected STEP,PASS"),
        (["--paced", "contend"], "or contended"),
        (["--methods", "colocated:0"], "there is no 'colocated:0'"),
        (["--methods", "colocated", "--drafts", "oracle:0.1"], "colocated has no oracle drafts"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["bench"], ["bench", "pace", "--out", "/nowhere"]])
def test_an_unknown_number_format_is_refused(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--dtype", "int3"])
    assert done.exit_code == 2
    assert "int3" in done.stderr


def test_a_data_set_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"prompt": "x"}), "utf-8")
    done = CliRunner().invoke(app, ["bench", "--data", str(tmp_path), "--datasets", "mmlu"])
    assert "has no mmlu; there is gsm8k" in done.stderr
