"""`bench/acceptance` on scripted and tiny drafters: what counts as accepted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.acceptance import (
    Constant,
    Drafting,
    Tokens,
    accepted_path,
    chain,
    figures_of,
    most_frequent_token,
    replay,
)
from cli.main import app
from decoding.engine import NO_IDS, ProposedTree
from engines.lookup import LookupDrafter
from engines.torch.oracle import RecordedAnswer
from tests.engines.tiny import save_tiny

NO_PROBS = np.empty(0, np.float16)


def tree(tokens: Sequence[int], parents: Sequence[int]) -> ProposedTree:
    return ProposedTree(tuple(tokens), tuple(parents), NO_IDS, NO_PROBS)


class Scripted:
    """Proposes the same tree again and again, and keeps what was committed."""

    def __init__(self, proposed: ProposedTree, depth: int) -> None:
        self.proposed, self.depth = proposed, depth
        self.text: Tokens = ()

    def begin(self, prompt: Tokens) -> None:
        self.text = prompt

    def propose(self) -> ProposedTree:
        return self.proposed

    def commit(self, tokens: Tokens, tree: ProposedTree, path: Sequence[int]) -> None:
        assert tuple(tree.tokens[index] for index in path) == tokens[:-1]
        self.text += tokens


def test_the_path_follows_the_text_through_the_tree() -> None:
    forked = tree((7, 8, 9, 8, 5), (-1, -1, 0, 1, 3))
    assert accepted_path(forked, (8, 8, 5, 1)) == [1, 3, 4]
    assert accepted_path(forked, (7, 9, 5)) == [0, 2]
    assert accepted_path(forked, (9,)) == []
    assert accepted_path(tree((), ()), (9,)) == []


def test_a_pass_commits_what_is_equal_and_the_targets_own_token() -> None:
    """Two of three, then none; the last pass could not have accepted three, and is not counted."""
    proposer = Scripted(chain((1, 2, 3)), 3)
    done = replay(proposer, [RecordedAnswer((9,), (1, 2, 4, 4, 5, 1, 2))])
    assert done.accepted == [[2, 0]]
    assert proposer.text == (9, 1, 2, 4, 4)
    assert len(done.draft_ms) == 2


def test_the_mean_is_over_passes_and_not_over_answers() -> None:
    proposer = Scripted(chain((1,)), 1)
    done = replay(proposer, [RecordedAnswer((9,), (1, 0, 1, 0, 0)), RecordedAnswer((9,), (0, 0))])
    figures = figures_of("scripted", "chain of 1", done)
    assert figures.passes == 3
    assert figures.accepted.value == pytest.approx(2 / 3)


def test_baselines_know_the_last_token_and_the_most_frequent_one() -> None:
    answers = [RecordedAnswer((4,), (4, 4, 5, 5, 5, 5, 4, 4))]
    assert most_frequent_token(answers) == 4
    assert replay(Constant(2), answers).accepted == [[2, 2]]
    assert replay(Constant(2, 5), answers).accepted == [[0, 0, 2, 1]]


def test_a_drafter_forgets_what_was_rejected() -> None:
    """Lookup foresees a text that repeats, but for the token that breaks off."""
    drafting = Drafting(LookupDrafter(40, 64), 3)
    text = (*(1, 2, 3, 4) * 3, 9, *(1, 2, 3, 4) * 2)
    done = replay(drafting, [RecordedAnswer((1, 2, 3, 4), text)])
    assert sum(done.accepted[0]) == 6
    assert min(done.accepted[0]) == 0
    assert drafting.drafter.length(drafting._cache) <= len(drafting._text)


def test_the_command_gives_a_line_for_each_drafter(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "tiny"))
    done = CliRunner().invoke(
        app,
        ["bench", "acceptance", "--target", model, "--draft", model, "--heads", "",
         "--max-new-tokens", "12", "--answers", str(tmp_path / "answers.jsonl"), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = {row["drafter"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["lookup"]["shape"] == "chain of 4"
    (draft,) = (row for name, row in rows.items() if name.startswith("draft"))
    assert draft["accepted"]["value"] == 4.0, "the draft is the target"
    assert {row["source"] for row in rows.values()} == {"measured"}
