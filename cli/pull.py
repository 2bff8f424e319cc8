"""`e2sci pull`: the progress bar, the list, and what is printed at the end."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Mapping, Sequence

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from bench.progress import byte_bar
from cli.group import INTERRUPTED, say
from engines.catalog.pull import Pulled, Source, pull_all
from engines.catalog.registry import Model, Registry, load_registry

__all__ = ["pull", "show_list"]


def pull(names: Sequence[str], source: Source, as_json: bool) -> None:
    """Fetch what the names stand for. Ctrl-C, SIGTERM and SIGHUP leave what has arrived.

    Raises:
        ConfigurationError: no model or pair of this name.
        ModelError: a file cannot be fetched or is not the registered one.
    """
    registry = load_registry()
    models: dict[str, Model] = {}
    for name in names:
        found = registry.to_fetch(name)
        models |= found
        if not found:
            say(f"{name}: nothing to fetch; its models are no registered files")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with _Bar(models, quiet=as_json) as bar:
            for pulled in pull_all(models, source, bar):
                if as_json:
                    print(json.dumps(dataclasses.asdict(pulled)), flush=True)
                else:
                    bar.on_note(_describe(pulled))
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None


def show_list(as_json: bool) -> None:
    """Print all named models and pairs, and which files are here.

    Raises:
        ConfigurationError: the user's registry is wrong.
    """
    registry = load_registry()
    if as_json:
        print(json.dumps(_as_builtins(registry)))
        return
    pairs = _table("pairs", "target, draft")
    for name, pair in registry.pairs.items():
        pairs.add_row(name, f"{pair.target}\n{pair.draft}", pair.licence,
                      str(pair.context_length), pair.description)  # fmt: skip
    models = _table("models", "size, here")
    for name, model in registry.models.items():
        here = "here" if model.path.is_file() else "not here"
        models.add_row(name, f"{model.size_bytes / 1e6:.0f} MB, {here}", model.licence,
                       str(model.context_length), model.description)  # fmt: skip
    Console().print(pairs, models)


def _table(kind: str, second: str) -> Table:
    table = Table(box=SIMPLE)
    for heading in (kind, second, "licence", "context"):
        table.add_column(heading, no_wrap=True)
    table.add_column("", overflow="fold")
    return table


def _as_builtins(registry: Registry) -> dict[str, object]:
    return {
        "pairs": {name: pair.model_dump(mode="json") for name, pair in registry.pairs.items()},
        "models": {
            name: model.model_dump(mode="json")
            | {"path": str(model.path), "here": model.path.is_file()}
            for name, model in registry.models.items()
        },
    }


def _describe(pulled: Pulled) -> str:
    how = "was here" if pulled.source == "here" else f"from {pulled.source}"
    return f"{pulled.model}: {pulled.path} ({how}, verified, {pulled.seconds:.0f} s)"


class _Bar:
    """One bar a model, and notes above them."""

    def __init__(self, models: Mapping[str, Model], quiet: bool) -> None:
        self._quiet = quiet
        self._progress: Progress = byte_bar()
        self._progress.disable = quiet
        self._tasks: dict[str, TaskID] = {
            name: self._progress.add_task(name, total=model.size_bytes, start=False)
            for name, model in models.items()
        }

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_bytes(self, name: str, num_bytes: int) -> None:
        task = self._tasks[name]
        self._progress.start_task(task)
        self._progress.update(task, completed=num_bytes)

    def on_note(self, text: str) -> None:
        if not self._quiet:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
