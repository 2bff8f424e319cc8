"""`e2sci bench draft`: how often drafts are right, what a step costs, and their predicted goodput.

Agreement, overlap and divergence are teacher-forced on the target's own greedy answers
(`training.distill.evaluation`). A step is timed on one core, the drafts interleaved. Goodput is a
prediction by G = E[L_acc] / E[T_seg] (docs/method.md, Objective) in lockstep, without overlap:
T_seg = W · step + round trip + verification.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.steps import timed, window_ms
from bus.protocol.errors import ConfigurationError
from engines.torch.cache import KVCache
from engines.torch.draft import LoadedDraft, TrimmedDraft, WholeDraft, load_draft
from engines.torch.drafter import ModelDrafter
from engines.torch.loading import load_causal_lm
from training.distill.answers import answer
from training.distill.evaluation import DraftQuality, evaluate
from training.distill.prompts import read_prompts
from training.distill.records import Record, load_shard, save_shard
from training.distill.training import rows_of_tokens

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)
_GROUP = 32


@dataclass(frozen=True, slots=True)
class Link:
    """What a window meets besides the draft, in milliseconds."""

    verify_ms: float
    rtt_ms: float


@dataclass(frozen=True, slots=True)
class DraftFigures:
    """One draft.

    Attributes:
        step_ms: one draft step on one core, median. weight_bytes: read in it.
        quality: prompt set → measured; "all" is every answer.
        accepted_per_s: accepted tokens a second, predicted on all answers; window: of `WINDOWS`,
            the one for which they are most.
    """

    draft: str
    head_size: int
    weight_bytes: int
    step_ms: float
    quality: dict[str, DraftQuality]
    window: int
    accepted_per_s: float


def run(
    drafts: Sequence[str], data: Sequence[Path], target: str, limit: int, max_new_tokens: int,
    link: Link, repeats: int, dtype: str, keep: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure and print: tables for people, one JSON object a draft for programs."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("answers", total=None)
        records = read_records(data, target, limit, max_new_tokens, dtype)
        if keep is not None:
            save_shard(keep, records)
        progress.update(task, total=len(records) * len(drafts), description="drafts")
        loaded = [load_draft(spec, dtype) for spec in drafts]
        qualities = [measure(draft, records, lambda: progress.advance(task)) for draft in loaded]
        progress.update(task, total=None, description="steps")
        steps = step_times([ModelDrafter(draft) for draft in loaded], repeats)
    figures = [
        assess(spec, draft, quality, step_ms, link)
        for spec, draft, quality, step_ms in zip(drafts, loaded, qualities, steps, strict=True)
    ]
    if as_json:
        for row in figures:
            print(json.dumps(asdict(row) | asdict(link)))
    else:
        _print(figures, link)


def read_records(
    data: Sequence[Path], target: str, limit: int, max_new_tokens: int, dtype: str
) -> list[Record]:
    """At most `limit` answers of each file: those in a shard as they are, prompts answered now.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    records: list[Record] = []
    model = None
    for path in data:
        if path.suffix == ".safetensors":
            records += load_shard(path)[:limit]
            continue
        model = model or load_causal_lm(target, dtype)
        prompts = read_prompts(path, model, model.context_length - max_new_tokens)[:limit]
        for begin in range(0, len(prompts), _GROUP):
            records += answer(model, prompts[begin : begin + _GROUP], max_new_tokens)
    if not records:
        raise ConfigurationError("no answers to judge a draft by; give --data FILE")
    return records


def measure(
    draft: LoadedDraft, records: Sequence[Record], tick: Callable[[], None] = lambda: None
) -> dict[str, DraftQuality]:
    """Prompt set → quality of a draft of any kind on these answers."""
    network = draft.network
    assert isinstance(network, WholeDraft | TrimmedDraft)  # what `load_draft` gives
    vocab = torch.arange(network.head_size) if network.vocab is None else (
        torch.from_numpy(network.vocab)
    )  # fmt: skip

    def logits(record: Record) -> torch.Tensor:
        text = torch.cat([record.prompt, record.answer])[:-1].long()
        return network.logits(text.to(draft.device), KVCache(), record.answer.numel())

    vocab_size = max(draft.vocab_size, 1 + max(int(r.top_ids.max()) for r in records))
    rows = rows_of_tokens(vocab, vocab_size)
    return evaluate(logits, vocab, rows, records, WINDOWS, tick)


def assess(
    spec: str, draft: LoadedDraft, quality: dict[str, DraftQuality], step_ms: float, link: Link
) -> DraftFigures:
    """Choose the window and predict what it earns."""
    accepted = quality["all"].accepted
    earned = {
        window: accepted_per_s(accepted[window], window, step_ms, link) for window in accepted
    }
    window = max(earned, key=lambda w: earned[w])
    network = draft.network
    return DraftFigures(
        spec, network.head_size, network.weight_bytes, step_ms, quality, window, earned[window]
    )


def accepted_per_s(accepted: float, window: int, step_ms: float, link: Link) -> float:
    """G = E[L_acc] / E[T_seg] in lockstep, accepted tokens a second (docs/method.md, Objective)."""
    return 1e3 * accepted / (window * step_ms + link.rtt_ms + link.verify_ms)


def step_times(drafts: Sequence[ModelDrafter], repeats: int) -> list[float]:
    """Milliseconds of a step of each draft, after `CONTEXT` tokens: medians, interleaved."""
    return [statistics.median(samples) for samples in timed(drafts, repeats, window_ms)]


def _print(figures: Sequence[DraftFigures], link: Link) -> None:
    console = Console()
    for row in figures:
        table = Table(title=f"{row.draft}: head of {row.head_size} tokens (measured)")
        table.add_column("answers to")
        for heading in ("tokens", "agreement", "overlap", "JSD nats", "accepted of 4", "of 8"):
            table.add_column(heading, justify="right")
        for name, quality in row.quality.items():
            table.add_row(
                name, str(quality.num_tokens), f"{quality.agreement:.3f}",
                f"{quality.overlap:.3f}", f"{quality.mean_jsd:.3f}",
                f"{quality.accepted[4]:.2f}", f"{quality.accepted[8]:.2f}",
            )  # fmt: skip
        console.print(table)
        console.print(
            f"one step on one core {row.step_ms:.1f} ms (measured); with {link.verify_ms:g} ms a "
            f"verification and {link.rtt_ms:g} ms round trip: {row.accepted_per_s:.2f} "
            f"accepted tokens/s in windows of {row.window} (predicted)",
            soft_wrap=True,
        )
