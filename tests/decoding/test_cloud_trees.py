"""A tree's pass at the cloud: what is kept, sent and asked for next."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from bus.protocol.messages import Ack, OpenSession
from decoding import methods
from decoding.cloud_events import (
    AckArrived,
    Crop,
    Forward,
    OpenArrived,
    Prefill,
    ReportTree,
    RowsReady,
    Send,
)
from decoding.cloud_trees import planned
from decoding.engine import NO_ROWS, ProposedTree
from tests.decoding.cloud_session import OPEN, PREFILLED, Cloud, feedback, row

MEDUSA = methods.medusa.METHOD
#    1 2 3 ─► 10 (0), 11 (1);   10 ─► 12 (2);   12 ─► 13 (3)
TREE = ProposedTree((10, 11, 12, 13), (-1, -1, 0, 2), *NO_ROWS)


class Treed(Cloud):
    """A session whose passes carry `TREE`."""

    def judges(self, *own: int, tree: ProposedTree = TREE) -> tuple[Any, ...]:
        """The pass has ended; in its rows the target would itself write these tokens."""
        self.made = planned(self.state, self.pass_begins(), tree)
        rows = tuple(row(token) for token in own)
        return self.tell(RowsReady(self.state.job, self.made, rows, 10.0, 115.0, 1.0))


def treed(message: OpenSession = OPEN, **limits: Any) -> Treed:
    made = Treed(message, MEDUSA)
    made.state = replace(made.state, limits=replace(made.state.limits, **limits))
    made.tell(PREFILLED)
    return made


def sent(start: int, tokens: tuple[int, ...]) -> Send:
    return feedback(
        start, tokens, number=None, held_ms=0.0, queue_ms=0.0, pass_tokens=5, proposed=4, depth=3
    )


def test_the_accepted_path_stays_in_the_cache_and_the_own_token_begins_the_next_pass() -> None:
    session = treed()
    crop, answer, report, forward = session.judges(10, 12, 0, 50, 0)
    assert session.made.feed == (3, 10, 11, 12, 13)
    assert session.made.parents == (-1, 0, 0, 1, 3)
    assert crop == Crop(2, (0, 1, 3))
    assert answer == sent(3, (10, 12, 50))
    assert isinstance(report, ReportTree)
    assert forward == Forward(3)
    assert (session.text, session.state.num_run) == ((1, 2, 3, 10, 12, 50), 5)
    assert session.state.kept is None
    assert session.pass_begins().feed == (50,)


@pytest.mark.parametrize(
    ("own", "text", "crop"),
    [
        ((60, 0, 0, 0, 0), (60,), Crop(2, (0,))),
        ((11, 0, 61, 0, 0), (11, 61), Crop(2, (0, 2))),
        ((10, 12, 0, 13, 62), (10, 12, 13, 62), Crop(2, (0, 1, 3, 4))),
    ],
)
def test_any_path_may_be_accepted(own: tuple[int, ...], text: tuple[int, ...], crop: Crop) -> None:
    session = treed()
    assert session.judges(*own)[:2] == (crop, sent(3, text))
    assert session.state.num_run == len(session.text) - 1


def test_an_end_token_on_the_path_ends_the_text_and_is_not_run() -> None:
    session = treed(eos=frozenset({12}))
    effects = session.judges(10, 12, 0, 13, 62)
    assert effects[:2] == (Crop(2, (0, 1)), sent(3, (10, 12)))
    assert len(effects) == 3, "nothing goes on"
    assert session.state.num_run == len(session.text) - 1


def test_a_tree_leaves_room_for_the_own_token() -> None:
    for left, most in ((1, 0), (2, 1), (5, 4), (40, 8)):
        session = treed(replace(OPEN, max_new_tokens=left), tree_tokens=8)
        assert session.pass_begins().most == most
    assert treed(tree_tokens=0).pass_begins().most == 0


def test_an_empty_tree_is_a_pass_of_the_target_alone() -> None:
    session = treed()
    empty = ProposedTree((), (), *NO_ROWS)
    assert planned(session.state, session.pass_begins(), empty).tree is None


def test_reopened_while_a_tree_runs_the_pass_is_void_and_the_tree_is_cut_off() -> None:
    session = treed()
    made = planned(session.state, session.pass_begins(), TREE)
    job = session.state.job
    effects = session.tell(OpenArrived(replace(OPEN, incarnation=2), 2))
    assert effects[0] == Crop(2)
    assert isinstance(effects[-1], Prefill)
    rows = tuple(row(token) for token in (10, 12, 0, 50, 0))
    assert session.tell(RowsReady(job, made, rows, 10.0, 115.0)) == ()
    assert session.text == (1, 2, 3)


def test_the_newest_acknowledgement_sets_the_threshold() -> None:
    session = treed()
    assert session.state.threshold == -1.0
    for number, threshold, expected in (
        (2, 0.2, 0.2),
        (1, 0.1, 0.2),
        (3, None, 0.2),
        (4, 0.0, 0.0),
    ):
        session.tell(AckArrived(Ack(1, number, 3, threshold=threshold), 100.0))
        assert session.state.threshold == expected
