"""How the command line fails: one line on stderr, exit status 1, or 2 for wrong usage.

Nobody should have to read a traceback to learn that a number was negative.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

from bus.protocol.errors import E2SCIError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells expect it."""
_USAGE = 2
_CANCELLING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_T = TypeVar("_T")


class OneLineErrors(TyperGroup):
    """A command group that reports our errors and typer's as one line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        _open_closed_streams()
        try:
            status = super().main(
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )
        except typer.TyperException as error:
            text = error.format_message()
            if not text:  # called without arguments: the help has been printed
                sys.exit(_USAGE)
            context = getattr(error, "ctx", None)
            where = f" (see {context.command_path} --help)" if context is not None else ""
            fail(f"{text.rstrip('.')}{where}", _USAGE)
        except E2SCIError as error:
            fail(str(error), 1)
        except OSError as error:  # a full disk under standard output, a file of no permission
            _let_go_of_stdout()
            named = f"{error.filename}: " if error.filename else ""
            fail(f"{named}{error.strerror or error}", 1)
        if standalone_mode:
            sys.exit(status if isinstance(status, int) else 0)
        return status


def _open_closed_streams() -> None:
    """A stream that the caller has closed (`<&-`) is empty, and what is written there is lost.
    Without this its descriptor would go to the next socket."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _let_go_of_stdout() -> None:
    """What is left in its buffer could not be written at exit either."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(text: str, status: int) -> NoReturn:
    """Print the text as one line on stderr and exit."""
    say(f"error: {text}")
    sys.exit(status)


def say(text: str) -> None:
    """One line on stderr, whatever line breaks the text holds."""
    typer.echo(" ".join(text.split()), err=True)


def run(main: Callable[[], Coroutine[Any, Any, _T]], interrupted: int = INTERRUPTED) -> _T:
    """Run a coroutine that Ctrl-C, SIGTERM and SIGHUP cancel, each time anew.

    The first cancellation lets it clean up, a second one cancels the cleaning up. Exits with the
    status `interrupted` when it ends cancelled.
    """

    async def cancellable() -> _T:
        task = asyncio.current_task()
        assert task is not None
        for number in _CANCELLING:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await main()

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise typer.Exit(interrupted) from None
