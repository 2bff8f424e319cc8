"""The model card of a speculator: what it is, what it was trained on, what it foresees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.speculators.run import Report

_NAMES = {"medusa": "Medusa heads", "eagle3": "An EAGLE-3 draft layer"}
_SOURCES = {
    "medusa": "Medusa, Cai et al., 2024 (arXiv 2401.10774)",
    "eagle3": "EAGLE-3, Li et al., 2025 (arXiv 2503.01840)",
}


def write_card(directory: Path, report: Report) -> None:
    """Write README.md beside the weights."""
    settings = report.settings
    prompts = ", ".join(Path(path).name for path in settings["prompts"])
    asked = prompts or "prompts that the target made up itself"
    rows = [("this speculator", report.final), *report.others.items()]
    table = "\n".join(
        f"| {name} | {quality.accepted:.2f} | "
        + " ".join(f"{share:.2f}" for share in quality.right)
        + " |"
        for name, quality in rows
    )
    curve = "\n".join(
        f"| {point.step} | {point.loss:.2f} | {point.accepted:.2f} |" for point in report.curve
    )
    (directory / "README.md").write_text(
        f"""# {_NAMES[report.kind]} for {report.target}

After {_SOURCES[report.kind]}. Load it with `e2sci up --speculator DIR`; it drafts for this
target alone, and only its speed depends on these weights: an exact method's text is the target's.

- Learnt from {report.train_tokens:,} tokens of the target's own greedy answers to {asked}.
- {report.steps} steps, {report.seen_tokens:,} tokens seen, {report.seconds / 60:.1f} minutes of
  training, seed {settings["seed"]}.
- It can propose {settings["head_size"]:,} tokens, the most frequent ones.

Foreseen of {report.final.depth} tokens, on answers held out ({report.final.positions:,} positions,
measured): the mean of a chain, and the share that is right at each place of it.

| | accepted | right at place 0, 1, … |
|---|---|---|
{table}

Learning curve, on some of the held-out answers:

| step | loss | accepted |
|---|---|---|
{curve}
""",
        "utf-8",
    )
