"""`e2sci bench acceptance`: how many drafted tokens a pass accepts, by who drafts them.

The target's own greedy answers are recorded. Each drafter replays them in lockstep: it drafts after
the text, the tokens that equal the recorded ones are accepted, the target's own token follows, and
it drafts again. Exact verification at temperature 0 accepts just these. A speculator reads the
target's hidden states, so with one the passes over text and tree are run as well.

    accepted a pass   mean over passes that could have accepted everything drafted
    tokens a pass     that + 1: the target's own token
    drafting ms       median time to draft once, on one core

Two baselines show what knowing nothing gives: `repeat` drafts the last token again, `unigram` the
most frequent token of these very answers. Nothing here is padded, paced or predicted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.fr_spec import with_heads
from bench.passes import GREEDY
from bench.progress import counting_bar
from bench.ranges import Interval, paired_interval
from bench.recorded import Tick, recorded_answers
from decoding.engine import NO_ROWS, Drafter, ProposedTree, Segment
from decoding.trees import ROOT, children
from engines.lookup import LookupDrafter
from engines.torch.heads import load_wide
from engines.torch.oracle import RecordedAnswer
from engines.torch.speculators.base import BRANCHES
from engines.torch.speculators.file import MEDUSA
from engines.torch.target import TargetModel

_NEVER: frozenset[int] = frozenset()

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        draft: spec of a draft model, with its own head and with `heads` of so many tokens, the most
            frequent ones (FR-Spec).
        depth: tokens of a chain. tree_tokens: of trees, for the speculators.
        speculators: their directories.
        answers: file of recorded answers; what is missing there is written, an answer at a time.
    """

    target: str
    draft: str
    heads: tuple[int, ...]
    prompts: tuple[str, ...]
    max_new_tokens: int
    depth: int = 4
    tree_tokens: tuple[int, ...] = (3, 8)
    speculators: tuple[Path, ...] = ()
    answers: Path | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """One drafter.

    Attributes:
        shape: `chain of 4`, `tree of 8`.
        passes: that count. accepted: drafted tokens a pass, with its 95 % interval, by bootstrap
            over answers.
        draft_ms: median of a draft.
    """

    drafter: str
    shape: str
    passes: int
    accepted: Interval
    draft_ms: float


class Proposer(Protocol):
    """A drafter that replays an answer.

    Attributes:
        depth: most tokens of a path.
    """

    depth: int

    def begin(self, prompt: Tokens) -> None:
        """A new answer."""
        ...

    def propose(self) -> ProposedTree:
        """Draft after the text so far."""
        ...

    def commit(self, tokens: Tokens, tree: ProposedTree, path: Sequence[int]) -> None:
        """The text goes on with `tokens`: those of the tree on `path`, and the target's own."""
        ...


def chain(tokens: Sequence[int]) -> ProposedTree:
    """One token after the other."""
    return ProposedTree(tuple(tokens), tuple(range(-1, len(tokens) - 1)), *NO_ROWS)


def accepted_path(tree: ProposedTree, text: Sequence[int]) -> list[int]:
    """Indices of the tree's tokens that equal the text, from its first token on."""
    path, below = list[int](), children(tree.parents)
    for token in text:
        nodes = below.get(path[-1] if path else ROOT, [])
        found = next((node for node in nodes if tree.tokens[node] == token), None)
        if found is None:
            break
        path.append(found)
    return path


@dataclass(slots=True)
class Constant:
    """A chain of one token: a given one, or the text's last one where `token` is None."""

    depth: int
    token: int | None = None
    _last: int = 0

    def begin(self, prompt: Tokens) -> None:
        self._last = prompt[-1]

    def propose(self) -> ProposedTree:
        return chain([self._last if self.token is None else self.token] * self.depth)

    def commit(self, tokens: Tokens, tree: ProposedTree, path: Sequence[int]) -> None:
        del tree, path
        self._last = tokens[-1]


@dataclass(slots=True)
class Drafting:
    """A `decoding.engine.Drafter`, in chains."""

    drafter: Drafter[Any]
    depth: int
    _cache: Any = None
    _text: Tokens = ()

    def begin(self, prompt: Tokens) -> None:
        if self._cache is not None:
            self.drafter.close(self._cache)
        self._cache, self._text = self.drafter.open(GREEDY, prompt), prompt
        if len(prompt) > 1:
            self.drafter.prefill(self._cache, prompt[:-1])

    def propose(self) -> ProposedTree:
        feed = self._text[self.drafter.length(self._cache) :]
        drafted = self.drafter.draft(self._cache, feed, self.depth, _NEVER, lambda: False)
        return chain(drafted.tokens)

    def commit(self, tokens: Tokens, tree: ProposedTree, path: Sequence[int]) -> None:
        del tree
        right = len(self._text) + len(path)
        self._text += tokens
        self.drafter.keep(self._cache, min(right, self.drafter.length(self._cache)))


@dataclass(slots=True)
class Speculating:
    """A speculator of the target."""

    target: TargetModel
    kind: str
    most: int
    depth: int
    branches: int
    _cache: Any = None
    _text: Tokens = ()

    def begin(self, prompt: Tokens) -> None:
        if self._cache is not None:
            self.target.close(self._cache)
        self._cache, self._text = self.target.open(GREEDY, self.kind), prompt
        self.target.prefill(self._cache, prompt[:-1])

    def propose(self) -> ProposedTree:
        self.target.speculator(self.kind).branches = self.branches
        return self.target.propose(self._cache, self._feed, self.most)

    def commit(self, tokens: Tokens, tree: ProposedTree, path: Sequence[int]) -> None:
        feed = self._feed
        begin = len(feed) - 1
        parents = (*range(-1, begin), *(begin + 1 + parent for parent in tree.parents))
        self.target.run([Segment(self._cache, (*feed, *tree.tokens), (), parents)])
        held = len(self._text) - len(feed)
        kept = (*range(len(feed)), *(len(feed) + index for index in path))
        self.target.keep(self._cache, held, kept)
        self._text += tokens

    @property
    def _feed(self) -> Tokens:
        return self._text[self.target.length(self._cache) :]


