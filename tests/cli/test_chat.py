"""`e2sci chat` as a user runs it: piped lines, a terminal, Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import stat
import sys
from pathlib import Path

import pytest

from bus.protocol.chat import ChatMessage
from bus.protocol.errors import RequestError
from bus.store import End, FinishReason, Usage
from cli.chat import HELP, Conversation, summary
from cli.lines import PipedLines, history_path
from tests.cli.conftest import ROOT, ScriptedEdge, e2sci, finish, invoke, start

ANSWER = "Hello wörld"


def said(messages: tuple[ChatMessage, ...] | list[ChatMessage]) -> list[tuple[str, str]]:
    return [(str(message.role), message.content) for message in messages]


def chats(edge: ScriptedEdge) -> list[list[tuple[str, str]]]:
    """Messages of each request."""
    return [said(claim.request.messages) for claim in edge.claims if claim.request is not None]


# --- the conversation -------------------------------------------------------------------------


def test_commands_change_the_conversation_and_other_lines_are_messages() -> None:
    talk = Conversation()
    for line in ("hello", "/usr/bin holds programs", "/reset it", "/no_think"):
        assert talk.command(line) is None
    assert talk.command("/help") == HELP
    assert talk.command("/system Be brief. ") == "system message set"
    talk.keep("a", "b")
    assert said(talk.asked("c")) == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"),
    ]  # fmt: skip
    assert talk.command(" /reset ") == "the chat begins anew"
    assert said(talk.asked("c")) == [("system", "Be brief."), ("user", "c")]
    assert talk.command("/system") == "no system message"
    assert said(talk.asked("c")) == [("user", "c")]


def test_the_summary_says_how_an_answer_ended() -> None:
    usage = Usage(completion_tokens=9, tokens_per_s=12.34, drafted_tokens=4, acceptance=0.75)
    whole = summary(End(FinishReason.STOP, usage=usage), 7)
    assert whole == "[9 tokens, 12.3 tokens/s, 75% of drafts accepted, seed 7]"
    cut = summary(End(FinishReason.LENGTH, usage=Usage(completion_tokens=2)), 7)
    assert cut == "[2 tokens, 0.0 tokens/s, cut off at max_new_tokens, seed 7]"
    assert summary(End(FinishReason.CANCELLED), 7) == "[cancelled]"


# --- lines ------------------------------------------------------------------------------------


async def test_piped_lines_come_one_by_one_and_end(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes("Grüße\r\n\nlast".encode())
    with path.open("rb") as file:
        lines = PipedLines(file.fileno())
        assert [await lines.read() for _ in range(4)] == ["Grüße", "", "last", None]


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"ok \xff\n", "not UTF-8 .byte 3 of the line"), (b"a" * (2**20 + 1), "more than 1048576")],
)
async def test_bad_lines_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(RequestError, match=words):
        await PipedLines(file.fileno()).read()


async def test_input_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        await PipedLines(directory).read()
    os.close(directory)


def test_the_history_is_kept_under_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "e2sci" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "e2sci" / "chat_history"


# --- the command ------------------------------------------------------------------------------


@pytest.mark.usefixtures("reachable")
async def test_piped_lines_are_one_chat(edge: ScriptedEdge) -> None:
    lines = b"Hi\n\n/system Rhyme.\nGo on\n/reset\nAgain"
    done = await e2sci("chat", "--system", "Be brief.", "--seed", "7", "--method", "sd",
                       stdin=lines)  # fmt: skip
    assert done.status == 0
    assert done.out == (f"{ANSWER}\nsystem message set\n{ANSWER}\nthe chat begins anew\n{ANSWER}\n")
    assert done.err == "[3 tokens, 0.0 tokens/s, seed 7]\n" * 3
    assert chats(edge) == [
        [("system", "Be brief."), ("user", "Hi")],
        [("system", "Rhyme."), ("user", "Hi"), ("assistant", ANSWER), ("user", "Go on")],
        [("system", "Rhyme."), ("user", "Again")],
    ]
    requests = [claim.request for claim in edge.claims]
    assert {(one.seed, one.method) for one in requests if one is not None} == {(7, "sd")}


@pytest.mark.usefixtures("reachable")
async def test_ctrl_c_cancels_an_answer_and_the_chat_goes_on(edge: ScriptedEdge) -> None:
    edge.hold = True
    process = await start("chat")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Hi\n")
    await process.stdout.readuntil("wörld".encode())
    edge.hold = False
    process.send_signal(signal.SIGINT)
    done = await finish(process, b"Go on\n")
    assert (done.status, done.out) == (0, f"\n{ANSWER}\n")
    assert done.err.startswith("[cancelled]\n[3 tokens")
    assert chats(edge)[1] == [("user", "Hi"), ("assistant", ANSWER), ("user", "Go on")]


@pytest.mark.usefixtures("reachable")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_between_answers_leaves(edge: ScriptedEdge, number: signal.Signals) -> None:
    process = await start("chat")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"Hi\n")
    await process.stderr.readuntil(b"]\n")
    process.send_signal(number)
    assert await process.wait() == 130
    assert (await process.stdout.read()).decode() == f"{ANSWER}\n"
    assert await process.stderr.read() == b""


@pytest.mark.usefixtures("reachable")
async def test_a_failed_answer_ends_piped_lines(edge: ScriptedEdge) -> None:
    edge.error = "the prompt is too long"
    done = await e2sci("chat", stdin=b"Hi\nGo on\n")
    assert (done.status, done.err) == (1, "error: the prompt is too long\n")
    assert len(edge.claims) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [(["--temperature", "-1"], "temperature:"), ([], "nothing is running here")],
)
def test_what_is_wrong_is_reported_before_a_line_is_read(args: list[str], words: str) -> None:
    done = invoke("chat", *args)
    assert done.status == 1
    assert words in done.err


@pytest.mark.usefixtures("reachable")
async def test_a_terminal_edits_keeps_history_and_survives_a_failed_answer(
    edge: ScriptedEdge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cli.main", "chat", cwd=ROOT, stdin=slave, stdout=slave,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(slave)
    assert process.stderr is not None
    screen = Screen(master)
    await screen.asks(1)  # before, the terminal would edit the line itself
    edge.error = "too long"
    os.write(master, b"Hix\x7f\r")  # backspace
    assert await process.stderr.readline() == b"error: too long\n"
    edge.error = ""
    await screen.asks(2)
    os.write(master, b"\x1b[A!\r")  # the line before, and more
    assert (await process.stderr.readline()).startswith(b"[3 tokens")
    await screen.asks(3)
    os.write(master, b"\x03")
    assert await process.wait() == 0
    assert ANSWER in screen.text
    screen.close()
    assert chats(edge) == [[("user", "Hi")], [("user", "Hi!")]]
    history = tmp_path / "e2sci" / "chat_history"
    assert [line for line in history.read_text().splitlines() if line.startswith("+")] == [
        "+Hi", "+Hi!",
    ]  # fmt: skip
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


class Screen:
    """What a program has written to a terminal whose other end is `descriptor`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data = b""
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    @property
    def text(self) -> str:
        return self._data.decode(errors="replace")

    async def asks(self, times: int) -> None:
        """Wait until the input line has been opened so often: bracketed paste begins with it."""
        async with asyncio.timeout(60):
            while self._data.count(b"\x1b[?2004h") < times:
                self._changed.clear()
                await self._changed.wait()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _read(self) -> None:
        try:
            self._data += os.read(self._descriptor, 4096)
        except OSError:  # the other end is closed
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self._changed.set()
