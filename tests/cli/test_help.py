from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cli import __version__
from cli.main import app

COMMANDS = [
    "up",
    "submit",
    "chat",
    "generate",
    "status",
    "methods",
    "pull",
    "rank",
    "doctor",
    "distill",
    "train",
    "bench",
]


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"e2sci {__version__}\n"


def test_help_names_every_command_and_where_to_begin() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "Begin: `e2sci up`" in result.stdout
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_without_arguments_the_help_is_printed() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "Begin: `e2sci up`" in result.stdout
    assert result.stderr == ""


def test_a_mistyped_command_is_corrected() -> None:
    result = CliRunner().invoke(app, ["sumbit"])
    assert result.exit_code == 2
    assert "Did you mean 'submit'?" in result.stderr


def test_the_command_starts_without_torch() -> None:
    code = "import sys, cli.main; print([m for m in ('torch', 'streamlit') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
