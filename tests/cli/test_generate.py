"""`e2sci generate` on tiny random models; the whole tree is real, only the weights are small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bus.protocol.errors import RequestError
from cli.generate import parse_prompts
from cli.main import app
from cli.options import Sampling
from engines.torch.target import TargetModel
from launch.python import ROOT
from launch.stack import Stack
from tests.cli.conftest import e2sci
from tests.engines.speculating import KINDS, save_random
from tests.engines.tiny import save_tiny


def test_lines_override_the_options() -> None:
    text = '{"prompt": "a"}\n\n{"prompt": "b", "seed": 4, "stop": ["x"], "max_new_tokens": 2}\n'
    one, two = parse_prompts(text, Sampling(seed=1, max_new_tokens=9))
    assert (one.prompt, one.seed, one.max_new_tokens) == ("a", 1, 9)
    assert (two.prompt, two.seed, two.max_new_tokens, two.stop) == ("b", 4, 2, ("x",))


def test_a_line_may_hold_a_chat() -> None:
    (request,) = parse_prompts(
        '{"messages": [{"role": "user", "content": "Hi"}], "seed": 4}', Sampling()
    )
    contents = [message.content for message in request.messages]
    assert (contents, request.prompt, request.seed) == (["Hi"], "", 4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object"),
        ("{}", "line 2: prompt: empty"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages: message 0: expected an object"),
        (
            '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
            "line 2: prompt and messages: give one of them",
        ),
        ('{"prompt": 3}', "line 2: prompt: expected text"),
        (
            '{"prompt": "a", "sead": 1}',
            "line 2: 'sead': no such field; known are prompt, messages, method",
        ),
        ('{"prompt": "a", "seed": "x"}', "line 2: seed: expected a whole number"),
        ('{"prompt": "a", "seed": [1]}', "line 2: seed: expected a whole number"),
        ('{"prompt": "a", "method": "magic"}', "line 2: method: there is no 'magic'"),
    ],
)
def test_a_wrong_line_is_named(line: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_prompts(f'{{"prompt": "a"}}\n{line}\n', Sampling())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 2, "give either a prompt or --prompts FILE"),
        (["a", "--prompts", "x"], 2, "give either a prompt or --prompts FILE"),
        (["a", "--target-only", "--method", "sd"], 2, "--target-only has no --method"),
        (["a", "--target-only", "--speculator", "x"], 2, "--coupling or --speculator"),
        (
            ["a", "--speculator", "/nowhere"],
            1,
            "/nowhere holds no speculator; expected a directory",
        ),
        (["a", "--dtype", "int3"], 2, "'int3' is unknown; use one of auto, float32, bfloat16"),
        (["--prompts", "/nowhere"], 1, "/nowhere cannot be read: No such file"),
        (["--prompts", "/dev/null"], 1, "/dev/null holds no prompts"),
        (["a", "--target-only", "--target", "/nowhere"], 1, "no such model directory: '/nowhere'"),
    ],
)
def test_bad_input_is_one_clear_line(args: list[str], status: int, words: str) -> None:
    done = CliRunner().invoke(app, ["generate", *args])
    assert (done.exit_code, done.stdout) == (status, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny(folder / "target", num_layers=3)
    draft = save_tiny(folder / "draft", num_layers=1)
    return ["--target", str(target), "--draft", str(draft), "--dtype", "float32"]


def alone(*args: str) -> str:
    """What `e2sci generate --target-only` prints; it runs in this process."""
    done = CliRunner().invoke(app, ["generate", "--target-only", *args])
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.long
@pytest.mark.slow
async def test_together_and_alone_give_the_same_tokens_in_the_same_shape(
    pair: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "a dog", "max_new_tokens": 5}\n')
    flags = ["--prompts", str(prompts), "--json", "--max-new-tokens", "16", *pair]
    together = await e2sci("generate", "--window", "3", *flags)
    assert (together.status, together.err) == (0, "")
    lines = zip(together.out.splitlines(), alone(*flags).splitlines(), strict=True)
    answers = [(json.loads(one), json.loads(other)) for one, other in lines]
    assert len(answers) == 2
    for ours, theirs in answers:
        assert ours["token_ids"] == theirs["token_ids"]
        assert ours["text"] == theirs["text"]
        assert ours["finish_reason"] == theirs["finish_reason"]
        assert ours.keys() == theirs.keys() == {"token_ids", "text", "finish_reason", "stats"}
        assert ours["stats"].keys() == theirs["stats"].keys()
    assert answers[0][0]["stats"]["windows"] > 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
async def test_a_speculator_is_given_by_its_directory(
    pair: list[str], tmp_path: Path, kind: str
) -> None:
    target = TargetModel.load(pair[1], "float32", "cpu")
    directory = save_random(tmp_path / "made", kind, target)
    # more tokens than the target writes before the edge hears it
    flags = ["the cat", "--json", "--max-new-tokens", "400", *pair]
    done = await e2sci("generate", "--method", kind, "--speculator", str(directory), *flags)
    assert (done.status, done.err) == (0, "")
    answer = json.loads(done.out)
    assert answer["token_ids"] == json.loads(alone(*flags))["token_ids"]
    assert answer["stats"]["proposed"] > 0


def test_plain_output_is_the_text(pair: list[str]) -> None:
    flags = ["the cat", "--max-new-tokens", "8", *pair]
    assert alone(*flags) == f"{json.loads(alone('--json', *flags))['text']}\n"


def test_a_stop_string_ends_the_answer_before_it(pair: list[str]) -> None:
    flags = ["the cat", "--max-new-tokens", "12", "--json", *pair]
    whole = json.loads(alone(*flags))
    stop = whole["text"][3:5]
    cut = json.loads(alone(*flags, "--stop", stop))
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]


def test_a_prompt_beyond_the_context_is_refused(pair: list[str]) -> None:
    args = ["generate", "--target-only", "the cat", "--max-new-tokens", "100000", *pair]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 1
    assert "more than the 512 of the model's context" in done.stderr


@pytest.mark.parametrize("command", [["generate", "a"], ["up"]])
@pytest.mark.parametrize(
    ("option", "spec", "words"),
    [
        ("--target", "/nowhere/model", "no such model directory: '/nowhere/model'"),
        ("--draft", "/nowhere/draft", "no such model directory: '/nowhere/draft'"),
        ("--draft", "/nowhere/draft@512", "no such model directory: '/nowhere/draft'"),
        ("--target", "/nowhere/model.gguf", "no such file: '/nowhere/model.gguf'"),
        ("--target", "qwen2.5-coder", "is a pair, not a model"),
    ],
)
def test_an_unknown_model_is_one_clear_line_before_anything_starts(
    command: list[str], option: str, spec: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stack, "start", _must_not_start)
    done = CliRunner().invoke(app, [*command, option, spec])
    assert (done.exit_code, done.stdout) == (1, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


async def _must_not_start(_: Stack) -> None:
    pytest.fail("processes were started")


def test_a_command_that_cannot_start_loads_no_torch() -> None:
    """It is the parent of the workers, and answers at once."""
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from cli.main import app\n"
        "done = CliRunner().invoke(app, ['generate', 'a', '--target', '/nowhere/model'])\n"
        "assert 'no such model directory' in done.stderr, done.stderr\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.long
async def test_a_model_that_a_worker_refuses_is_one_clear_line(
    pair: list[str], tmp_path: Path
) -> None:
    """What only a worker can know: the directory is there, and holds no weights."""
    (tmp_path / "config.json").write_text("{}")
    flags = ["--target", str(tmp_path), *pair[2:], "--drafter", "none"]
    done = await e2sci("generate", "a", *flags)
    assert done.status == 1
    assert f"cannot load the model in {tmp_path}" in done.err
    assert done.err.count("\n") == 1
