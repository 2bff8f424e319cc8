"""The command `e2sci doctor`.

As in `cli.main`, what loads models or rich's tables is imported where it is used.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from bus.protocol.errors import ConfigurationError
from bus.settings import BusSettings
from cli import options
from cli.group import run
from cli.state import configured_redis_url, find_running

__all__ = ["doctor"]


def doctor(
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    dtype: options.Dtype = "auto",
    redis_url: options.RedisUrl = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            "--no-models",
            help="Load no models and send no large messages: a few seconds instead of a minute.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Check this machine, the installation and the running system; predict the speed.

    Exit status 0 where no check has failed, warnings or not, else 1. Nothing is changed. With
    --json, one object on one line: ok, checks, links, expectation.
    """
    from rich.console import Console

    from bench.doctor.report import show
    from bench.doctor.run import Question, examine
    from engines.catalog.registry import chosen_models

    question = Question(
        specs=chosen_models(pair, target, draft),
        dtype=options.checked_dtype(dtype),
        settings=_settings(redis_url),
        stack_here=find_running() is not None,
        quick=quick,
    )
    report = run(lambda: examine(question))
    if json:
        typer.echo(msgspec.json.encode(report.to_builtins()))
    else:
        show(report, Console())
    if not report.ok:
        raise typer.Exit(1)


def _settings(redis_url: str | None) -> BusSettings | None:
    """With a configured Redis, else that of a running `e2sci up`. None without either, or where
    settings are wrong, which a check reports."""
    try:
        url = configured_redis_url(redis_url)
        if url is None:
            stack = find_running()
            if stack is None:
                return None
            url = stack.redis_url
        return BusSettings.load(redis_url=url)
    except ConfigurationError:
        if redis_url is not None:
            raise
        return None
