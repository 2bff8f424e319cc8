"""The commands `e2sci train …`: speculators for a target.

As in `cli.main`, what loads torch is imported where it is used.
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import options
from cli.group import INTERRUPTED, say

app = typer.Typer(no_args_is_help=True)

Out = Annotated[
    Path, typer.Option(help="Directory of the speculator; a run that was cut off goes on there.")
]
Prompts = Annotated[
    list[Path] | None,
    typer.Option(
        help='Prompts that the target answers: .jsonl with {"prompt": …} a line, or .txt with a '
        "prompt a line; may be given several times.",
        show_default="the target makes up its own",
    ),
]
Answers = Annotated[
    Path | None,
    typer.Option(
        help="Directory of answers and hidden states, which other trainings may share.",
        show_default="OUT/work",
    ),
]
Tokens = Annotated[int, typer.Option(min=200, help="Answer tokens to learn from, at least.")]
MaxNewTokens = Annotated[int, typer.Option(min=8, help="Longest answer, in tokens.")]
HeadSize = Annotated[
    int, typer.Option(min=16, help="Tokens it can propose, the most frequent ones.")
]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the training.")]
BatchTokens = Annotated[int, typer.Option(min=16, help="Answer tokens of a step.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")]
Seed = Annotated[int, typer.Option(help="Of prompts, their order and training.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


@app.command()
def medusa(
    out: Out,
    target: options.Target = None,
    heads: Annotated[int, typer.Option(min=1, max=8, help="Heads, a token each.")] = 4,
    prompts: Prompts = None,
    answers: Answers = None,
    tokens: Tokens = 100_000,
    max_new_tokens: MaxNewTokens = 128,
    head_size: HeadSize = 8192,
    steps: Steps = 600,
    batch_tokens: BatchTokens = 512,
    learning_rate: Annotated[float, typer.Option(min=0, help="AdamW's, at its highest.")] = 5e-3,
    dtype: options.Dtype = "auto",
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    json: options.Json = False,
) -> None:
    """Train Medusa's heads for a target, from its own answers."""
    _train(
        "medusa", out, target, heads, prompts, answers, tokens, max_new_tokens, head_size, steps,
        batch_tokens, learning_rate, dtype, device, threads, seed, json,
    )  # fmt: skip


@app.command()
def eagle3(
    out: Out,
    target: options.Target = None,
    unroll: Annotated[
        int, typer.Option(min=1, max=8, help="Drafted tokens that the training unrolls.")
    ] = 4,
    prompts: Prompts = None,
    answers: Answers = None,
    tokens: Tokens = 100_000,
    max_new_tokens: MaxNewTokens = 128,
    head_size: HeadSize = 8192,
    steps: Steps = 500,
    batch_tokens: BatchTokens = 512,
    learning_rate: Annotated[float, typer.Option(min=0, help="AdamW's, at its highest.")] = 1e-3,
    dtype: options.Dtype = "auto",
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    json: options.Json = False,
) -> None:
    """Train EAGLE-3's draft layer for a target, from its own answers."""
    _train(
        "eagle3", out, target, unroll, prompts, answers, tokens, max_new_tokens, head_size, steps,
        batch_tokens, learning_rate, dtype, device, threads, seed, json,
    )  # fmt: skip


def _train(
    kind: Literal["medusa", "eagle3"], out: Path, target: str | None, depth: int,
    prompts: list[Path] | None, answers: Path | None, tokens: int, max_new_tokens: int,
    head_size: int, steps: int, batch_tokens: int, learning_rate: float, dtype: str, device: str,
    threads: int, seed: int, json: bool,
) -> None:  # fmt: skip
    specs = options.checked_models(None, target, None)
    import torch

    from cli.distill import TrainingBar, print_report
    from engines.torch.target import TargetModel
    from training.speculators.corpus import CorpusSettings
    from training.speculators.run import TrainSettings, train

    if threads:
        torch.set_num_threads(threads)
    corpus = CorpusSettings(
        answers or out / "work", tuple(prompts or ()), tokens, max_new_tokens, seed
    )
    settings = TrainSettings(
        kind, out, corpus, depth, head_size, steps, batch_tokens, learning_rate, seed=seed
    )
    try:
        with TrainingBar() as bar:
            bar.phase("loading")
            report = train(settings, TargetModel.load(specs.target, dtype, device), bar)
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on with {out} from the last step")
        raise typer.Exit(INTERRUPTED) from None
    if json:
        import msgspec

        print(json_module.dumps({"speculator": str(out), **msgspec.to_builtins(report)}))
        return
    print_report(report, out)
