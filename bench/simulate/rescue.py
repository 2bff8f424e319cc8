"""Rescue branches: what it would bring to send ahead what follows the draft's second choice.

A model of its own, smaller than the machines, for a method that they do not have: a target that
never waits, and an edge that may spend draft steps on branches. The draft's rows form a tree: each
node that has been run has a first and a second choice. At every step the edge runs the node that it
believes most probable to be reached; each second choice on the way counts `weight` as much, so that
weight 0 is the single chain. A second choice is sent with what is drafted after it. A pass verifies
the longest path that continues the text; where it ends in a rejection and the target's own token
is the second choice, the next pass finds that branch there.

    reach(first choice)  = reach(node) · P(first choice is the target's | margin)
    reach(second choice) = reach(node) · P(second choice is the target's | margin)

Nothing is measured here but the draft's choices, on answers that the target has written
(`bench.simulate.choices`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from bench.simulate.choices import Belief
from bench.simulate.cores import Clock
from bench.simulate.device import Device
from engines.second_choices import Choice

MAX_PASS_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Policy:
    """How the edge spends its draft steps.

    Attributes:
        weight: of a second choice against its probability; 0 drafts a single chain.
        longest: most tokens drafted after a second choice before the target has chosen it.
        least: what is reached less probably is not drafted.
        width: nodes that one draft step runs; 1 counts each branch token as a step.
        tree: whether one pass verifies all branches, else one path.
    """

    weight: float = 0.0
    longest: int = 64
    least: float = 0.05
    width: int = 1
    tree: bool = False


@dataclass(slots=True, eq=False)
class _Node:
    """A text that the draft may go on from.

    Attributes:
        length: of that text. is_right: whether it is the target's.
        reach: how probable the edge believes that, when it was drafted.
        first, second: the text with one of the draft's choices; None before it has been run.
        arrived_ms: when its last token comes to the cloud, as a part of the longest path.
    """

    length: int
    is_right: bool
    reach: float
    first: _Node | None = None
    second: _Node | None = None
    arrived_ms: float = float("inf")


@dataclass(slots=True)
class Rescued:
    """What a simulated answer came to.

    Attributes:
        steps: draft steps; branch_nodes: nodes run off the chain of first choices.
        rescues: rejections after which a branch was there at once.
    """

    tokens_per_s: float
    steps: int
    branch_nodes: int
    rejections: int
    rescues: int


class RescueSession:
    """An edge, a link and a target that never waits.

    Args:
        choices: of the draft at each token of the answer.
        belief: what the edge makes of a margin.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        belief: Belief,
        policy: Policy,
        rtt_ms: float,
        device: Device,
    ) -> None:
        self._choices, self._belief, self._policy = choices, belief, policy
        self._one_way_ms, self._device = rtt_ms / 2, device
        self._clock = Clock()
        self._root = _Node(0, True, 1.0)
        self._committed = 0
        self._drafting = False
        self._counts = Rescued(0.0, 0, 0, 0, 0)
        self._by_length: dict[int, _Node] = {0: self._root}

    def run(self) -> Rescued:
        """To the end of the answer."""
        self._draft()
        self._pass()
        while self._committed < len(self._choices):
            self._clock.advance()
        self._counts.tokens_per_s = 1e3 * self._committed / self._clock.now_ms
        return self._counts

    # --- the edge -----------------------------------------------------------------------------

    def _draft(self) -> None:
        """Begin the next step, if anything is worth it."""
        if self._drafting:
            return
        worth = self._worth()
        if worth:
            self._drafting = True
            self._clock.after(self._device.step_ms, partial(self._drafted, worth))

    def _worth(self) -> list[tuple[_Node, bool]]:
        """The nodes that the next step runs, each with whether it is on a branch."""
        open_nodes = sorted(self._open(), key=lambda found: found[0], reverse=True)
        return [(node, branch) for _, node, branch in open_nodes[: self._policy.width]]

    def _open(self) -> Iterator[tuple[float, _Node, bool]]:
        """(worth, node, on a branch) of what may be run, from the text that the edge knows on."""
        policy, root = self._policy, self._root
        waiting: list[tuple[_Node, float, int | None]] = [(root, 1.0, None)]
        while waiting:
            node, weight, since = waiting.pop()
            worth = weight * node.reach / root.reach
            if worth < policy.least or node.length >= len(self._choices):
                continue
            if since is not None and since >= policy.longest:
                continue
            if node.first is None or node.second is None:
                yield worth, node, since is not None
                continue
            waiting.append((node.first, weight, None if since is None else since + 1))
            if policy.weight:
                waiting.append((node.second, weight * policy.weight, 0))

    def _drafted(self, ran: list[tuple[_Node, bool]]) -> None:
        arrives_ms = self._clock.now_ms + self._one_way_ms
        self._drafting = False
        self._counts.steps += 1
        for node, branch in ran:
            self._counts.branch_nodes += branch
            choice = self._choices[node.length]
            right, second = self._belief(choice.margin)
            node.first = self._after(node, node.is_right and choice.rank == 0, right)
            node.second = self._after(node, node.is_right and choice.rank == 1, second)
            node.first.arrived_ms = arrives_ms
        self._draft()

    def _after(self, node: _Node, is_right: bool, chance: float) -> _Node:
        """The text with one more token; there is one node for each text of the target's."""
        after = _Node(node.length + 1, is_right, node.reach * chance)
        return self._by_length.setdefault(after.length, after) if is_right else after

    def _told(self, length: int) -> None:
        """Feedback: the text has `length` tokens. What was drafted after it goes on being useful;
        elsewhere the edge begins anew."""
        if length > self._root.length:
            self._root = self._right_text(length)
        self._draft()

    def _right_text(self, length: int) -> _Node:
        return self._by_length.setdefault(length, _Node(length, True, 1.0))

    # --- the cloud ----------------------------------------------------------------------------

    def _pass(self) -> None:
        """Verify the longest path there is, or write one token."""
        node = self._by_length.get(self._committed)
        path = [] if node is None else self._path(node)
        accepted = next((i for i, step in enumerate(path) if not step.is_right), len(path))
        tokens, rejected = len(path), accepted < len(path)
        if node is not None and self._policy.tree:
            accepted, tokens = self._deepest(node), self._num_arrived(node)
        end = min(self._committed + accepted + 1, len(self._choices))
        self._clock.after(
            self._device.target_ms(1 + min(tokens, MAX_PASS_TOKENS)),
            partial(self._passed, end, rejected),
        )

    def _passed(self, end: int, rejected: bool) -> None:
        self._committed = end
        self._counts.rejections += rejected
        node = self._by_length.get(end)
        if rejected and node is not None and self._path(node):
            self._counts.rescues += 1
        self._clock.after(self._one_way_ms, partial(self._told, end))
        self._pass()

    def _there(self, node: _Node) -> list[_Node]:
        """The texts after a node that have come. A second choice comes with what follows it."""
        if node.first is None or node.second is None:
            return []
        now_ms, found = self._clock.now_ms, []
        if node.first.arrived_ms <= now_ms:
            found.append(node.first)
        after = node.second.first
        if after is not None and after.arrived_ms <= now_ms:
            found.append(node.second)
        return found

    def _path(self, node: _Node) -> list[_Node]:
        """The longest; of equals that of the first choice."""
        paths = [[child, *self._path(child)] for child in self._there(node)]
        return max(paths, key=len, default=[])

    def _num_arrived(self, node: _Node) -> int:
        return sum(1 + self._num_arrived(child) for child in self._there(node))

    def _deepest(self, node: _Node) -> int:
        """Tokens after a node that have come and are the target's."""
        right = [child for child in self._there(node) if child.is_right]
        return 1 + self._deepest(right[0]) if right else 0
