"""The commands that make and judge drafts: `e2sci distill`, `e2sci bench draft`, `fr-spec`
and `acceptance`.

As in `cli.main`, what loads torch is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.group import INTERRUPTED, say

__all__ = ["bench_acceptance", "bench_draft", "bench_fr_spec", "distill"]


AnswersFile = Annotated[
    Path | None,
    typer.Option(help="File of the target's answers, which need not be written again."),
]


def distill(
    out: Annotated[
        Path, typer.Option(help="Directory of the draft; one that is there is gone on with.")
    ],
    target: options.Target = None,
    layers: Annotated[
        str, typer.Option(help="Layers of the target to keep: how many, or which (0,1,28,29).")
    ] = "6",
    head_size: Annotated[
        int, typer.Option(min=16, help="Tokens the draft can write, the most frequent ones.")
    ] = 16_384,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help='Prompts to learn on: .jsonl with {"prompt": …} a line, or .txt with a prompt a '
            "line; may be given several times.",
            show_default="the target makes up its own",
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="Texts to learn on besides: .jsonl with a field text, or .txt."),
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0.01, help="Minutes for everything, over all runs on --out.")
    ] = 60.0,
    init: Annotated[
        str | None,
        typer.Option(
            help="Begin with this draft: default or a directory that distill made.",
            show_default="the target's own layers",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 112,
    epochs: Annotated[int, typer.Option(min=1, help="Most passes over the answers.")] = 30,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="AdamW's, at its highest.", show_default="0.001; with --init 0.0004"),
    ] = None,
    dtype: options.Dtype = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of prompts, their order and training.")] = 0,
    json: options.Json = False,
) -> None:
    """Make a draft for a target and train it on the target's own answers.

    The target answers prompts, its most probable tokens are kept, and some of
    its own layers learn to say the same. Cut off at any time (Ctrl-C, kill),
    --out holds the last good weights, and the same command goes on from there.
    """
    target_spec = options.checked_models(None, target, target or "default").target
    from cli.distill import distill as run_distill
    from cli.distill import parse_layers
    from training.distill.run import DistillSettings
    from training.distill.training import TrainingSettings

    if learning_rate is None:
        learning_rate = 1e-3 if init is None else 4e-4
    settings = DistillSettings(
        out=out,
        layers=parse_layers(layers),
        head_size=head_size,
        prompts=tuple(prompts or ()),
        corpora=tuple(corpus or ()),
        init=init,
        budget_seconds=60 * budget,
        max_new_tokens=max_new_tokens,
        seed=seed,
        training=TrainingSettings(learning_rate, epochs=epochs, seed=seed),
    )
    try:
        run_distill(settings, target_spec, dtype, device, json)
    except KeyboardInterrupt:
        say(f"interrupted; {out} holds the last weights, the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None


def bench_draft(
    data: Annotated[
        list[Path],
        typer.Option(
            help='Prompts (.jsonl with {"prompt": …} a line, .txt with one a line) that the target '
            "answers now, or a .safetensors of answers; may be given several times."
        ),
    ],
    draft: Annotated[
        list[str] | None,
        typer.Option(help="A draft; may be given several times.", show_default="the pair's"),
    ] = None,
    pair: options.Pair = None,
    target: options.Target = None,
    limit: Annotated[int, typer.Option(min=1, help="Most prompts of each file.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 112,
    verify_ms: Annotated[float, typer.Option(min=0, help="Verification of a window.")] = 200.0,
    rtt_ms: Annotated[float, typer.Option(min=0, help="Round trip edge-cloud.")] = 40.0,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each draft.")] = 20,
    keep: Annotated[
        Path | None, typer.Option(help="Keep the answers in this .safetensors, for --data later.")
    ] = None,
    dtype: options.Dtype = "float32",
    json: options.Json = False,
) -> None:
    """Judge drafts by the target's own answers, and predict what each would earn."""
    target_spec, drafts = options.checked_drafts(pair, target, draft)
    from bench.draft import Link
    from bench.draft import run as run_draft

    run_draft(
        list(drafts), data, target_spec, limit, max_new_tokens, Link(verify_ms, rtt_ms),
        repeats, dtype, keep, json,
    )  # fmt: skip


def bench_fr_spec(
    heads: Annotated[
        str,
        typer.Option(
            help="Tokens of the heads to compare with the full one and with the draft's own, the "
            "most frequent ones; comma between."
        ),
    ] = "8192,16384,32768",
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    prompts: options.OwnPrompts = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    window: Annotated[
        int, typer.Option(min=1, max=32, help="Tokens of a window, of which some are accepted.")
    ] = 4,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timings of each head, of eight steps each.")
    ] = 40,
    answers: AnswersFile = None,
    json: options.Json = False,
) -> None:
    """What a head of the most frequent tokens saves in a draft's step and costs in acceptance.

    One draft in int8 with heads of several sizes, interleaved on one core, on
    the target's own greedy answers. Nothing else should run.
    """
    sizes = tuple(_head_size(part) for part in heads.split(","))
    specs = options.checked_models(pair, target, draft)
    from bench.exactness.run import own_prompts
    from bench.fr_spec import Plan
    from bench.fr_spec import run as run_fr_spec

    plan = Plan(
        specs.target, specs.draft, sizes, own_prompts(prompts), max_new_tokens, window, repeats,
        answers,
    )  # fmt: skip
    run_fr_spec(plan, json)


def bench_acceptance(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompts from a benchmark file (docs/bench.md); may be given several times.",
            show_default="20 of this project's",
        ),
    ] = None,
    heads: Annotated[
        str, typer.Option(help="Tokens of further heads of the draft (FR-Spec); comma between.")
    ] = "8192",
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    limit: Annotated[int, typer.Option(min=1, help="Most prompts of each file.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Longest answer, in tokens.")] = 96,
    depth: Annotated[int, typer.Option(min=1, max=16, help="Tokens of a chain.")] = 4,
    tree_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=64, help="Tokens of a tree; may be given several times. 3 and 8."),
    ] = None,
    speculator: options.Speculator = None,
    answers: AnswersFile = None,
    json: options.Json = False,
) -> None:
    """How many drafted tokens a pass accepts: lookup, draft model, FR-Spec, Medusa, EAGLE-3.

    Each drafter replays the target's own greedy answers, in int8, on one core.
    """
    specs = options.checked_models(pair, target, draft)
    sizes = tuple(_head_size(part) for part in heads.split(",")) if heads else ()
    from bench.acceptance import Plan
    from bench.acceptance import run as run_acceptance
    from bench.datasets import in_turns, read_questions
    from bench.exactness.run import own_prompts
    from engines.catalog.speculators import chosen_speculators

    asked = in_turns([read_questions(path, limit) for path in data or ()])
    prompts = tuple(question.prompt for question in asked) or own_prompts(20)
    held = chosen_speculators(options.speculator_setting(speculator) or "", specs.target)
    plan = Plan(
        specs.target, specs.draft, sizes, prompts, max_new_tokens, depth,
        tuple(tree_tokens or (3, 8)),
        tuple(held), answers,
    )  # fmt: skip
    run_acceptance(plan, json)


def _head_size(text: str) -> int:
    """Raises BadParameter where it is none."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise typer.BadParameter(
            f"{text.strip()!r} is no number of tokens; expected e.g. 8192,16384",
            param_hint="--heads",
        )
    return int(text)
