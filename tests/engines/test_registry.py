from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bus.protocol.errors import ConfigurationError, ModelError
from cloud_worker.settings import CloudSettings
from edge_worker.settings import EdgeSettings
from engines.catalog.registry import (
    Specs,
    chosen_models,
    is_registered,
    load_registry,
    local_file,
    require_local,
    split_head,
)
from engines.torch.sources import resolve_source
from tests.engines.index import Register, content_of, entry
from tests.engines.tiny import save_tiny_gguf

CODER = ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b")
CODER_DRAFT = "qwen2.5-coder-0.5b@24576"  # with the pair's `draft_head`
PAIR = (
    '[pairs.mine]\ntarget = "{target}"\ndraft = "default"\nlicence = "MIT"\ncontext_length = 256\n'
)


@pytest.fixture(autouse=True)
def own_places(register: Register) -> None:
    """No registry and no cache of the developer's."""


def test_the_shipped_registry_has_the_pair_and_the_default() -> None:
    registry = load_registry()
    assert list(registry.pairs) == ["default", "qwen2.5-coder"]
    pair = registry.pair("qwen2.5-coder")
    assert (pair.target, pair.draft) == CODER
    sizes = [model.size_bytes for model in registry.to_fetch("qwen2.5-coder").values()]
    assert sizes == [1_117_320_768, 491_400_064]
    assert [len(registry.model(name).pypi) for name in CODER] == [22, 6]
    assert registry.to_fetch("default") == {}
    assert list(registry.to_fetch(CODER[1])) == [CODER[1]]


def test_a_user_adds_models_and_pairs_of_any_spec(register: Register) -> None:
    register(entry("mine", content_of(2)) + PAIR.format(target="acme/some-model"))
    registry = load_registry()
    assert registry.model("mine").licence == "Apache-2.0"
    assert registry.pair("mine").target == "acme/some-model"
    assert "qwen2.5-coder" in registry.pairs


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (PAIR.format(target="default") + 'licenc = "MIT"',
         r"models\.toml: pairs\.mine\.licenc: unknown key \(did you mean 'licence'\?\)"),
        (entry("mine", content_of(1)) + "sha = 1",
         r"models\.mine\.pypi\.0\.sha: unknown key \(did you mean 'sha256'\?\)"),
        ("[model.x]", r"model: unknown key \(did you mean 'models'\?\)"),
        (entry("mine", content_of(1), sha256="abc"), r"models\.mine\.sha256: String should match"),
        (entry("mine", content_of(2)).replace("size_bytes = 400000", "size_bytes = 5"),
         "size_bytes is 5, but the pypi parts sum to 400000"),
        (entry("mine", content_of(1)).partition("[[")[0], "hub, pypi or both"),
        (entry("mine", content_of(1)).replace("mine.gguf", "../mine.gguf"), "file: String should"),
        (entry("mine", content_of(1)).replace('"mine-part0"', '"--pre"'), "package: String should"),
        (entry("mine", content_of(1))
         + entry("other", content_of(2)).replace("other.gguf", "mine.gguf"),
         "different contents under one file name"),
        (entry("qwen2.5-coder-1.5b", content_of(1)), "a shipped entry has this name"),
        (entry("default", content_of(1)), "rename it"),
        (PAIR.format(target="qwen2.5-coder-15b"), r"did you mean 'qwen2\.5-coder-1\.5b'\?"),
        ("pairs = 3", "pairs: Input should be a valid dictionary"),
        ("[", "expected a TOML file of models and pairs"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line_that_says_where(
    register: Register, text: str, complaint: str
) -> None:
    register(text)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        load_registry()
    assert "\n" not in str(caught.value)
    assert "models.toml" in str(caught.value)


def test_unknown_names_come_with_the_nearest_and_the_list() -> None:
    with pytest.raises(ConfigurationError, match=r"no pair 'qwen2\.5' \(did you mean "
                       r"'qwen2\.5-coder'\?\); there are: default, qwen2\.5-coder$"):  # fmt: skip
        chosen_models("qwen2.5", None, None)
    with pytest.raises(ConfigurationError, match="no pair or model 'zzz'; there are: default, qw"):
        load_registry().to_fetch("zzz")


def test_explicit_models_win_over_the_pairs_halves() -> None:
    assert chosen_models(None, None, None) == Specs("default", "default")
    assert chosen_models("", "", "") == Specs("default", "default")
    assert chosen_models("qwen2.5-coder", None, None) == (CODER[0], CODER_DRAFT)
    assert chosen_models("qwen2.5-coder", "a", None) == ("a", CODER_DRAFT)
    assert chosen_models("qwen2.5-coder", None, "b") == (CODER[0], "b")
    assert chosen_models(None, "a", "b") == ("a", "b")


def test_workers_take_their_half_of_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (CloudSettings.load().target, EdgeSettings.load().draft) == ("default", "default")
    monkeypatch.setenv("E2SCI_PAIR", "qwen2.5-coder")
    monkeypatch.setenv("E2SCI_TARGET", "")  # compose passes unset variables on as ""
    assert (CloudSettings.load().target, EdgeSettings.load().draft) == (CODER[0], CODER_DRAFT)
    monkeypatch.setenv("E2SCI_TARGET", "./mine")
    assert (CloudSettings.load().target, EdgeSettings.load().draft) == ("./mine", CODER_DRAFT)
    monkeypatch.setenv("E2SCI_PAIR", "nope")
    with pytest.raises(ConfigurationError, match="there is no pair 'nope'"):
        CloudSettings.load()


def test_registered_are_the_default_and_models() -> None:
    specs = ["default", *CODER, "qwen2.5-coder", "acme/model", "./dir", "x.gguf"]
    assert [spec for spec in specs if is_registered(spec)] == ["default", *CODER]


def test_a_model_that_was_not_fetched_says_how(register: Register) -> None:
    register(entry("mine", content_of(1)))
    with pytest.raises(ModelError, match=r"'mine' is not here; fetch it with: e2sci pull mine$"):
        resolve_source("mine")
    with pytest.raises(ModelError, match=r"e2sci pull qwen2\.5-coder-1\.5b qwen2"):
        require_local([*CODER, "default", "acme/model"])
    path = load_registry().model("mine").path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"short")
    with pytest.raises(ModelError, match=r"has 5 bytes, expected \d+; fetch it again with: e2sci"):
        local_file("mine")


def test_a_pair_is_no_model() -> None:
    with pytest.raises(ModelError, match="is a pair, not a model; use it with --pair"):
        resolve_source("qwen2.5-coder")


def test_a_fetched_model_resolves_to_its_copy(register: Register, tmp_path: Path) -> None:
    content = save_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    register(entry("mine", [content]))
    path = load_registry().model("mine").path
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    source = resolve_source("mine")
    assert source.is_local
    assert source.name == "mine"
    assert (Path(source.location) / "config.json").is_file()


def test_registry_and_pull_need_no_torch() -> None:
    code = "import sys, cli.pull; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_head_size_is_split_off_but_not_from_a_directory_of_that_name(tmp_path: Path) -> None:
    assert split_head("qwen2.5-coder-0.5b@24576") == ("qwen2.5-coder-0.5b", 24576)
    assert split_head("owner/name@main") == ("owner/name@main", None)
    (tmp_path / "draft@16").mkdir()
    assert split_head(str(tmp_path / "draft@16")) == (str(tmp_path / "draft@16"), None)
