"""Passes of one session at the cloud that run a proposed tree: what their rows decide.

    cache    … │ last token │ tree          after the pass
    keep     … │ last token │ path          the accepted path is in the cache, the target's own
                                            token after it is not: the next pass begins with it

No row is kept: the target's own token follows every path at once, with lossy rules too. A path that
ends with an end token is followed by nothing, and that token takes the place of the own one.
"""

from __future__ import annotations

from msgspec.structs import replace

from decoding.cloud_events import Crop, ReportTree, RowsReady
from decoding.cloud_passes import committed, go_on
from decoding.cloud_state import CloudState, Ran, Step, clipped
from decoding.engine import ProposedTree
from decoding.tree_reports import JudgedTree
from decoding.trees import TreeJudge, with_tree
from decoding.verification import Plan


def tree_judge(state: CloudState, tree: ProposedTree) -> TreeJudge:
    """Of a tree after the session's text."""
    return TreeJudge(
        rule=state.method.acceptance,
        tree=tree,
        sampling=state.sampling,
        start=len(state.tokens),
        threshold=clipped(state, state.threshold),
    )


def planned(state: CloudState, plan: Plan, tree: ProposedTree) -> Plan:
    """`plan` with a tree that has been proposed for it; as it is where that is empty."""
    return with_tree(plan, tree_judge(state, tree)) if tree.tokens else plan


def judge_tree(state: CloudState, ready: RowsReady) -> Step:
    """Commit the accepted path and the target's own token after it."""
    done, tree = ready.plan, ready.plan.tree
    assert tree is not None
    ran = Ran(len(done.feed), ready.verify_ms, ready.now_ms, ready.share)
    judge = tree_judge(state, tree)
    walked = judge.walk(ready.rows, state.limits.eos)
    judged = JudgedTree(judge, walked, ready.rows, ready.verify_ms, ready.share)
    own = () if walked.own is None else (walked.own,)
    kept = walked.path if own else walked.path[:-1]
    num_text = len(done.feed) - len(tree.tokens)
    path = (*range(num_text), *(num_text + node for node in kept))
    crop = Crop(state.num_run, path)
    state = replace(state, num_run=state.num_run + len(path), pass_ms=state.timed(ran.verify_ms))
    new = (*(tree.tokens[node] for node in walked.path), *own)
    rows = tuple(ready.rows[place + 1] for place in judged.places)[: len(new)]
    state, effects = committed(state, new, ran, rows, proposed=len(tree.tokens), depth=judged.depth)
    return go_on(state, (crop, *effects, ReportTree(judged)))
