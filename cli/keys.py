"""`e2sci keys`: who may use the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.group import OneLineErrors, say

if TYPE_CHECKING:
    from gateway.keys import KeyFile

__all__ = ["app"]

app = typer.Typer(cls=OneLineErrors, no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Whose key: letters, digits, _ . and -.")]
File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="The file of hashed keys.",
        show_default="E2SCI_API_KEYS_FILE, else ~/.config/e2sci/api-keys",
    ),
]


@app.command()
def add(name: Name, file: File = None) -> None:
    """Make a key and print it, once: only its hash is kept."""
    keys = _key_file(file)
    typer.echo(keys.add(name))
    say(f"its hash is in {keys.path}; the gateway reads it with E2SCI_API_KEYS_FILE={keys.path}")


@app.command()
def remove(name: Name, file: File = None) -> None:
    """Forget a key: from its next request on it is refused."""
    _key_file(file).remove(name)


@app.command("list")
def list_names(file: File = None) -> None:
    """Print the names, one a line."""
    for name in _key_file(file).read():
        typer.echo(name)


def _key_file(given: Path | None) -> KeyFile:
    from gateway.keys import KeyFile, default_keys_file
    from gateway.settings import GatewaySettings

    return KeyFile(given or GatewaySettings.load().api_keys_file or default_keys_file())
