"""Baselines: co-located SD gives the target's own answer; their server over a link and without."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contention import measure_contention
from bench.contention_child import PASS_SIZES
from bench.evaluation.answers import TimedAnswer, answer_alone, answer_colocated
from bench.evaluation.baseline_server import (
    PASS_COUNTS,
    STEP_COUNTS,
    BaselineServer,
    ServedModels,
)
from bench.evaluation.colocated import Piece, generate_colocated
from bench.evaluation.paddings import PaddingMeter
from bench.evaluation.plan import Setting
from bench.paced import THIS_DEVICE, Device, fixed_device, one_device, paced, split_paced
from bench.reference import generate_alone
from bus.protocol.errors import ConfigurationError
from cloud_worker.settings import CloudSettings
from decoding.engine import Drafter
from decoding.sampling import SamplingParams
from engines.chat import encode_prompt
from engines.kinds import DrafterKind, drafter_of
from engines.padding import LeastTimes, Padding, Tally, TallyFile, read_tally
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

PROMPT = [5, 9, 40, 77, 9, 40, 3]
NEVER: frozenset[int] = frozenset()
MOST = 25


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads, by far where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def drafts(folder: Path) -> dict[str, Drafter[Any]]:
    own = {
        name: ModelDrafter.load(str(folder / name), "float32", "cpu")
        for name in ("target", "stranger")
    }
    mixed = drafter_of(DrafterKind.LOOKUP_MODEL, own["target"])
    return {**own, "lookup": mixed}


def own_answer(target: TargetModel, eos: frozenset[int] = NEVER, most: int = MOST) -> list[int]:
    return list(generate_alone(target, PROMPT, SamplingParams(), most, eos))


@pytest.mark.parametrize("window", range(1, 9))
@pytest.mark.parametrize("draft", ["target", "stranger", "lookup"])
def test_colocated_sd_gives_the_targets_own_tokens(
    target: TargetModel, drafts: dict[str, Drafter[Any]], draft: str, window: int
) -> None:
    pieces = list(generate_colocated(target, drafts[draft], PROMPT, window, MOST, NEVER))
    assert [token for piece in pieces for token in piece.tokens] == own_answer(target)
    assert all(len(piece.tokens) == piece.num_accepted + 1 for piece in pieces)
    if draft == "target":  # always right: every window is accepted and brings a bonus token
        assert all(piece.num_accepted == piece.num_drafted for piece in pieces)
        assert len(pieces) == -(-MOST // (window + 1))


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_an_answer_is_never_longer_than_asked(
    target: TargetModel, drafts: dict[str, Drafter[Any]], window: int, most: int
) -> None:
    for draft in drafts.values():
        pieces = list(generate_colocated(target, draft, PROMPT, window, most, NEVER))
        assert [t for piece in pieces for t in piece.tokens] == own_answer(target, most=most)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_the_end_of_the_text_ends_the_answer_inside_a_window_and_after_it(
    target: TargetModel, drafts: dict[str, Drafter[Any]], window: int
) -> None:
    """Several tokens of the answer in turn are taken for the end, so that it falls everywhere."""
    whole = own_answer(target, most=10)
    for end in dict.fromkeys(whole):
        for draft in drafts.values():
            eos = frozenset({end})
            pieces = list(generate_colocated(target, draft, PROMPT, window, 10, eos))
            tokens = [token for piece in pieces for token in piece.tokens]
            assert tokens == whole[: whole.index(end) + 1]


def test_a_prompt_of_one_token_is_enough(
    target: TargetModel, drafts: dict[str, Drafter[Any]]
) -> None:
    pieces = list(generate_colocated(target, drafts["stranger"], [5], 4, 6, NEVER))
    expected = list(generate_alone(target, [5], SamplingParams(), 6, NEVER))
    assert [token for piece in pieces for token in piece.tokens] == expected


@pytest.mark.long
@pytest.mark.slow_model
def test_colocated_sd_of_the_default_pair_gives_the_targets_own_tokens() -> None:
    target, draft = TargetModel.load("default", "float32"), ModelDrafter.load("default", "float32")
    prompt = encode_prompt(target.tokenizer, "Why is the sky blue?", raw=False)
    expected = list(generate_alone(target, prompt, SamplingParams(), 24, target.eos_tokens))
    for window in (1, 4, 8):
        pieces = list(generate_colocated(target, draft, prompt, window, 24, target.eos_tokens))
        assert [token for piece in pieces for token in piece.tokens] == expected
        assert any(piece.num_accepted for piece in pieces)


# --- the server -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
async def test_the_server_answers_over_a_link_and_on_the_edge(
    folder: Path, target: TargetModel, tmp_path: Path
) -> None:
    device = fixed_device("1,2")
    models = ServedModels(
        str(folder / "target"), str(folder / "stranger"), "float32", device=device, counts=tmp_path
    )
    async with BaselineServer(models, "30ms") as server:
        alone = await answer_alone(server, PROMPT, 8)
        edge = await answer_alone(server, PROMPT, 8, on_edge=True)
        assert read_tally(tmp_path / PASS_COUNTS).count == 14  # not those that ran the prompt
        together = await answer_colocated(server, PROMPT, 8, window=3)
    expected = tuple(own_answer(target, target.eos_tokens, 8))
    assert (alone.token_ids, edge.token_ids, together.token_ids) == (expected,) * 3
    assert alone.came_s[0] >= 0.03
    usage = together.usage
    assert usage is not None
    assert usage.passes == len(together.came_s) >= 2
    assert 0 < usage.accepted_tokens + usage.wasted_tokens == usage.drafted_tokens
    assert (usage.edge_idle, usage.cloud_idle) == (1.0, 0.0)
    assert usage.bytes_down > 0
    assert together.decode_tokens < len(expected)
    assert read_tally(tmp_path / STEP_COUNTS).count == usage.drafted_tokens
    assert read_tally(tmp_path / PASS_COUNTS).count == 14 + usage.passes


class ScriptedServer(BaselineServer):
    """Gives set pieces."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces

    async def stream(self, *_: object, **__: object):  # type: ignore[no-untyped-def]
        for piece in self._pieces:
            yield piece


