"""Directories of speculators: what is written is read, and what is wrong is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bus.protocol.errors import LocalError, ModelError
from decoding.sampling import SamplingParams
from engines.catalog import speculators as catalog
from engines.catalog.sources import SPECULATOR_CONFIG
from engines.catalog.speculators import as_setting, chosen_speculators
from engines.torch.speculators.file import EAGLE3, MEDUSA, WEIGHTS, SpeculatorFile, save_speculator
from engines.torch.target import TargetModel
from tests.engines.speculating import KINDS, random_config, random_tensors, save_random
from tests.engines.tiny import byte_level_tokenizer, random_model, save_tiny

CONFIG = SPECULATOR_CONFIG
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    return TargetModel.load(str(save_tiny(tmp_path_factory.mktemp("model"))), "int8", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, target: TargetModel) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    return {kind: save_random(root / kind, kind, target) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(target: TargetModel, tmp_path: Path, kind: str) -> None:
    config = random_config(kind, target)
    tensors = random_tensors(config, 30)
    save_speculator(tmp_path / "new", config, tensors)
    file = SpeculatorFile.open(tmp_path / "new")
    assert file.config == config
    assert file.config.kind == kind
    assert file.vocab.tolist() == tensors.pop("vocab").tolist()
    read = file.tensors()
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        step = tensor.abs().amax(dim=-1, keepdim=True) / 127
        assert ((read[name] - tensor).abs() <= 0.51 * step).all()


def edit(**changes: Any) -> Spoil:
    """Another value in the config; None: the field is gone."""

    def spoil(directory: Path) -> None:
        fields = json.loads((directory / CONFIG).read_text("utf-8")) | changes
        kept = {name: value for name, value in fields.items() if value is not None}
        (directory / CONFIG).write_text(json.dumps(kept), "utf-8")

    return spoil


def replace(**tensors: torch.Tensor | None) -> Spoil:
    """Other tensors, `__` for a dot in their names; None: it is gone."""

    def spoil(directory: Path) -> None:
        stored: dict[str, Any] = dict(load_file(directory / WEIGHTS))
        stored |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({k: v for k, v in stored.items() if v is not None}, directory / WEIGHTS)

    return spoil


def vocab(first: int, last: int) -> torch.Tensor:
    """As many ids as the random speculators have, rising but for the last."""
    return torch.tensor([*range(first, first + 39), last], dtype=torch.int32)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "holds no speculator"),
        (lambda path: (path / CONFIG).unlink(), "holds no speculator"),
        (lambda path: (path / CONFIG).write_text("{", "utf-8"), "does not describe a speculator"),
        (lambda path: (path / CONFIG).write_bytes(b"\xff\xfe"), "does not describe a speculator"),
        (edit(format="e2sci-speculator-0"), "format e2sci-speculator-1"),
        (edit(kind="crystal-ball"), "crystal-ball"),
        (edit(hidden=None), "hidden"),
        (edit(hidden=0), "`int` >= 1"),
        (edit(hidden=48), "does not fit|has shape"),
        (edit(tokenizer_digest="another"), "its tokenizer is another"),
        (edit(vocab_size=1000), "for 1000 tokens, the target has 290"),
        (lambda path: (path / WEIGHTS).unlink(), "cannot read"),
        (lambda path: (path / WEIGHTS).write_bytes(b"nothing"), "cannot read"),
        (replace(vocab=None), "'vocab' must be"),
        (replace(vocab=vocab(0, 0)), "'vocab' must be rising"),
        (replace(vocab=vocab(0, 290)), "below 290"),
        (replace(vocab=vocab(-1, 60)), "'vocab' must be rising"),
        (replace(vocab=torch.arange(40)), "int32"),
        (replace(more=torch.zeros(3)), "'more' has shape"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_does_not_do_is_refused_in_one_line(
    target: TargetModel, made: dict[str, Path], tmp_path: Path, kind: str, spoil: Spoil, says: str
) -> None:
    directory = shutil.copytree(made[kind], tmp_path / "spoilt")
    spoil(directory)
    with pytest.raises(ModelError, match=says) as raised:
        target.equip([directory])
    assert "\n" not in str(raised.value)
    assert target.speculators == ()


@pytest.mark.parametrize(
    ("kind", "spoil", "says"),
    [
        (MEDUSA, edit(num_heads=5), "'heads.4.bias' has shape None"),
        (MEDUSA, edit(num_heads=3), "'heads.3.bias' has shape"),
        (MEDUSA, replace(heads__0__bias=torch.zeros(5)), "'heads.0.bias' has shape"),
        (EAGLE3, edit(feature_layers=[1, 2, 3]), "it reads layers"),
        (MEDUSA, edit(num_heads=10**9), "`int` <= 1024"),
        (EAGLE3, edit(num_key_value_heads=4), "'k_proj.weight"),
        (EAGLE3, edit(rope_theta=-1.0), "`float` > 0.0"),
        (EAGLE3, edit(num_key_value_heads=3), "cannot share 3 key heads"),
        (EAGLE3, replace(out_norm=None), "'out_norm' has shape None"),
        (EAGLE3, replace(fc__weight__scale=torch.ones(31)), "'fc.weight.scale'"),
    ],
)
def test_so_is_one_whose_parts_do_not_agree(
    target: TargetModel, made: dict[str, Path], tmp_path: Path, kind: str, spoil: Spoil, says: str
) -> None:
    directory = shutil.copytree(made[kind], tmp_path / "spoilt")
    spoil(directory)
    with pytest.raises(ModelError, match=says):
        target.equip([directory])


def test_one_of_each_kind(target: TargetModel, made: dict[str, Path], tmp_path: Path) -> None:
    target.equip([made[EAGLE3], made[MEDUSA]])
    assert target.speculators == (EAGLE3, MEDUSA)
    again = shutil.copytree(made[MEDUSA], tmp_path / "again")
    with pytest.raises(ModelError, match="both of kind medusa"):
        target.equip([made[MEDUSA], again])
    target.equip([])
    with pytest.raises(LocalError, match="no speculator 'medusa'"):
        target.open(SamplingParams(), MEDUSA)


def test_weights_are_read_when_a_session_needs_them(
    target: TargetModel, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    tensors = SpeculatorFile.tensors

    def counted(file: SpeculatorFile) -> dict[str, torch.Tensor]:
        read.append(file.directory)
        return tensors(file)

    monkeypatch.setattr(SpeculatorFile, "tensors", counted)
    target.equip([made[kind] for kind in KINDS])
    target.open(SamplingParams())
    assert read == []
    caches = [target.open(SamplingParams(), EAGLE3) for _ in range(2)]
    assert read == []
    for cache in caches:
        target.prefill(cache, [1, 2, 3])
    assert read == [made[EAGLE3]]
    target.equip([])


def test_a_target_without_hidden_states_has_none(made: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    random_model(vocab_size=len(tokenizer), hidden_act="gelu").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    other = TargetModel.load(str(tmp_path), "float32", "cpu")
    other.equip([])
    with pytest.raises(ModelError, match="needs a Llama or Qwen2 on a CPU"):
        other.equip([made[MEDUSA]])


def test_the_setting_names_directories(made: dict[str, Path], tmp_path: Path) -> None:
    assert chosen_speculators("none", "default") == []
    assert chosen_speculators("a, ~/b", "other") == [Path("a"), Path.home() / "b"]
    setting = as_setting([str(made[kind]) for kind in KINDS])
    assert chosen_speculators(setting, "other") == [made[kind] for kind in KINDS]
    assert as_setting(["none"]) == "none"
    with pytest.raises(ModelError, match="holds no speculator"):
        as_setting([str(tmp_path)])


def test_those_shipped_are_for_the_default_target(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = made[MEDUSA].parent
    monkeypatch.setattr(resources, "files", lambda _: shipped.parent)
    shutil.copytree(shipped, shipped.parent / "shipped")
    assert [path.name for path in chosen_speculators("", "default")] == sorted(KINDS)
    assert chosen_speculators("", "other") == []


def test_every_shipped_speculator_can_be_read() -> None:
    for directory in catalog.shipped_speculators():
        SpeculatorFile.open(directory).tensors()
