"""`e2sci bench exactness`: is a lossless method's text the target's own? (DESIGN rule 6)

Answers our twenty prompts as a user would, by `e2sci generate` with real processes, and by the
target alone, and compares token ids. In float32 a first difference is excused only where the
target's top-2 logit lead is under 1e-3. In bfloat16 windows and single tokens go through other
matrix shapes: the answer is replayed both ways, ε = max |Δlogit| is printed, and every committed
token must lie within 2ε of the maximum. Above temperature 0 the same seed must give the same
tokens under two window sizes, or over every link; there a first difference is excused only where a
uniform lies within 1e-4 of a decision boundary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
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
class GreedyVerdict:
    """One way of answering, at temperature 0, against the target alone.

    Attributes:
        num_identical: answers with the target's own token ids.
        num_excused: of the others, those whose first difference is a near-tie.
        epsilon: ε in logits, worst_shortfall: how far a token lies below the maximum; float32
            answers are not replayed for them and have None.
    """

    way: str
    num_identical: int
    num_excused: int
    epsilon: float | None
    worst_shortfall: float | None


@dataclass(frozen=True, slots=True)
class SampledVerdict:
    """One way of answering, above temperature 0, against the first way.

    Attributes:
        margins: of answers that differ, how near the deciding uniform was to a boundary.
    """

    way: str
    num_identical: int
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out."""

    dtype: str
    method: str
    num_prompts: int
    greedy: tuple[GreedyVerdict, ...]
    sampled: tuple[SampledVerdict, ...]

    @property
    def passed(self) -> bool:
        """Whether rule 6 holds."""
        return all(self._holds(greedy) for greedy in self.greedy) and all(
            margin < EXCUSED_MARGIN for sampled in self.sampled for margin in sampled.margins
        )

    def _holds(self, greedy: GreedyVerdict) -> bool:
        if greedy.epsilon is not None and greedy.worst_shortfall is not None:
            return greedy.worst_shortfall <= 2 * greedy.epsilon
        return greedy.num_identical + greedy.num_excused == self.num_prompts


Answers = list[tuple[int, ...]]
Ways = dict[str, list[str]]
"""What a way of answering is called → its flags of `e2sci generate`."""


def run(
    prompts: int,
    max_new_tokens: int,
    dtype: str,
    as_json: bool,
    method: str = "sd",
    links: Sequence[str] = (),
) -> bool:
    """Measure and print; whether rule 6 holds."""
    console = Console(stderr=True)
    verdict = measure(PROMPTS[:prompts], max_new_tokens, dtype, console.log, method, links)
    if as_json:
        print(json.dumps(asdict(verdict) | {"passed": verdict.passed}))
    else:
        _print(verdict)
    return verdict.passed


def measure(
    prompts: tuple[str, ...],
    max_new_tokens: int,
    dtype: str,
    say: Callable[[str], None],
    method: str = "sd",
    links: Sequence[str] = (),
) -> Verdict:
    """Generate in every way, compare, and look at what differs.

    Args:
        links: the ways, see `bench.link.profiles`; without any, this machine's loopback at
            temperature 0, and two window sizes above.
    """
    common = ["--max-new-tokens", str(max_new_tokens), "--dtype", dtype]
    over: Ways = {link: ["--link", link] for link in links}
    greedy_ways = over or {"loopback": []}
    sampled_ways = over or {f"windows of {w}": ["--window", str(w)] for w in WINDOWS}
    say("target alone, greedy")
    alone = generate(prompts, ["--target-only", *common])
    greedy: dict[str, Answers] = {}
    for way, flags in greedy_ways.items():
        say(f"{method}, greedy, {way}")
        greedy[way] = generate(prompts, ["--method", method, *common, *flags])
    sampling = ["--temperature", str(TEMPERATURE), "--seed", str(SEED)]
    sampled: dict[str, Answers] = {}
    for way, flags in sampled_ways.items():
        say(f"{method}, temperature {TEMPERATURE}, {way}")
        sampled[way] = generate(prompts, ["--method", method, *common, *sampling, *flags])
    target = TargetModel.load("default", dtype)
    encoded = [encode_prompt(target.tokenizer, prompt, raw=False) for prompt in prompts]
    first = next(iter(sampled.values()))
    return Verdict(
        dtype,
        method,
        len(prompts),
        tuple(_judge_greedy(target, way, encoded, alone, greedy[way]) for way in greedy),
        tuple(_judge_sampled(target, way, encoded, first, sampled[way]) for way in sampled),
    )


def _judge_greedy(
    target: TargetModel, way: str, prompts: Answers, alone: Answers, answers: Answers
) -> GreedyVerdict:
    differing = [
        (p, a, b) for p, a, b in zip(prompts, alone, answers, strict=True) if a != b
    ]  # fmt: skip
    epsilon = worst = None
    if target.dtype != torch.float32:
        replays = list(track(list(zip(prompts, answers, strict=True)), "replaying", console=_err()))
        epsilon = max(replay_windows(target, p, a, REPLAY_WINDOW) for p, a in replays)
        worst = max(max(replay_shortfalls(target, p, a), default=0.0) for p, a in replays)
    return GreedyVerdict(
        way,
        len(prompts) - len(differing),
        sum(_is_near_tie(target, *case) for case in differing),
        epsilon,
        worst,
    )


def _judge_sampled(
    target: TargetModel, way: str, prompts: Answers, first: Answers, answers: Answers
) -> SampledVerdict:
    identical = sum(a == b for a, b in zip(first, answers, strict=True))
    return SampledVerdict(way, identical, _margins(target, prompts, [first, answers]))


def generate(prompts: tuple[str, ...], flags: list[str]) -> Answers:
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


def _margins(target: TargetModel, prompts: Answers, sampled: list[Answers]) -> tuple[float, ...]:
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
    console.print(f"{verdict.method}, {verdict.dtype}, {total} prompts (measured):")
    for greedy in verdict.greedy:
        console.print(
            f"  greedy, {greedy.way}: {greedy.num_identical} of {total} have the target's own "
            f"token ids"
        )
        if greedy.epsilon is None:
            console.print(
                f"    excused as near-ties (lead < {EXCUSED_LEAD:g}): {greedy.num_excused}"
            )
        else:
            console.print(f"    ε = {greedy.epsilon:.4f} logits between single tokens and windows")
            console.print(
                f"    farthest below the maximum: {greedy.worst_shortfall:.4f} (limit 2ε)"
            )
    reference = verdict.sampled[0].way
    for sampled in verdict.sampled[1:]:
        console.print(
            f"  temperature {TEMPERATURE}, one seed, {sampled.way} against {reference}: "
            f"{sampled.num_identical} of {total} identical"
        )
        for margin in sampled.margins:
            console.print(f"    texts part where a uniform lies {margin:.1e} from a boundary")
    console.print(f"  rule 6: {'holds' if verdict.passed else 'BROKEN'}")