async def test_tokens_of_the_first_pass_are_not_decoded() -> None:
    pieces = [Piece((1, 2, 3), 2, 2), Piece((4,), 2, 0), Piece((5,))]
    answer: TimedAnswer = await answer_colocated(ScriptedServer(pieces), [9], 8, 2)
    assert (answer.token_ids, answer.decode_tokens) == ((1, 2, 3, 4, 5), 2)
    usage = answer.usage
    assert usage is not None
    assert (usage.drafted_tokens, usage.accepted_tokens, usage.wasted_tokens) == (4, 2, 2)
    assert (usage.windows, usage.rollbacks, usage.passes) == (2, 1, 3)


# --- devices ----------------------------------------------------------------------------------


def test_devices_are_a_list_of_names_and_pairs() -> None:
    assert split_paced("none") == ("none",)
    assert split_paced("none, 8,60 ,contended,none") == ("none", "8,60", "contended")
    assert one_device("16,120.5") == "16,120.5"
    for text in ("", "8", "8,60,contended,7", "x,8", "-1,5", "8,contended"):
        with pytest.raises(ConfigurationError, match="expected STEP,PASS in ms"):
            split_paced(text)
    with pytest.raises(ConfigurationError, match="expected one device, got 2"):
        one_device("none,contended")


def test_workers_are_told_the_times_of_their_device(tmp_path: Path) -> None:
    device = Device("x", 8.5, LeastTimes.parse("1:60,8:90"))
    env = device.env(tmp_path)
    assert env["E2SCI_LEAST_STEP_MS"] == "8.5"
    assert CloudSettings.load(least_pass_ms=env["E2SCI_LEAST_PASS_MS"]).least_pass_ms == "1:60,8:90"
    assert fixed_device("0,0") == fixed_device("none") == THIS_DEVICE
    assert THIS_DEVICE.env(tmp_path) == {"E2SCI_LEAST_STEP_MS": "0", "E2SCI_LEAST_PASS_MS": "0"}
    with pytest.raises(ConfigurationError, match="rising TOKENS"):
        CloudSettings.load(least_pass_ms="8:1,1:2")


def test_the_pass_that_runs_the_prompt_is_not_padded(tmp_path: Path) -> None:
    padding = Padding(LeastTimes.parse("20"), tmp_path / "counts")
    began = time.perf_counter()
    assert list(paced(iter([1, 2, 3]), padding)) == [1, 2, 3]
    assert time.perf_counter() - began >= 0.04
    tally = read_tally(tmp_path / "counts")
    assert (tally.count, tally.long) == (2, 0)


def test_a_method_is_charged_with_what_was_counted_while_it_answered(tmp_path: Path) -> None:
    setting = Setting(40.0, "model", device=Device("padded", 5.0))
    meter = PaddingMeter(setting, tmp_path)
    assert meter.folder is not None
    steps, passes = TallyFile(meter.folder / "steps"), TallyFile(meter.folder / PASS_COUNTS)
    steps.add(least_s=1.0, excess_s=7.0)  # of a method before
    meter.begin()
    steps.add(least_s=1.0, excess_s=-0.5)
    steps.add(least_s=1.0, excess_s=0.25)
    passes.add(least_s=2.0, excess_s=-1.0)
    (row,) = meter.end("plc")
    assert (row.method, row.device) == ("plc", "padded")
    assert row.steps == Tally(2, 1, 2.0, 0.25)
    assert row.passes == Tally(1, 0, 2.0, 0.0)
    assert PaddingMeter(Setting(40.0, "model"), tmp_path).end("plc") == []


@pytest.mark.long
@pytest.mark.slow
async def test_contended_times_are_those_of_real_processes(folder: Path) -> None:
    ticks: list[int] = []
    found = await measure_contention(
        str(folder / "target"), str(folder / "stranger"), "float32", repeats=2,
        tick=lambda: ticks.append(1),
    )  # fmt: skip
    assert tuple(found.passes) == PASS_SIZES
    assert all(t.alone_ms > 0 and t.contended_ms > 0 for t in (found.step, *found.passes.values()))
    assert len(ticks) == 3
    assert found.device.padded
