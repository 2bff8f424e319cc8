"""EAGLE-3's layer at the edge, on tiny targets: what it drafts is what the formulas say, and what
the target's own speculator proposes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bus.protocol.arrays import Float16Array
from bus.protocol.errors import LocalError, ModelError
from bus.protocol.messages import DraftWindow, Feedback
from decoding import methods
from decoding.engine import Segment, TargetRow, Want
from decoding.sampling import SamplingParams
from engines.catalog.sources import DEFAULT_SPEC, require_found, split_speculator
from engines.lookup import LookupDrafter
from engines.row import DrafterRow
from engines.torch.prefixes import PrefixCache
from engines.torch.speculators.drafter import Eagle3Cache, Eagle3Drafter
from engines.torch.speculators.file import EAGLE3, MEDUSA, SpeculatorFile
from engines.torch.target import TargetModel
from engines.torch.thin import NoDrafter
from tests.engines.drafter_conformance import DrafterConformance
from tests.engines.model_pair import ModelPair
from tests.engines.speculating import expected_probs, save_random
from tests.engines.tiny import byte_level_tokenizer, save_tiny
from tests.harness import EdgeCloudPair

GREEDY = SamplingParams()
NEVER: frozenset[int] = frozenset()
TEXT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 97, 93, 238, 46, 26, 43, 38, 32, 79, 50, 28, 84)
TOLERANCE = 0.02  # as for the target's own speculator

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("edge-speculator")
    save_tiny(root / "model", num_layers=4)
    target = TargetModel.load(str(root / "model"), "float32", "cpu")
    kinds = {kind: save_random(root / kind, kind, target) for kind in (EAGLE3, MEDUSA)}
    return {"model": root / "model", **kinds}


@pytest.fixture(scope="module")
def target(places: dict[str, Path]) -> TargetModel:
    target = TargetModel.load(str(places["model"]), "float32", "cpu")
    target.equip([places[EAGLE3]])
    return target


@pytest.fixture(scope="module")
def drafter(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Eagle3Drafter:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Eagle3Drafter.load(f"{places[EAGLE3]}@{places['model']}", num_sparse=40)


def features_of(target: TargetModel, text: Sequence[int]) -> Float16Array:
    """float16[n, 3, hidden], of all positions of a text."""
    levels = target.features(text).low_mid_high
    epsilon = float(target.causal.own[0].config.rms_norm_eps)
    return F.rms_norm(levels, levels.shape[-1:], eps=epsilon).half().numpy()


def go_on() -> bool:
    return False


def drafted(
    drafter: Eagle3Drafter, cache: Eagle3Cache, text: Sequence[int], count: int
) -> tuple[int, ...]:
    """After a text, of which the cache has read a part."""
    return drafter.draft(cache, text[cache.length :], count, NEVER, go_on).tokens


# --- features of the target's rows ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_rows_carry_the_features_of_their_positions(places: dict[str, Path], dtype: str) -> None:
    target = TargetModel.load(str(places["model"]), dtype, "cpu")
    target.prefixes = PrefixCache(8)
    wanted = features_of(target, TEXT)
    for _ in range(2):  # the second session finds the text in the prefix cache
        cache = target.open(GREEDY)
        target.prefill(cache, TEXT[:9])
        other = target.open(GREEDY)
        batch = [
            Segment(other, TEXT[:5], (Want(4),)),
            Segment(cache, TEXT[9:], tuple(Want(i, features=i != 2) for i in (1, 2, 12))),
        ]
        [_, rows] = target.run(batch)
        assert rows[1].features is None
        for row, position in zip(rows[::2], (10, 21), strict=True):
            assert row.features is not None
            assert row.features.dtype == np.float16
            np.testing.assert_allclose(row.features, wanted[position], atol=4e-3)
        again = target.row(cache, 2, Want(0, features=True)).features
        np.testing.assert_array_equal(again, rows[2].features)
        target.close(cache)
    plain = target.open(GREEDY)
    target.run([Segment(plain, TEXT, (Want(5),))])
    with pytest.raises(LocalError, match="features"):
        target.row(plain, 0, Want(0, features=True))


def test_asking_for_features_changes_no_bit_of_a_row(target: TargetModel) -> None:
    def row(features: bool) -> TargetRow:
        cache = target.open(GREEDY)
        return target.run([Segment(cache, TEXT, (Want(22, top=True, features=features),))])[0][0]

    one, other = row(False).top, row(True).top
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one[1], other[1])


# --- drafts -------------------------------------------------------------------------------------


def test_with_all_features_it_writes_the_chain_that_the_target_would_propose(
    target: TargetModel, drafter: Eagle3Drafter
) -> None:
    speculator = target.speculator(EAGLE3)
    speculator.branches = 1
    try:
        for length in (4, 11, len(TEXT)):
            text = TEXT[:length]
            there = target.open(GREEDY, EAGLE3)
            target.prefill(there, text[:-1])
            here = drafter.open(GREEDY)
            drafter.learn(here, 0, features_of(target, text[:-1]))
            assert drafted(drafter, here, text, 6) == target.propose(there, text[-1:], 6).tokens
    finally:
        speculator.branches = 4


@pytest.mark.parametrize("first", [0, 5, 21])
def test_probabilities_are_those_of_the_formulas_over_the_positions_known(
    target: TargetModel, drafter: Eagle3Drafter, places: dict[str, Path], first: int
) -> None:
    file = SpeculatorFile.open(places[EAGLE3])
    cache = drafter.open(GREEDY)
    drafter.prefill(cache, TEXT[:7])
    drafter.learn(cache, first, features_of(target, TEXT)[first:-1])
    window = drafter.draft(cache, TEXT[7:], 4, NEVER, go_on)
    for index in range(4):
        wanted = expected_probs(file, target, TEXT, window.tokens[:index], first)
        given = torch.zeros(target.vocab_size)
        given[window.q_ids[index].tolist()] = torch.from_numpy(
            window.q_probs[index].astype(np.float32)
        )
        torch.testing.assert_close(given[file.vocab], wanted, rtol=0, atol=TOLERANCE)


def test_without_features_it_has_nothing_to_say(drafter: Eagle3Drafter) -> None:
    cache = drafter.open(GREEDY)
    window = drafter.draft(cache, TEXT, 4, NEVER, go_on)
    assert (window.start, window.num_cached, window.tokens) == (len(TEXT), len(TEXT), ())
    assert window.q_ids.shape == (0, 40)


def test_features_that_come_later_are_read_in_place_of_its_own_states(
    target: TargetModel, drafter: Eagle3Drafter
) -> None:
    """Feedback of one, two and three tokens, the last of which rejects a draft."""
    features = features_of(target, TEXT)
    cache = drafter.open(GREEDY)
    drafter.learn(cache, 6, features[6:7])
    ahead = drafted(drafter, cache, TEXT[:8], 5)
    assert len(ahead) == 5
    for begin, end in ((7, 9), (9, 12)):
        drafter.keep(cache, begin + 1)
        drafter.learn(cache, begin, features[begin:end])
        tokens = drafted(drafter, cache, TEXT[: end + 1], 5)
        fresh = drafter.open(GREEDY)
        drafter.learn(fresh, 6, features[6:end])
        assert tokens == drafted(drafter, fresh, TEXT[: end + 1], 5)
    assert cache.places[: cache.num_read] == [6, 7, 8, 9, 10, 11]


def test_it_goes_on_with_its_own_states_and_a_chain_can_be_cut_anywhere(
    target: TargetModel, drafter: Eagle3Drafter
) -> None:
    features, whole = features_of(target, TEXT), drafter.open(GREEDY)
    drafter.learn(whole, 3, features[3:-1])
    text = (*TEXT, *drafted(drafter, whole, TEXT, 6))
    pieces = drafter.open(GREEDY)
    drafter.learn(pieces, 3, features[3:-1])
    drafted(drafter, pieces, text[:-2], 2)
    for length in (len(TEXT) + 4, len(TEXT) + 1, len(TEXT)):
        drafter.keep(pieces, length - 1)
        assert drafted(drafter, pieces, text[:length], 2) == text[length : length + 2]


def test_positions_whose_features_were_lost_are_left_out(
    target: TargetModel, drafter: Eagle3Drafter
) -> None:
    features = features_of(target, TEXT)
    cache = drafter.open(GREEDY)
    drafter.learn(cache, 2, features[2:6])
    drafter.learn(cache, 9, features[9:-1])
    assert len(drafted(drafter, cache, TEXT, 3)) == 3
    assert cache.places[: cache.num_read] == [2, 3, 4, 5, *range(9, 22)]


@pytest.mark.parametrize("length", [0, 8, len(TEXT) - 2, len(TEXT) - 1, len(TEXT)])
def test_tokens_that_an_interrupted_draft_has_read_are_read_again(
    target: TargetModel, drafter: Eagle3Drafter, length: int
) -> None:
    cache = drafter.open(GREEDY)
    drafter.learn(cache, 4, features_of(target, TEXT)[4:-1])
    tokens = drafted(drafter, cache, TEXT, 3)
    drafter.keep(cache, length)
    text = (*TEXT, tokens[0])
    assert drafted(drafter, cache, text, 2) == tokens[1:]


def test_features_of_another_width_are_an_error(drafter: Eagle3Drafter) -> None:
    with pytest.raises(LocalError, match="use the speculator of the cloud worker's target"):
        drafter.learn(drafter.open(GREEDY), 0, np.zeros((1, 3, 5), np.float16))


def test_in_a_row_the_last_drafter_learns(target: TargetModel, drafter: Eagle3Drafter) -> None:
    row = DrafterRow(LookupDrafter(drafter.vocab_size, drafter.context_length), drafter)
    assert row.capabilities.features
    cache = row.open(GREEDY)
    assert row.draft(cache, TEXT, 3, NEVER, go_on).tokens == ()
    row.keep(cache, len(TEXT) - 1)
    row.learn(cache, 4, features_of(target, TEXT)[4:-1])
    assert len(row.draft(cache, TEXT[-1:], 3, NEVER, go_on).tokens) == 3


class Taught(Eagle3Drafter):
    """Every session knows the features of the first positions, given as float16[n, 3, hidden]."""

    features: Float16Array

    def open(self, sampling: SamplingParams, prompt: Sequence[int] = ()) -> Eagle3Cache:
        cache = super().open(sampling, prompt)
        self.learn(cache, 0, self.features)
        return cache


class TestTaught(DrafterConformance):
    @pytest.fixture
    def drafter(self, drafter: Eagle3Drafter, target: TargetModel) -> Taught:
        taught = object.__new__(Taught)
        taught.__dict__ |= drafter.__dict__
        taught.features = features_of(target, self.REPEATING)[:-1]
        return taught


# --- a session of both ends ---------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, seed=3)])
def test_a_session_writes_the_targets_text_and_teaches_its_draft(
    target: TargetModel, drafter: Eagle3Drafter, sampling: SamplingParams
) -> None:
    def answer(name: str) -> EdgeCloudPair:
        method = methods.find(name)
        assert method is not None
        run = EdgeCloudPair(
            ModelPair(target, drafter), sampling, method=method, prompt=TEXT[:9],
            max_new_tokens=20, drafts=name == "eagle3-edge",
        )  # fmt: skip
        run.run()
        return run

    edge, alone = answer("eagle3-edge"), answer("auto")
    assert edge.answer == alone.answer
    carrying = [m for m in edge.sent if isinstance(m, Feedback) and m.features is not None]
    assert carrying
    size = target.causal.own[0].config.hidden_size
    assert {
        (len(m.features.levels) + len(m.features.scales)) // len(m.token_ids)
        for m in carrying
        if m.features is not None
    } == {3 * (size + 2)}
    assert any(isinstance(message, DraftWindow) for message in edge.sent)


# --- loading ------------------------------------------------------------------------------------


def test_a_spec_names_a_directory_and_its_target(places: dict[str, Path]) -> None:
    directory = str(places[EAGLE3])
    assert split_speculator(directory) == (places[EAGLE3], DEFAULT_SPEC)
    assert split_speculator(f"{directory}@{places['model']}") == (
        places[EAGLE3], str(places["model"]),
    )  # fmt: skip
    assert split_speculator(str(places["model"])) is None
    assert split_speculator("default") is None
    require_found([f"{directory}@{places['model']}"])
    with pytest.raises(ModelError, match="no such model directory"):
        require_found([f"{directory}@/nowhere/model"])


def test_what_does_not_fit_is_refused(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="of kind medusa, the edge drafts by eagle3"):
        Eagle3Drafter.load(f"{places[MEDUSA]}@{places['model']}")
    other = save_tiny(tmp_path / "other", byte_level_tokenizer(280))
    with pytest.raises(ModelError, match="other has another tokenizer"):
        Eagle3Drafter.load(f"{places[EAGLE3]}@{other}")
    with pytest.raises(ModelError, match="holds no speculator"):
        Eagle3Drafter.load(str(places["model"]))


def test_a_thin_edge_takes_the_tokenizer_of_the_speculators_target(
    places: dict[str, Path], drafter: Eagle3Drafter
) -> None:
    thin = NoDrafter.load(f"{places[EAGLE3]}@{places['model']}")
    assert thin.tokenizer_digest == drafter.tokenizer_digest
