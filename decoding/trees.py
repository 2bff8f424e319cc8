"""A tree of proposed tokens, and how far its rows accept it. Pure.

    text ──► a ──► c ──► d         rows: one after the text's last token, one after each node
     └─────► b ──► e

At each place the target's own token is known from the row there. A walk goes on to the child that
is this token. Where there is none, a rule may accept another: the first child, which the speculator
holds likeliest, or with a rule that looks at every child (`AcceptanceRule.every_child`) any of
them; then the longest path is taken, and of equals the one that keeps to the target's own tokens
and then to likelier children [ours]. Where the walk stops, the target's own token follows.

A lossless rule accepts nothing but own tokens, so the text is the target's for any proposal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bus.protocol.arrays import PROB_DTYPE, TOKEN_DTYPE, Float16Array, Int32Array
from decoding.engine import NO_IDS, ProposedTree, TargetRow
from decoding.methods.base import AcceptanceRule, Proposal
from decoding.sampling import SamplingParams
from decoding.verification import Plan, own_token

ROOT = -1
"""The place after the text, before every node."""
_NO_PROBS: Float16Array = np.empty(0, PROB_DTYPE)

Accepts = Callable[[int, TargetRow], bool]
"""Whether a rule accepts a node by the row of its parent."""


class Walked(Struct, frozen=True):
    """An accepted path.

    Attributes:
        path: nodes, each a child of the one before.
        own: the target's own token after them; None where the path ends the answer.
    """

    path: tuple[int, ...]
    own: int | None


def children(parents: Sequence[int]) -> dict[int, list[int]]:
    """Of each place that has any, in their order."""
    found: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        found.setdefault(parent, []).append(node)
    return found


def depths(parents: Sequence[int]) -> list[int]:
    """Of each node: 1 where it follows the text."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent == ROOT else found[parent] + 1)
    return found


def walk(
    tree: ProposedTree,
    rows: Sequence[TargetRow],
    accepts: Accepts,
    every_child: bool = False,
    eos: frozenset[int] = frozenset(),
) -> Walked:
    """The accepted path of a tree.

    Args:
        rows: n + 1, the first after the text, then one after each node.
        accepts: asked only about nodes that are not the target's own token.
        eos: a path ends with one of these.
    """
    below = children(tree.parents)

    def following(place: int) -> list[int]:
        """The accepted children, the best first."""
        row, nodes = rows[place + 1], below.get(place, [])
        if place != ROOT and tree.tokens[place] in eos:
            return []
        own = own_token(row)
        chosen = next((node for node in nodes if tree.tokens[node] == own), None)
        if every_child:
            others = [n for n in nodes if tree.tokens[n] != own and accepts(n, row)]
            return others if chosen is None else [chosen, *others]
        if chosen is not None:
            return [chosen]
        return nodes[:1] if nodes and accepts(nodes[0], row) else []

    best: tuple[int, ...] = ()
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        path = waiting.pop()
        if len(path) > len(best):
            best = path
        more = following(path[-1] if path else ROOT)
        waiting += [(*path, node) for node in reversed(more)]
    last = best[-1] if best else ROOT
    ended = last != ROOT and tree.tokens[last] in eos
    return Walked(best, None if ended else own_token(rows[last + 1]))


class TreeJudge(Struct, frozen=True):
    """How the nodes of one tree are judged.

    Attributes:
        start: absolute position of the nodes that follow the text.
    """

    rule: AcceptanceRule
    tree: ProposedTree
    sampling: SamplingParams
    start: int
    threshold: float

    def wanted(self) -> tuple[Int32Array, ...]:
        """For each of the n + 1 rows the ids whose probabilities decide about the children, and are
        reported: those of the first child's distribution, where the rule compares distributions,
        and the children's tokens. None at all with a lossless rule."""
        below = children(self.tree.parents)
        places = range(ROOT, len(self.tree.tokens))
        return tuple(self._ids(below.get(place, [])) for place in places)

    def scored(self) -> tuple[tuple[int, ...], ...]:
        """For each of the n + 1 rows the children's tokens."""
        below = children(self.tree.parents)
        places = range(ROOT, len(self.tree.tokens))
        return tuple(tuple(self.tree.tokens[n] for n in below.get(place, [])) for place in places)

    def _ids(self, nodes: Sequence[int]) -> Int32Array:
        if self.rule.lossless or not nodes:
            return NO_IDS
        first = self.tree.q_ids[nodes[0]] if self.rule.compares else NO_IDS
        known = set(first.tolist())
        others = dict.fromkeys(t for n in nodes if (t := self.tree.tokens[n]) not in known)
        return np.concatenate([first, np.array(list(others), TOKEN_DTYPE)])

    def walk(self, rows: Sequence[TargetRow], eos: frozenset[int]) -> Walked:
        """The accepted path; `rows` as wanted."""
        depth, ids = depths(self.tree.parents), self.wanted()

        def accepts(node: int, row: TargetRow) -> bool:
            proposal = self.proposal(node, ids[self.tree.parents[node] + 1])
            position = self.start + depth[node] - 1
            return self.rule.accepts(proposal, row, self.sampling, position, self.threshold)

        return walk(self.tree, rows, accepts, self.rule.every_child, eos)

    def proposal(self, node: int, ids: Int32Array) -> Proposal:
        """A node as a rule sees it: with the distribution it was taken from where the rule compares
        that, else with the ids of its parent's row."""
        token = self.tree.tokens[node]
        if not self.rule.compares:
            return Proposal(token, ids, _NO_PROBS, self.sampling)
        return Proposal(token, self.tree.q_ids[node], self.tree.q_probs[node], self.sampling)


def with_tree(plan: Plan, judge: TreeJudge) -> Plan:
    """A plan without a path that runs a tree as well: rows after the last token of its feed and
    after each node, each with the target's own choice there."""
    tree, num_text = judge.tree, len(plan.feed)
    positions = (judge.start, *(judge.start + depth for depth in depths(tree.parents)))
    return replace(
        plan,
        feed=plan.feed + tree.tokens,
        parents=(*range(-1, num_text - 1), *(parent + num_text for parent in tree.parents)),
        row_ids=judge.wanted(),
        choices_at=tuple(None if judge.sampling.greedy else at for at in positions),
        entropy=judge.rule.entropy,
        tree=tree,
        scored=judge.scored() if plan.top else (),
    )
