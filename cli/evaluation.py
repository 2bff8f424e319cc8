"""The command `e2sci bench` without a subcommand: methods against each other.

As in `cli.main`, what loads torch is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bus.protocol.errors import ConfigurationError
from cli import options

__all__ = ["evaluate"]

_QUICK_METHODS = "target,auto,sd:2,e2sci"
_QUICK_LIMIT, _QUICK_TOKENS = 2, 24
_DEFAULT_OUT, _QUICK_OUT = Path("runs/bench"), Path("runs/quick")


def evaluate(
    context: typer.Context,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma between them: target (alone), edge-target (alone, on the edge), colocated "
            "(sd with both models in the cloud), auto, sd, fsd:0.1, plc, e2sci:0.15, …",
            show_default="target, sd, fsd, plc, e2sci and its ablations",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Directory of data sets: JSON lines of GSM8K, CommonsenseQA, MMLU, HumanEval.",
            show_default="this project's own prompts, which nobody marks",
        ),
    ] = None,
    datasets: Annotated[
        str | None,
        typer.Option(help="Which of them, comma between.", show_default="every .jsonl there"),
    ] = None,
    rtt_ms: Annotated[str, typer.Option(help="Round trips of the emulated link, in ms.")] = "40",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each data set.", show_default="20")
    ] = None,
    skip: Annotated[
        int,
        typer.Option(min=0, help="Rows to leave out first: a threshold was chosen on them."),
    ] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=8, help="Tokens of each answer.", show_default="96")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 1,
    drafts: Annotated[
        str,
        typer.Option(
            help="Who drafts: model, lookup+model, lookup, or oracle:0.1, right but at one "
            "position in ten."
        ),
    ] = "model",
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="Run all of it at several values of a worker's setting: credit_memory=1,3,5,10; "
            "may be given several times, one after the other."
        ),
    ] = None,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    speculator: options.Speculator = None,
    calibration: Annotated[
        str, typer.Option(help="Of the controller: a file, default (shipped) or none.")
    ] = "default",
    dtype: options.Dtype = "auto",
    paced: Annotated[
        str,
        typer.Option(
            help="Devices to measure as, comma between: none (as it is); STEP,PASS, the least ms "
            "of a draft step and of a target pass; contended, what each takes here while the "
            "other model runs, measured first."
        ),
    ] = "none",
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Run the code that models write, to mark HumanEval: in a process without network "
            "and with limits, but as this user.",
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few prompts and methods, under three minutes.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of rows and report; a run that was cut off goes on there.",
            show_default="runs/bench, or runs/quick",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure this machine: methods against each other, in one run, with a report.

    Real processes, edge and cloud on one core each, methods interleaved on every prompt. Nothing
    else should run. Subcommands measure one thing each.
    """
    if context.invoked_subcommand is not None:
        return
    specs = options.checked_models(pair, target, draft)
    from bench.evaluation.plan import METHODS, Plan, is_baseline
    from bench.evaluation.run import run as run_evaluation
    from bench.paced import split_paced

    asked = methods or (_QUICK_METHODS if quick else ",".join(METHODS))
    names = tuple(dict.fromkeys(name.strip() for name in asked.split(",")))
    plan = Plan(
        files=checked_files(data, datasets),
        methods=tuple(n if is_baseline(n) else options.checked_method(n) for n in names),
        limit=limit or (_QUICK_LIMIT if quick else 20),
        skip=skip,
        max_new_tokens=max_new_tokens or (_QUICK_TOKENS if quick else 96),
        rtts_ms=tuple(options.number(part, 60_000) for part in rtt_ms.split(",")),
        drafts=tuple(_draft(part.strip()) for part in drafts.split(",")),
        variations=_variations(vary or []),
        clients=clients, target=specs.target, draft=specs.draft, calibration=calibration,
        speculator=options.speculator_setting(speculator), dtype=options.checked_dtype(dtype),
        paced=split_paced(paced), run_code=run_code,
    )  # fmt: skip
    run_evaluation(plan, out or (_QUICK_OUT if quick else _DEFAULT_OUT), json)


def checked_files(data: Path | None, datasets: str | None) -> tuple[Path, ...]:
    """Files of the data sets that were asked for; none without `data`.

    Raises:
        ConfigurationError: a data set is not there.
    """
    if data is None:
        if datasets is not None:
            raise ConfigurationError("--datasets chooses among the files of --data DIR")
        return ()
    if datasets is not None:
        files = tuple(data / f"{name.strip()}.jsonl" for name in datasets.split(","))
    else:
        files = tuple(sorted(data.glob("*.jsonl")))
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        there = ", ".join(sorted(path.stem for path in data.glob("*.jsonl"))) or "no .jsonl file"
        what = ", ".join(path.stem for path in missing) or "data set"
        raise ConfigurationError(f"{data} has no {what}; there is {there}")
    return files


def _draft(name: str) -> str:
    from bench.evaluation.plan import ORACLE
    from engines.kinds import DrafterKind

    if name in set(DrafterKind):
        return name
    if name.startswith(ORACLE):
        return f"{ORACLE}{options.number(name.removeprefix(ORACLE), 1):g}"
    raise ConfigurationError(
        f"--drafts {name!r} is unknown; use {', '.join(DrafterKind)} or {ORACLE}RATE, a rate of "
        "errors"
    )


def _variations(vary: list[str]) -> tuple[tuple[str, str], ...]:
    from cloud_worker.settings import CloudSettings
    from controller.settings import ControllerSettings
    from edge_worker.settings import EdgeSettings

    known = {
        name
        for settings in (CloudSettings, ControllerSettings, EdgeSettings)
        for name in settings.model_fields
    }
    found = []
    for text in vary:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigurationError(f"--vary {text!r}: expected NAME=VALUE,VALUE,…")
        if name.strip() not in known:
            raise ConfigurationError(f"--vary {text!r}: no worker has a setting {name.strip()!r}")
        found += [(name.strip(), value.strip()) for value in values.split(",")]
    return tuple(found) or (("", ""),)
