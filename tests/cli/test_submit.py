"""`e2sci submit` as a user runs it, against a real Valkey and a scripted edge worker."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bus.protocol.bounds import SessionCoupling
from bus.store import EndEntry, FinishReason, Store, TokensEntry
from bus.store.blocking import BlockingStore
from cli.main import app
from cli.state import StateFile
from tests.cli.conftest import ROOT, ScriptedEdge, e2sci, finish, invoke, start, stop

pytestmark = pytest.mark.usefixtures("reachable")


async def test_text_streams_to_stdout_and_nothing_to_stderr(edge: ScriptedEdge) -> None:
    done = await e2sci("submit", "Hi")
    assert (done.status, done.out, done.err) == (0, "Hello wörld\n", "")


def test_json_gives_the_entries_one_a_line(edge_beside: ScriptedEdge) -> None:
    done = invoke("submit", "Hi", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line.pop("id") for line in lines] == [edge_beside.claims[0].request_id] * 3
    assert lines[0] == {
        "kind": "tokens", "start": 0, "tokens": [11, 12], "text": "Hello", "accepted": [1, 1],
    }  # fmt: skip
    assert (lines[1]["start"], lines[1]["tokens"]) == (2, [13])
    assert lines[2]["kind"] == "end"
    assert lines[2]["finish_reason"] == "stop"
    assert lines[2]["usage"]["completion_tokens"] == 3


def test_every_option_reaches_the_request(edge_beside: ScriptedEdge) -> None:
    done = invoke(
        "submit", "-", "--method", "sd", "--max-new-tokens", "7", "--temperature", "0.5",
        "--top-p", "0.9", "--top-k", "40", "--seed", "3", "--coupling", "residual",
        "--stop", "a", "--stop", "b", "--raw", "--client", "me", stdin="Grüße\n".encode(),
    )  # fmt: skip
    assert done.status == 0
    request = edge_beside.claims[0].request
    assert request is not None
    assert request.prompt == "Grüße\n"
    assert (request.method, request.max_new_tokens) == ("sd", 7)
    assert (request.temperature, request.top_p, request.top_k) == (0.5, 0.9, 40)
    assert request.coupling is SessionCoupling.RESIDUAL
    assert (request.seed, request.stop, request.raw, request.client) == (3, ("a", "b"), True, "me")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
SYSTEM = {"role": "system", "content": "Rhyme."}
GO = {"role": "user", "content": "Go on"}


def test_system_chat_and_prompt_make_one_chat(edge_beside: ScriptedEdge, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(CHAT))
    whole = json.dumps({"messages": [*CHAT, GO]}).encode()
    for args, stdin in (
        (["Hi", "--system", "Rhyme."], b""),
        (["Go on", "--chat", str(file), "--system", "Rhyme.", "--seed", "3"], b""),
        (["-", "--chat", str(file)], b"Go on"),
        (["--chat", "-"], whole),
    ):
        done = invoke("submit", *args, stdin=stdin)
        assert (done.status, done.out, done.err) == (0, "Hello wörld\n", "")
    requests = [claim.request for claim in edge_beside.claims]
    chats = [[one.model_dump(mode="json") for one in request.messages] for request in requests
             if request is not None]  # fmt: skip
    assert chats == [[SYSTEM, CHAT[0]], [SYSTEM, *CHAT, GO], [*CHAT, GO], [*CHAT, GO]]
    assert requests[1] is not None
    assert (requests[1].prompt, requests[1].seed) == ("", 3)


@pytest.mark.parametrize(
    ("text", "args", "status", "words"),
    [
        ("[", [], 1, "chat.json: expected JSON"),
        ("[" * 100_000, [], 1, "chat.json: expected JSON, maximum recursion depth"),
        ("\ufeff[]", [], 1, "empty"),
        ('{"chat": []}', [], 1, "chat.json: expected a JSON list of messages"),
        (
            '[{"role": "tool", "content": "4"}]',
            [],
            1,
            "message 0: role must be one of system, user",
        ),
        ("[]", [], 1, "empty"),
        (json.dumps(CHAT), [], 1, "the last message is the assistant's"),
        (json.dumps([SYSTEM, GO]), ["--system", "x"], 1, "has a system message already"),
        (json.dumps([GO]), ["--raw"], 1, "raw: messages need the chat template"),
        (json.dumps([GO]), ["-", "--chat", "-"], 2, "standard input is either the prompt or the"),
    ],
)
def test_a_wrong_chat_is_one_clear_line(
    text: str, args: list[str], status: int, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("E2SCI_REDIS_URL", "redis://127.0.0.1:1/0")
    file = tmp_path / "chat.json"
    file.write_text(text)
    done = CliRunner().invoke(app, ["submit", "--chat", str(file), *args])
    assert (done.exit_code, done.stdout) == (status, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_answer_that_ends_with_an_error_fails_in_one_line(edge_beside: ScriptedEdge) -> None:
    edge_beside.error = "the prompt is\ntoo long"
    done = invoke("submit", "Hi")
    assert (done.status, done.err) == (1, "error: the prompt is too long\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_cancels_the_request(edge: ScriptedEdge, number: signal.Signals) -> None:
    edge.hold = True
    process = await start("submit", "Hi", "--json")
    assert process.stdout is not None
    first = await process.stdout.readline()
    process.send_signal(number)
    done = await finish(process)
    assert done.status == 130
    entries = [json.loads(line) for line in [first.decode(), *done.out.splitlines()]]
    assert entries[-1]["finish_reason"] == FinishReason.CANCELLED
    assert "Traceback" not in done.err


def test_a_timeout_cancels_the_request(edge_beside: ScriptedEdge, blocking: BlockingStore) -> None:
    edge_beside.hold = True
    done = invoke("submit", "Hi", "--timeout", "1")
    assert done.status == 1
    assert "no end within 1 s" in done.err
    assert done.err.count("\n") == 1

    async def ended(store: Store) -> list[TokensEntry | EndEntry]:
        """All entries, once the edge worker has written the last."""
        return [entry async for entry in store.results.read(edge_beside.claims[0].request_id)]

    last = blocking.call(ended)[-1]
    assert isinstance(last, EndEntry)
    assert last.end.finish_reason is FinishReason.CANCELLED
    assert blocking.call(lambda store: store.queue.depth()).length == 0


async def test_without_an_edge_worker_it_says_so_and_waits(store: Store) -> None:
    process = await start("submit", "Hi")
    assert process.stderr is not None
    assert b"no edge worker is running" in await process.stderr.readline()
    scripted = ScriptedEdge(store)
    serving = asyncio.create_task(scripted.serve())
    done = await finish(process)
    await stop(serving)
    assert (done.status, done.out) == (0, "Hello wörld\n")


async def test_a_reader_that_leaves_cancels_the_request(edge: ScriptedEdge, store: Store) -> None:
    edge.hold = True
    process = await start("submit", "Hi", "--json")
    assert process.stdout is not None
    process.stdout._transport.close()  # type: ignore[attr-defined]
    await process.wait()
    assert process.returncode == 1
    entries = [entry async for entry in store.results.read(edge.claims[0].request_id)]
    assert isinstance(entries[-1], EndEntry)
    assert entries[-1].end.finish_reason is FinishReason.CANCELLED


@pytest.mark.parametrize(
    ("args", "stdin", "status", "words"),
    [
        (["", "--raw"], b"", 1, "prompt: empty"),
        (["-"], b"ok \xff", 1, "standard input is not UTF-8 (byte 3)"),
        (["Hi", "--temperature", "nan"], b"", 1, "temperature: expected a finite number"),
        (["Hi", "--temperature", "-1"], b"", 1, "temperature:"),
        (["Hi", "--max-new-tokens", "0"], b"", 1, "max_new_tokens: expected 1"),
        (["Hi", "--top-p", "1.5"], b"", 1, "top_p:"),
        (["Hi", "--top-k", "-1"], b"", 1, "top_k:"),
        (["Hi", "--seed", "-1"], b"", 1, "seed:"),
        (["Hi", "--stop", ""], b"", 1, "stop:"),
        (["Hi", "--method", "magic"], b"", 1, "there is no 'magic'; known are auto"),
        (["Hi", "--client", "a b"], b"", 1, "client:"),
        (["Hi", "--coupling", "magic"], b"", 2, "'magic' is not one of 'gumbel', 'residual'"),
        (["Hi", "--max-new-tokens", "many"], b"", 2, "--max-new-tokens"),
        (["Hi", "--timeout", "-1"], b"", 2, "--timeout"),
        (["Hi", "--no-such-option"], b"", 2, "--no-such-option"),
        ([], b"", 2, "give a prompt or --chat FILE"),
        (["Hi", "--redis-url", "http://x"], b"", 1, "redis_url: expected redis://"),
    ],
)
def test_bad_input_is_one_clear_line_and_goes_nowhere(
    args: list[str], stdin: bytes, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2SCI_REDIS_URL", "redis://127.0.0.1:1/0")  # reaching it would say so
    done = CliRunner().invoke(app, ["submit", *args], input=stdin)
    assert done.exit_code == status
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_redis_that_is_away_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("submit", "Hi", "--redis-url", "redis://:secret@127.0.0.1:1/0")
    assert done.status == 1
    assert "does not answer" in done.err
    assert "secret" not in done.err
    assert done.err.count("\n") == 1


def test_the_state_file_of_up_leads_to_its_redis(
    edge_beside: ScriptedEdge, monkeypatch: pytest.MonkeyPatch, valkey_url: str
) -> None:
    monkeypatch.delenv("E2SCI_REDIS_URL")
    done = invoke("submit", "Hi")
    assert done.status == 1
    assert done.err == "error: nothing is running here; start `e2sci up` or set E2SCI_REDIS_URL\n"
    state = StateFile()
    state.write(redis_url=valkey_url)
    done = invoke("submit", "Hi")
    state.remove()
    assert (done.status, done.out) == (0, "Hello wörld\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("methods > /dev/full", "No space left on device"),
        ("methods --json > /dev/full", "No space left on device"),
        ("submit - <&-", "prompt: empty"),
        ("chat <&-", ""),
    ],
)
async def test_streams_that_are_full_or_closed_are_no_traceback(
    edge: ScriptedEdge, command: str, words: str
) -> None:
    shell = f'exec "{sys.executable}" -m cli.main {command}'
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", shell, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == (1 if words else 0)
    assert words in said.decode()
    assert said.count(b"\n") <= 1
