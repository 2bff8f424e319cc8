"""Speculators on tiny targets: what they propose is what their formulas say, pass after pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bus.protocol.errors import LocalError
from decoding.engine import ProposedTree, Segment, TargetRow, Want
from decoding.sampling import SamplingParams
from engines.torch.prefixes import PrefixCache
from engines.torch.speculators.file import EAGLE3, MEDUSA, SpeculatorFile
from engines.torch.target import TargetCache, TargetModel
from tests.engines.conformance import TargetConformance
from tests.engines.speculating import KINDS, expected_probs, save_random
from tests.engines.tiny import save_tiny

PLAIN = SamplingParams(temperature=1.0, seed=7)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 97, 93, 238, 46, 26, 43, 38, 32, 79, 50, 28, 84]
NUM_LAYERS = 4
TOLERANCE = {MEDUSA: 0.004, EAGLE3: 0.02}  # of a probability: matrices are rounded once more

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and, on it, a directory for each kind."""
    root = tmp_path_factory.mktemp("speculators")
    save_tiny(root / "model", num_layers=NUM_LAYERS)
    target = TargetModel.load(str(root / "model"), "float32", "cpu")
    made = {kind: save_random(root / kind, kind, target) for kind in KINDS}
    return {"model": root / "model", **made}


@pytest.fixture(scope="module", params=["int8", "float32"])
def target(request: pytest.FixtureRequest, places: dict[str, Path]) -> TargetModel:
    target = TargetModel.load(str(places["model"]), request.param, "cpu")
    target.equip([places[kind] for kind in KINDS])
    return target


def prefilled(target: TargetModel, kind: str, text: list[int]) -> TargetCache:
    """All of the text but its last token has run, in two passes."""
    cache = target.open(PLAIN, kind)
    target.prefill(cache, text[:2])
    target.prefill(cache, text[2:-1])
    return cache


def path_to(tree: ProposedTree, node: int) -> list[int]:
    """Indices of the nodes from the text to this one."""
    path = [node]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    return path


def run_tree(
    target: TargetModel, cache: TargetCache, feed: list[int], tree: ProposedTree
) -> list[TargetRow]:
    parents = (*range(-1, len(feed) - 1), *(parent + len(feed) for parent in tree.parents))
    tokens = (*feed, *tree.tokens)
    wants = tuple(Want(index, choice_at=index) for index in range(len(tokens)))
    return target.run([Segment(cache, tokens, wants, parents)])[0]


