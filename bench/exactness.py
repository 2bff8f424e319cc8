"""`e2sci bench exactness`: is `sd` the target's own text? (DESIGN rule 6)

Answers our twenty prompts as a user would, by `e2sci generate` with real processes, and by the
target alone, and compares token ids. In float32 a first difference is excused only where the
target's top-2 logit lead is under 1e-3. In bfloat16 windows and single tokens go through other
matrix shapes: the answer is replayed both ways, ε = max |Δlogit| is printed, and every committed
token must lie within 2ε of the maximum. Above temperature 0 the same seed must give the same
tokens under two window sizes; there a first difference is excused only where a uniform lies within
1e-4 of a decision boundary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bench.margins import decision_margin
from bench.prompts import PROMPTS
from bus.errors import E2SCIError
from cloud_worker.reference import replay_gaps, replay_shortfalls, replay_windows
from cloud_worker.target_model import TargetModel
from decoding.sampling import SamplingParams
from edge_worker.draft_model import DraftModel
from models.tokenizer import encode_prompt

EXCUSED_LEAD = 1e-3
EXCUSED_MARGIN = 1e-4
SEED = 1234
TEMPERATURE = 0.8
WINDOWS = (4, 7)
REPLAY_WINDOW = 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out.

    Attributes:
        num_identical: greedy answers of `sd` with the target's own token ids.
        num_excused: of the others, those whose first difference is a near-tie.
        epsilon: ε in logits; float32 answers are not replayed for it and have None.
        num_sampled_identical: sampled answers that are the same under both window sizes.
        sampled_margins: of the others, how near the deciding uniform was to a boundary.
    """

    dtype: str
    num_prompts: int
    num_identical: int
    num_excused: int
    epsilon: float | None
    worst_shortfall: float | None
    num_sampled_identical: int
    sampled_margins: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether rule 6 holds."""
        if self.epsilon is not None and self.worst_shortfall is not None:
            return self.worst_shortfall <= 2 * self.epsilon
        return self.num_identical + self.num_excused == self.num_prompts and all(
            margin < EXCUSED_MARGIN for margin in self.sampled_margins
        )


def run(prompts: int, max_new_tokens: int, dtype: str, as_json: bool) -> bool:
    """Measure and print; whether rule 6 holds."""
    console = Console(stderr=True)
    verdict = measure(PROMPTS[:prompts], max_new_tokens, dtype, console.log)
    if as_json:
        print(json.dumps(asdict(verdict) | {"passed": verdict.passed}))
    else:
        _print(verdict)
    return verdict.passed


def measure(
    prompts: tuple[str, ...], max_new_tokens: int, dtype: str, say: Callable[[str], None]
) -> Verdict:
    """Generate all three ways, compare, and look at what differs."""
    common = ["--max-new-tokens", str(max_new_tokens), "--dtype", dtype]
    say("target alone, greedy")
    alone = generate(prompts, ["--target-only", *common])
    say("sd, greedy")
    greedy = generate(prompts, ["--method", "sd", *common])
    sampled = []
    for window in WINDOWS:
        say(f"sd, temperature {TEMPERATURE}, windows of {window}")
        extra = ["--temperature", str(TEMPERATURE), "--seed", str(SEED), "--window", str(window)]
        sampled.append(generate(prompts, ["--method", "sd", *common, *extra]))
    target = TargetModel.load("default", dtype)
    encoded = [encode_prompt(target.tokenizer, prompt, raw=False) for prompt in prompts]
    epsilon = worst = None
    if dtype != "float32":
        replays = list(track(list(zip(encoded, greedy, strict=True)), "replaying", console=_err()))
        epsilon = max(replay_windows(target, p, a, REPLAY_WINDOW) for p, a in replays)
        worst = max(max(replay_shortfalls(target, p, a), default=0.0) for p, a in replays)
    differing = [
        (p, a, b) for p, a, b in zip(encoded, alone, greedy, strict=True) if a != b
    ]  # fmt: skip
    return Verdict(
        dtype=dtype,
        num_prompts=len(prompts),
        num_identical=len(prompts) - len(differing),
        num_excused=sum(_is_near_tie(target, *case) for case in differing),
        epsilon=epsilon,
        worst_shortfall=worst,
        num_sampled_identical=sum(a == b for a, b in zip(*sampled, strict=True)),
        sampled_margins=_margins(target, encoded, sampled),
    )


def generate(prompts: tuple[str, ...], flags: list[str]) -> list[tuple[int, ...]]:
    """Token ids of each prompt's answer, by the command a user would type.

    Raises:
        E2SCIError: the command failed; its own words follow.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), "utf-8")
        command = [str(Path(sys.executable).with_name("e2sci")), "generate"]
        done = subprocess.run(
            [*command, "--prompts", str(path), "--json", *flags],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise E2SCIError(f"{' '.join(command + flags)} failed: {done.stderr.strip()[-1000:]}")
    return [tuple(json.loads(line)["token_ids"]) for line in done.stdout.splitlines()]


def _is_near_tie(
    target: TargetModel, prompt: tuple[int, ...], alone: tuple[int, ...], other: tuple[int, ...]
) -> bool:
    """Whether the first difference stands where the target itself hardly prefers its choice."""
    first = _num_shared(alone, other)
    if first == min(len(alone), len(other)):
        return False  # one answer is longer: a missing token is no near-tie
    _, lead = replay_gaps(target, prompt, alone[: first + 1])[first]
    return lead < EXCUSED_LEAD


def _num_shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens before the first difference."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _margins(
    target: TargetModel, prompts: list[tuple[int, ...]], sampled: list[list[tuple[int, ...]]]
) -> tuple[float, ...]:
    """Of each pair of sampled answers that differ: the margin where they part."""
    cases = [
        (p, a, b) for p, a, b in zip(prompts, *sampled, strict=True) if a != b
    ]  # fmt: skip
    if not cases:
        return ()
    draft = DraftModel.load("default", str(target.dtype).removeprefix("torch."))
    params = SamplingParams(TEMPERATURE, seed=SEED)
    return tuple(
        decision_margin(target, draft, prompt + a[: _num_shared(a, b)], params)
        for prompt, a, b in cases
    )


def _err() -> Console:
    return Console(stderr=True)


def _print(verdict: Verdict) -> None:
    console = Console()
    total = verdict.num_prompts
    console.print(f"{verdict.dtype}, {total} prompts (measured):")
    console.print(f"  greedy: {verdict.num_identical} of {total} have the target's own token ids")
    if verdict.epsilon is None:
        console.print(f"  excused as near-ties (lead < {EXCUSED_LEAD:g}): {verdict.num_excused}")
    else:
        console.print(f"  ε = {verdict.epsilon:.4f} logits between single tokens and windows")
        console.print(f"  farthest below the maximum: {verdict.worst_shortfall:.4f} (limit 2ε)")
    console.print(
        f"  temperature {TEMPERATURE}, one seed, windows of {WINDOWS[0]} and {WINDOWS[1]}: "
        f"{verdict.num_sampled_identical} of {total} identical"
    )
    for margin in verdict.sampled_margins:
        console.print(f"  the texts part where a uniform lies {margin:.1e} from a boundary")
    console.print(f"  rule 6: {'holds' if verdict.passed else 'BROKEN'}")