@dataclass(slots=True)
class Replay:
    """What a proposer has done.

    Attributes:
        accepted: of each answer, tokens accepted by each pass that counts. draft_ms: of each draft.
    """

    accepted: list[list[int]] = field(default_factory=list)
    draft_ms: list[float] = field(default_factory=list)


def replay(
    proposer: Proposer, answers: Sequence[RecordedAnswer], tick: Tick = lambda: None
) -> Replay:
    """Replay the answers. A pass whose answer ends within reach of the draft does not count: the
    end would cut what it could accept."""
    done = Replay()
    for recorded in answers:
        proposer.begin(recorded.prompt)
        accepted, position = list[int](), 0
        while position + proposer.depth < len(recorded.answer):
            began = time.perf_counter()
            tree = proposer.propose()
            done.draft_ms.append(1e3 * (time.perf_counter() - began))
            path = accepted_path(tree, recorded.answer[position:])
            accepted.append(len(path))
            end = position + len(path) + 1
            proposer.commit(recorded.answer[position:end], tree, path)
            position = end
        done.accepted.append(accepted)
        tick()
    return done


def figures_of(drafter: str, shape: str, done: Replay) -> Figures:
    """Add up: accepted tokens over passes, by bootstrap over answers."""
    counted = [answer for answer in done.accepted if answer]
    sums = np.array([sum(answer) for answer in counted], np.float64)
    passes = np.array([len(answer) for answer in counted], np.float64)
    accepted = paired_interval((sums, passes), _mean_a_pass)
    return Figures(drafter, shape, int(passes.sum()), accepted, statistics.median(done.draft_ms))


def _mean_a_pass(sums: Any, passes: Any, axis: int = -1) -> Any:
    return sums.sum(axis=axis) / passes.sum(axis=axis)


def most_frequent_token(answers: Sequence[RecordedAnswer]) -> int:
    """Of all answers; of equals the lowest."""
    counts = Counter(token for recorded in answers for token in recorded.answer)
    return min(counts, key=lambda token: (-counts[token], token))


def proposers(
    plan: Plan, target: TargetModel, answers: Sequence[RecordedAnswer]
) -> list[tuple[str, str, Proposer]]:
    """(drafter, shape, proposer) of each row of the table.

    Raises:
        ModelError: a draft cannot be loaded.
    """
    depth, shape = plan.depth, f"chain of {plan.depth}"
    rows: list[tuple[str, str, Proposer]] = [
        ("repeat the last token", shape, Constant(depth)),
        ("most frequent token", shape, Constant(depth, most_frequent_token(answers))),
    ]
    lookup = LookupDrafter(target.vocab_size, target.context_length, always=True)
    rows.append(("lookup", shape, Drafting(lookup, depth)))
    for drafter in with_heads(load_wide(plan.draft), plan.heads):
        name = f"draft {plan.draft}, head of {len(drafter.vocab):,} tokens"
        rows.append((name, shape, Drafting(drafter, depth)))
    for kind in target.speculators:
        most = 4 if kind == MEDUSA else depth
        lengths = range(1, most + 1) if kind == MEDUSA else (depth,)
        rows += [
            (kind, f"chain of {n}", Speculating(target, kind, n, n, branches=1)) for n in lengths
        ]
        rows += [
            (kind, f"tree of {n}", Speculating(target, kind, n, min(n, most), BRANCHES))
            for n in plan.tree_tokens
        ]
    return rows


def run(plan: Plan, as_json: bool) -> list[Figures]:
    """Measure and print: a table for people, one JSON object a drafter for programs.

    Raises:
        ModelError: a model cannot be loaded.
        ConfigurationError: the file of answers cannot be read.
    """
    with counting_bar() as progress:
        task = progress.add_task("the target's answers", total=len(plan.prompts))
        target = TargetModel.load(plan.target, "int8")
        answers = recorded_answers(
            target, plan.prompts, plan.max_new_tokens, plan.answers, lambda: progress.advance(task)
        )
        target.equip(plan.speculators)
        rows = proposers(plan, target, answers)
        progress.reset(task, total=len(answers) * len(rows), description="replaying")
        torch.set_num_threads(1)
        figures = [
            figures_of(name, shape, replay(proposer, answers, lambda: progress.advance(task)))
            for name, shape, proposer in rows
        ]
    if as_json:
        for row in figures:
            line = {"target": plan.target, **msgspec.to_builtins(row), "source": "measured"}
            print(json.dumps(line))
    else:
        _print(figures, plan, len(answers))
    return figures


def _print(figures: Sequence[Figures], plan: Plan, num_answers: int) -> None:
    table = Table(title=f"{plan.target}, int8, {num_answers} answers (measured)")
    for heading in ("drafter", "drafts", "passes", "accepted a pass", "tokens a pass", "draft ms"):
        table.add_column(heading, justify="left" if heading == "drafter" else "right")
    for row in figures:
        table.add_row(
            row.drafter, row.shape, str(row.passes), str(row.accepted),
            f"{row.accepted.value + 1:.2f}", f"{row.draft_ms:.2f}",
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)
