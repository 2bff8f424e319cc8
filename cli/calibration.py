"""The command `e2sci calibrate`.

As in `cli.main`, what loads torch is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options

__all__ = ["calibrate"]


def calibrate(
    out: Annotated[
        Path, typer.Option(help="Directory of the result; a run that was cut off goes on there.")
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Prompts: JSON lines of GSM8K, CommonsenseQA, MMLU, HumanEval, MBPP, or with a "
            "field prompt; may be given several times, then files take turns."
        ),
    ],
    samples: Annotated[int, typer.Option(min=1, help="How many prompts to answer.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 96,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    dtype: options.Dtype = "auto",
    link: options.Link = None,
    simulate_link: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Price the windows recorded under --out for a link with this round trip in ms, "
            "without running the models again.",
        ),
    ] = None,
    loss: Annotated[
        float,
        typer.Option(min=0, help="Nats of log-likelihood that a token may lose against exact."),
    ] = 0.05,
    token_price: Annotated[
        float | None,
        typer.Option(min=0, help="γ: ms that a token is worth.", show_default="what one takes"),
    ] = None,
    energy_price: Annotated[
        float, typer.Option(min=0, help="Weighs energy against latency: ms that a joule costs.")
    ] = 0.0,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with this calibration's table; shipped: with the shipped one."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Find out what this pair does at each threshold, and train the predictor on that.

    Writes records.parquet (a row for each window), and calibration.safetensors for the controller
    (E2SCI_CALIBRATION).
    """
    from bench.calibrate import Aims, CalibrationPlan
    from bench.calibrate import run as run_calibration
    from controller.policies import SHIPPED
    from engines.catalog.registry import chosen_models

    plan = CalibrationPlan(
        tuple(data), samples, max_new_tokens, *chosen_models(pair, target, draft),
        options.checked_dtype(dtype), options.checked_link(link),
    )  # fmt: skip
    other = SHIPPED if against == Path("shipped") else against
    aims = Aims(loss, token_price, energy_price, simulate_link, other)
    run_calibration(plan, aims, out, json)
