"""`e2sci bench exactness`, `bench coupling` and `bench int8`: is the text the target's own, how
often does a draft meet it, and is the target as good?

As in `cli.main`, what loads torch is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.protocol.bounds import WINDOW
from cli import evaluation, options

if TYPE_CHECKING:
    from bench.exactness.design import Factors

__all__ = ["bench_int8", "coupling", "exactness"]


def exactness(
    prompts: options.OwnPrompts = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 48,
    dtype: options.Dtype = "float32",
    cells: Annotated[
        int | None,
        typer.Option(
            min=6,
            help="At most so many ways of answering; with few of them some levels are left out, "
            "but none that you name.",
            show_default="24, more where methods and other levels are many",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A lossless method; may be given several times.",
            show_default="all of them but variants of another, such as auto-chain; medusa and "
            "eagle3 where the target has the speculator",
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            min=int(WINDOW.low), max=int(WINDOW.high),
            help="Tokens drafted before each check, of methods that take them; may be given "
            "several times.",
            show_default="1, 4, 8, 16",
        ),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            help="Over this emulated link; may be given several times; all: every profile.",
            show_default="loopback, 5g, wan, lossy",
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0, max=10, help="May be given several times.", show_default="0, 0.8, 1.2"),
    ] = None,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    speculator: options.Speculator = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Is the text of every lossless method the target's own, token for token?

    Every two of methods, windows, links, temperatures, drafters and numbers of threads meet in
    some cell. A cell's answers are compared with the target alone with the same seed. Exit status
    1 where they differ by more than rounding of the number format explains.
    """
    from dataclasses import replace

    from bench.exactness.answers import Asked, speculators_of
    from bench.exactness.design import usual_cells, usual_methods
    from bench.exactness.run import own_prompts
    from bench.exactness.run import run as run_exactness

    factors = _exactness_factors(method or [], window or [], link or [], temperature or [])
    specs = options.checked_models(pair, target, draft)
    asked = Asked(
        own_prompts(prompts), max_new_tokens, *specs, options.checked_dtype(dtype),
        options.speculator_setting(speculator),
    )  # fmt: skip
    if not method:
        factors = replace(factors, methods=usual_methods(speculators_of(asked)))
    if not run_exactness(factors, cells or usual_cells(factors), asked, json):
        raise typer.Exit(1)


def _exactness_factors(
    methods: list[str], windows: list[int], links: list[str], temperatures: list[float]
) -> Factors:
    """Levels that were asked for, each once, in place of the usual ones.

    Raises:
        ConfigurationError: a method is lossy, or there is no such link.
        RequestError: there is no such method.
    """
    from bench.exactness.design import Factors, checked_lossless
    from launch.link.profiles import PROFILES

    if links == ["all"]:
        links = list(PROFILES)
    asked: dict[str, tuple[Any, ...]] = {
        "methods": tuple(checked_lossless(options.checked_method(name)) for name in methods),
        "windows": tuple(windows),
        "links": tuple(name for name in links if options.checked_link(name)),
        "temperatures": tuple(temperatures),
    }
    given = {name: tuple(dict.fromkeys(levels)) for name, levels in asked.items() if levels}
    return Factors(**given, named=frozenset(given))


def coupling(
    prompts: options.OwnPrompts = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    dtype: options.Dtype = "auto",
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    json: options.Json = False,
) -> None:
    """How often is a draft's token the target's own, and how often would residual sampling accept?

    On the target's own answers at temperatures 0, 0.8 with top-p 0.9, and 1.2.
    """
    from bench.coupling import run as run_coupling
    from bench.exactness.answers import Asked
    from bench.exactness.run import own_prompts

    specs = options.checked_models(pair, target, draft)
    run_coupling(
        Asked(own_prompts(prompts), max_new_tokens, *specs, options.checked_dtype(dtype)), json
    )


def bench_int8(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Directory of benchmark sets as JSON lines, whose answers are compared.",
            show_default="this project's own prompts",
        ),
    ] = None,
    datasets: Annotated[
        str | None,
        typer.Option(help="Which of them, comma between.", show_default="every .jsonl there"),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens of answers to compare, over all sets; 0 leaves the quality out."
        ),
    ] = 2000,
    repeats: Annotated[
        int, typer.Option(min=0, help="Timings of each pass; 0 leaves the passes out.")
    ] = 15,
    compare: Annotated[
        str | None,
        typer.Option(
            help="float32: time the target's passes in float32 too. A model of 1.5 billion "
            "weights needs 6 GB of memory and, from a GGUF file, a converted copy of 6 GB on disk, "
            "which takes minutes the first time."
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            help="Time llama.cpp on the same GGUF file too: a Python interpreter of another "
            "virtual environment, with llama-cpp-python."
        ),
    ] = None,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of int8.json, and of the answers; a run that was cut off goes on there."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """What int8 costs in quality and brings in speed, against float32 of the same weights.

    Quality: both read the int8 target's own answers; their distributions are compared at every
    token. Speed: passes on one core, interleaved. Nothing else should run on the machine.
    """
    if compare not in (None, "float32"):
        raise typer.BadParameter(f"--compare {compare!r} is unknown; use float32")
    if llama_cpp is not None and not llama_cpp.expanduser().is_file():
        raise typer.BadParameter(f"--llama-cpp {llama_cpp}: no such file; name an interpreter")
    if tokens == 0 and repeats == 0:
        raise typer.BadParameter("--tokens 0 --repeats 0 leaves nothing to measure")
    files = evaluation.checked_files(data, datasets)
    specs = options.checked_models(pair, target, draft)
    from bench.int8.run import Plan
    from bench.int8.run import run as run_int8

    interpreter = None if llama_cpp is None else llama_cpp.expanduser().absolute()
    plan = Plan(specs, files, tokens, repeats, compare is not None, interpreter)
    run_int8(plan, out, json)
