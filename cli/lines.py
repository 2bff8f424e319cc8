"""The user's messages to `e2sci chat`, one a line: typed with editing and history, or piped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bus.protocol.errors import RequestError
from bus.protocol.requests import MAX_PROMPT_BYTES
from cli.group import say

if TYPE_CHECKING:
    from prompt_toolkit.history import History

__all__ = ["Lines", "PipedLines", "TypedLines", "history_path", "lines_of_stdin"]

_READ_BYTES = 1 << 16
_PROMPT = "> "


class Lines(Protocol):
    """Where messages come from.

    Attributes:
        interactive: somebody sits at a terminal.
    """

    interactive: bool

    async def read(self) -> str | None:
        """The next line, or None at the end or after Ctrl-C.

        Raises:
            RequestError: it cannot be read, is not UTF-8 or too long.
        """
        ...


def lines_of_stdin() -> Lines:
    """Typed where both ends are a terminal, else piped."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TypedLines()
    return PipedLines(sys.stdin.fileno())


def history_path() -> Path:
    """`$XDG_STATE_HOME/e2sci/chat_history`, else `~/.local/state/e2sci/chat_history`."""
    base = os.environ.get("XDG_STATE_HOME")
    home = Path(base) if base else Path.home() / ".local" / "state"
    return home / "e2sci" / "chat_history"


class TypedLines:
    """A line editor. What is typed is kept in a file that only its owner can read."""

    interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession

        self._session: PromptSession[str] = PromptSession(history=_history())

    async def read(self) -> str | None:
        try:
            return await self._session.prompt_async(_PROMPT)
        except (EOFError, KeyboardInterrupt):
            return None


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return FileHistory(path)
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}): this chat's lines are not kept")
        return InMemoryHistory()


class PipedLines:
    """Lines of a pipe or a file, read on a thread: a file cannot be waited for by an event loop,
    and leaving must not wait for a pipe."""

    interactive = False

    def __init__(self, file: int) -> None:
        self._file = file
        self._stream: asyncio.StreamReader | None = None

    async def read(self) -> str | None:
        if self._stream is None:
            self._stream = asyncio.StreamReader(limit=MAX_PROMPT_BYTES)
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._pump, args=(loop, self._stream), daemon=True).start()
        try:
            line = await self._stream.readline()
            return line.decode().rstrip("\r\n") if line else None
        except OSError as error:
            raise RequestError(f"standard input cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RequestError(
                f"standard input is not UTF-8 (byte {error.start} of the line); encode the text as "
                "UTF-8"
            ) from None
        except ValueError:
            raise RequestError(
                f"a line has more than {MAX_PROMPT_BYTES} bytes; shorten it"
            ) from None

    def _pump(self, loop: asyncio.AbstractEventLoop, stream: asyncio.StreamReader) -> None:
        # The descriptor and not sys.stdin: at exit Python would wait for the lock of its buffer.
        with contextlib.suppress(RuntimeError):  # the loop has ended before the pipe
            try:
                while data := os.read(self._file, _READ_BYTES):
                    loop.call_soon_threadsafe(stream.feed_data, data)
                loop.call_soon_threadsafe(stream.feed_eof)
            except OSError as error:
                loop.call_soon_threadsafe(stream.set_exception, error)
