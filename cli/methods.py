"""The command `e2sci methods`: what each method promises, sends and needs."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from cli import options

__all__ = ["methods"]


def methods(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of docs/method.md.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Show what each method promises, sends and needs.

    Lossless: the text is the target's own. Sends: token ids, or rows with the draft's
    probabilities. A draft is optional where the target runs on without.
    """
    from decoding.methods import table

    if json:
        typer.echo(msgspec.json.encode(table.table()))
    elif markdown:
        typer.echo(table.markdown())
    else:
        _show(table.COLUMNS, [row.cells for row in table.table()])


def _show(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE)
    for heading in columns:
        shown.add_column(heading, no_wrap=heading == columns[0], overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