class TestEquipped(TargetConformance):
    @pytest.fixture
    def target(self, target: TargetModel) -> TargetModel:
        return target


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_the_formulas(
    target: TargetModel, places: dict[str, Path], kind: str
) -> None:
    file = SpeculatorFile.open(places[kind])
    tree = target.propose(prefilled(target, kind, TEXT), TEXT[-1:], 12, rows=True)
    tree.check(target.vocab_size, 12, rows=True)
    assert tree.q_ids.shape == (12, 40)
    depths = set()
    for node in range(12):
        path = [tree.tokens[index] for index in path_to(tree, node)]
        depths.add(len(path))
        wanted = expected_probs(file, target, TEXT, path[:-1])
        given = torch.zeros(target.vocab_size)
        given[tree.q_ids[node].tolist()] = torch.from_numpy(tree.q_probs[node].astype(np.float32))
        torch.testing.assert_close(given[file.vocab], wanted, rtol=0, atol=TOLERANCE[kind])
    assert max(depths) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_holds_the_most_probable_paths(
    target: TargetModel, places: dict[str, Path], kind: str
) -> None:
    """Against every path of two tokens by the formulas."""
    file = SpeculatorFile.open(places[kind])
    text, most = TEXT[:9], 6
    target.speculator(kind).branches = 40
    tree = target.propose(prefilled(target, kind, text), text[-1:], most)
    target.speculator(kind).branches = 4
    first = expected_probs(file, target, text, [])
    paths: dict[tuple[int, ...], float]
    paths = {(int(t),): float(p) for t, p in zip(file.vocab, first, strict=True)}
    for token, prob in zip(file.vocab.tolist(), first.tolist(), strict=True):
        if prob > 0.01:
            second = prob * expected_probs(file, target, text, [token])
            paths |= {(token, int(t)): float(p) for t, p in zip(file.vocab, second, strict=True)}
    found = [tuple(tree.tokens[i] for i in path_to(tree, node)) for node in range(most)]
    least = sorted(paths.values(), reverse=True)[most - 1]
    assert all(paths[path] > least - 0.03 for path in found if len(path) <= 2)
    assert all(path in found for path, prob in paths.items() if prob > least + 0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accepted", [[0, 0, 0], [1, 2, 0, 3], [2, 1, 3, 0, 2]])
def test_pass_after_pass_the_same_is_proposed_as_by_a_fresh_session(
    target: TargetModel, kind: str, accepted: list[int]
) -> None:
    text = TEXT[:7]
    cache = prefilled(target, kind, text)
    for number, depth in enumerate(accepted):
        tree = target.propose(cache, text[-1:], 7, rows=True)
        fresh = target.propose(prefilled(target, kind, text), text[-1:], 7, rows=True)
        assert tree.tokens == fresh.tokens
        assert tree.parents == fresh.parents
        np.testing.assert_allclose(tree.q_probs, fresh.q_probs, atol=2e-3)
        held = target.length(cache)
        run_tree(target, cache, text[-1:], tree)
        paths = [path_to(tree, node) for node in range(7)]
        path = max((path for path in paths if len(path) <= depth), key=len) if depth else []
        target.keep(cache, held, [0, *(index + 1 for index in path)])
        text = [*text, *(tree.tokens[index] for index in path), 11 + number]


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_rollback_the_same_is_proposed(target: TargetModel, kind: str) -> None:
    cache = prefilled(target, kind, TEXT)
    target.propose(cache, TEXT[-1:], 5)
    target.keep(cache, 6)
    target.prefill(cache, [40, 41])
    text = [*TEXT[:6], 40, 41, 42]
    fresh = target.propose(prefilled(target, kind, text), [42], 5)
    assert target.propose(cache, [42], 5) == fresh or _same(target.propose(cache, [42], 5), fresh)


def _same(one: ProposedTree, other: ProposedTree) -> bool:
    return one.tokens == other.tokens and one.parents == other.parents


@pytest.mark.parametrize("kind", KINDS)
def test_a_proposal_can_be_repeated(target: TargetModel, kind: str) -> None:
    cache = prefilled(target, kind, TEXT)
    first = target.propose(cache, [17], 5)
    other = target.propose(cache, [18], 5)
    assert _same(target.propose(cache, [17], 5), first)
    assert target.length(cache) == len(TEXT) - 1
    if kind == EAGLE3:  # Medusa's heads do not read the last token
        assert not _same(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_feed_of_several_tokens_is_followed(
    target: TargetModel, places: dict[str, Path], kind: str
) -> None:
    """As if they were a path of its own tree."""
    file, feed = SpeculatorFile.open(places[kind]), TEXT[-3:]
    cache = prefilled(target, kind, TEXT[:-2])
    tree = target.propose(cache, feed, 1, rows=True)
    wanted = expected_probs(file, target, TEXT[:-2], feed[1:])
    given = dict(zip(tree.q_ids[0].tolist(), tree.q_probs[0].tolist(), strict=True))
    for token, prob in zip(file.vocab.tolist(), wanted.tolist(), strict=True):
        assert given[token] == pytest.approx(prob, abs=TOLERANCE[kind])


def test_medusa_proposes_nothing_beyond_its_heads(target: TargetModel) -> None:
    cache = prefilled(target, MEDUSA, TEXT[:5])
    assert target.propose(cache, TEXT[4:8], 3).tokens
    assert target.propose(cache, TEXT[4:9], 3, rows=True).tokens == ()


@pytest.mark.parametrize("kind", KINDS)
def test_one_branch_gives_a_chain(target: TargetModel, kind: str) -> None:
    target.speculator(kind).branches = 1
    tree = target.propose(prefilled(target, kind, TEXT), TEXT[-1:], 3)
    target.speculator(kind).branches = 4
    assert tree.parents == (-1, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_paths_are_seven_tokens_at_most(target: TargetModel, kind: str) -> None:
    target.speculator(kind).branches = 1
    tree = target.propose(prefilled(target, kind, TEXT), TEXT[-1:], 30)
    target.speculator(kind).branches = 4
    assert len(tree.tokens) == {EAGLE3: 7, MEDUSA: 4}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_read_in_chunks(
    target: TargetModel, places: dict[str, Path], kind: str
) -> None:
    text = [(7 * index * index) % 200 for index in range(400)]
    cache = target.open(PLAIN, kind)
    target.prefill(cache, text[:-1])
    tree = target.propose(cache, text[-1:], 1, rows=True)
    file = SpeculatorFile.open(places[kind])
    wanted = expected_probs(file, target, text, [])
    given = dict(zip(tree.q_ids[0].tolist(), tree.q_probs[0].tolist(), strict=True))
    for token, prob in zip(file.vocab.tolist(), wanted.tolist(), strict=True):
        assert given[token] == pytest.approx(prob, abs=TOLERANCE[kind])


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_rows_of_a_batch_are_those_of_sessions_alone(places: dict[str, Path], dtype: str) -> None:
    """In int8 to the bit: sessions with either speculator, and one without."""
    equipped = TargetModel.load(str(places["model"]), dtype, "cpu")
    equipped.equip([places[kind] for kind in KINDS])
    plain = TargetModel.load(str(places["model"]), dtype, "cpu")
    ids = np.arange(equipped.vocab_size, dtype=np.int32)
    kinds = ("", *KINDS)
    caches = [equipped.open(PLAIN, kind) for kind in kinds]
    equipped.run([Segment(cache, tuple(TEXT[: 5 + n])) for n, cache in enumerate(caches)])
    trees = [ProposedTree((8,), (-1,), *np.empty((2, 0, 0)))] + [
        equipped.propose(cache, TEXT[-1:], 5) for cache in caches[1:]
    ]
    segments = [
        Segment(
            cache, (TEXT[-1], *tree.tokens), (Want(0, ids), Want(len(tree.tokens), ids)),
            (-1, *(parent + 1 for parent in tree.parents)),
        )
        for cache, tree in zip(caches, trees, strict=True)
    ]  # fmt: skip
    together = equipped.run(segments)
    for n, (segment, rows) in enumerate(zip(segments, together, strict=True)):
        alone = plain.open(PLAIN)
        plain.run([Segment(alone, tuple(TEXT[: 5 + n]))])
        wanted = plain.run([Segment(alone, segment.tokens, segment.wants, segment.parents)])[0]
        for row, other in zip(rows, wanted, strict=True):
            if dtype == "int8":
                np.testing.assert_array_equal(row.p1_at_q, other.p1_at_q)
            np.testing.assert_allclose(row.p1_at_q, other.p1_at_q, rtol=1e-3, atol=1e-6)


def test_after_passes_together_each_session_proposes_as_alone(target: TargetModel) -> None:
    """Hidden states of a pass go to the sessions whose rows they are."""
    kinds = ("", *KINDS, *reversed(KINDS), "")
    caches = [target.open(PLAIN, kind) for kind in kinds]
    target.run([Segment(cache, tuple(TEXT[: 5 + n])) for n, cache in enumerate(caches)])
    target.run([Segment(cache, tuple(TEXT[n : 2 * n + 2])) for n, cache in enumerate(caches)])
    for n, (kind, cache) in enumerate(zip(kinds, caches, strict=True)):
        if not kind:
            continue
        alone = prefilled(target, kind, [*TEXT[: 5 + n], *TEXT[n : 2 * n + 2], 7])
        proposed, wanted = (target.propose(c, (7,), 6, rows=True) for c in (cache, alone))
        assert _same(proposed, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_such_a_session_takes_no_shared_prefix_but_leaves_its_own(
    places: dict[str, Path], kind: str
) -> None:
    target = TargetModel.load(str(places["model"]), "int8", "cpu")
    target.equip([places[kind]])
    target.prefixes = PrefixCache(64)
    text = [(3 * index) % 200 for index in range(60)]
    first = target.open(PLAIN, kind)
    target.prefill(first, text[:-1])
    tree = target.propose(first, text[-1:], 5)
    target.close(first)
    second = target.open(PLAIN, kind)
    target.prefill(second, text[:-1])
    assert second.prefix.num_reused == 0
    assert _same(target.propose(second, text[-1:], 5), tree)
    plain = target.open(PLAIN)
    target.prefill(plain, text[:-1])
    assert plain.prefix.num_reused == len(text) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_proposed_is_refused(target: TargetModel, kind: str) -> None:
    cache = prefilled(target, kind, TEXT[:6])
    for feed, most in (((), 3), ((1,), 0)):
        with pytest.raises(LocalError):
            target.propose(cache, feed, most)
    tree = target.propose(cache, TEXT[5:6], 4)
    run_tree(target, cache, TEXT[5:6], tree)
    with pytest.raises(LocalError, match="no path of it kept"):
        target.propose(cache, (1,), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_proposed_before_anything_has_run(target: TargetModel, kind: str) -> None:
    assert target.propose(target.open(PLAIN, kind), TEXT, 3).tokens == ()
