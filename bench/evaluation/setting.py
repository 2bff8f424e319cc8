"""One installation: best static windows first, then every prompt answered by all methods in turns.

An answer is kept as soon as all methods have answered its prompts, marked and judged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from bench.cores import one_core, pin, put_models_last
from bench.datasets import Question
from bench.energy import PowerModel
from bench.evaluation.answers import (
    TimedAnswer,
    answer_alone,
    answer_colocated,
    answer_together,
)
from bench.evaluation.baseline_server import BaselineServer, ServedModels
from bench.evaluation.paddings import PaddingMeter
from bench.evaluation.plan import (
    COLOCATED,
    EDGE_TARGET,
    TARGET,
    Plan,
    Setting,
    colocated_window,
    is_baseline,
    needs_sweep,
)
from bench.evaluation.rows import AnswerRow, Key, PaddingRow, SweepRow, WindowRow
from bench.reference import AnswerQuality, generate_alone, score
from bench.tasks import RunProgram, mark, prompt_of
from bench.telemetry import newest_entry, told_of
from bench.turns import in_turn
from bench.windows import climb, first_guess
from bus.client import Client
from bus.settings import BusSettings
from bus.store import Store
from decoding import methods
from decoding.sampling import SamplingParams
from engines.chat import encode_prompt
from engines.energy import MODELLED
from engines.tokenizer import decode
from engines.torch.target import TargetModel
from launch.stack import Stack, StackOptions

LAST_THRESHOLD = 0.69
"""Bound of the cloud worker in nats: as good as none, so that baselines can be swept."""
SEED = 1
WARM_UP_TOKENS, WARM_UP_WINDOW = 16, 4
_REPORTS_S = 2.0

Kept = AnswerRow | WindowRow | SweepRow | PaddingRow
Keep = Callable[[Sequence[Kept]], None]


class Judge:
    """Marks answers and asks the target how likely they are. Answers that are alike are judged
    once.

    Args:
        run_program: runs what models write; None leaves code without a mark.
    """

    def __init__(self, target: str, dtype: str, run_program: RunProgram | None) -> None:
        self._target = TargetModel.load(target, dtype)
        self._run_program = run_program
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], AnswerQuality] = {}

    @property
    def dtype(self) -> str:
        """Number format of the target, as it was loaded."""
        return str(self._target.dtype).removeprefix("torch.")

    def encode(self, prompt: str) -> tuple[int, ...]:
        return encode_prompt(self._target.tokenizer, prompt, raw=False)

    def decode(self, tokens: Sequence[int]) -> str:
        return decode(self._target.tokenizer, tokens)

    def own_answer(self, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
        """The target's own, greedy."""
        target = self._target
        return tuple(
            generate_alone(target, prompt, SamplingParams(), max_new_tokens, target.eos_tokens)
        )

    def quality(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> AnswerQuality:
        known = self._known.get((prompt, tokens))
        if known is None:
            with one_core(last=True):
                known = score(self._target, prompt, tokens)
            self._known[prompt, tokens] = known
        return known

    def mark(self, question: Question, text: str) -> bool | None:
        return mark(question, text, self._run_program)


class MeasuredSetting:
    """All that is still missing of one setting.

    Args:
        done: what has been measured. sweeps: windows found before.
        keep: takes rows as they are complete. tick: called for each answer.
    """

    def __init__(
        self, plan: Plan, setting: Setting, judge: Judge, answers: Path, done: frozenset[Key],
        sweeps: Sequence[SweepRow], keep: Keep, tick: Callable[[], None],
    ) -> None:  # fmt: skip
        self._plan, self._setting, self._judge, self._answers = plan, setting, judge, answers
        self._done, self._keep, self._tick = done, keep, tick
        self._windows = {
            row.method: row.best
            for row in sweeps
            if (row.rtt_ms, row.draft, row.variant, row.device) == setting.where
        }
        self._padding = PaddingMeter(setting, answers.parent)
        self._power = PowerModel()
        self._telemetry_read = "0"

    async def run(self, measured: Sequence[Question], others: Sequence[Question]) -> None:
        """Answer what is missing of `measured`; sweep on `others`."""
        async with AsyncExitStack() as exits:
            await self._start(exits)
            for name in self._plan.methods:
                await self._answer(name, others[0], WARM_UP_TOKENS)
            for name in self._plan.methods:
                if needs_sweep(name) and name not in self._windows:
                    await self._sweep(name, others)
            size = self._plan.clients
            for begin in range(0, len(measured), size):
                await self._batch(measured[begin : begin + size], begin // size)

    async def _start(self, exits: AsyncExitStack) -> None:
        plan, setting = self._plan, self._setting
        link = f"{setting.rtt_ms:g}ms"
        oracle = setting.error_rate is not None
        options = StackOptions(
            target=plan.target, draft=plan.draft, dtype=plan.dtype, threads=1, link=link,
            drafter="model" if oracle else setting.draft,
            middle=int(methods.need_middle(plan.methods)), speculator=plan.speculator,
        )  # fmt: skip
        stack = Stack(options, log=lambda _: None, quiet=True, env=self._env())
        self._baselines = None
        if any(map(is_baseline, plan.methods)):
            self._baselines = await exits.enter_async_context(BaselineServer(self._served(), link))
        await exits.enter_async_context(stack)
        pin(stack)
        put_models_last(stack)
        self._client = await exits.enter_async_context(Client(redis_url=stack.redis_url))
        self._store = await Store.connect(BusSettings.load(redis_url=stack.redis_url))
        exits.push_async_callback(self._store.close)

    def _served(self) -> ServedModels:
        """What the baselines need."""
        plan, setting = self._plan, self._setting
        colocated = any(name.startswith(COLOCATED) for name in plan.methods)
        return ServedModels(
            plan.target, plan.draft if colocated else None, plan.dtype,
            drafter="model" if setting.error_rate is not None else setting.draft,
            device=setting.device, counts=self._padding.folder,
        )  # fmt: skip

    def _env(self) -> dict[str, str]:
        env = self._setting.device.env(self._padding.folder) | {
            "E2SCI_TIMELINE": "1", "E2SCI_REPORTS": "1",
            "E2SCI_THRESHOLD_MAX": str(LAST_THRESHOLD),
            "E2SCI_CALIBRATION": self._plan.calibration,
            "E2SCI_SLOTS": str(max(4, self._plan.clients)),
            # else whichever method comes second to a prompt begins sooner, and the baselines never
            "E2SCI_PREFIX_CACHE_MB": "0",
        }  # fmt: skip
        name, value = self._setting.variation
        if name:
            env[f"E2SCI_{name.upper()}"] = value
        if self._setting.error_rate is not None:
            env["E2SCI_ORACLE"] = str(self._answers.resolve())
            env["E2SCI_ORACLE_ERROR_RATE"] = str(self._setting.error_rate)
        return env

    async def _sweep(self, name: str, questions: Sequence[Question]) -> None:
        async def speed(window: int) -> float:
            answers = [await self._answer(f"{name}:{window}", q) for q in questions]
            seconds = sum(answer.decode_seconds for answer in answers)
            return sum(answer.decode_tokens for answer in answers) / max(seconds, 1e-9)

        speeds = await climb(speed, first_guess(self._setting.error_rate))
        self._windows[name] = max(speeds, key=speeds.__getitem__)
        rtt_ms, draft, variant, device = self._setting.where
        row = SweepRow(
            method=name, rtt_ms=rtt_ms, draft=draft, variant=variant, best=self._windows[name],
            tried=speeds, device=device,
        )  # fmt: skip
        self._keep([row])

    async def _batch(self, questions: Sequence[Question], number: int) -> None:
        """Prompts that are answered at once, by one method after the other."""
        rows: list[Kept] = []
        self._telemetry_read = await newest_entry(self._store, self._telemetry_read)
        for name in in_turn(self._plan.methods, number):
            missing = [q for q in questions if self._setting.key(name, q) not in self._done]
            if not missing:
                continue
            self._padding.begin()
            began = asyncio.get_running_loop().time()
            answers = await asyncio.gather(*(self._answer(self._ran(name), q) for q in missing))
            batch_s = asyncio.get_running_loop().time() - began
            rows += self._padding.end(name)
            batch = f"{missing[0].dataset}-{missing[0].index}"  # no question is asked twice
            for question, answer in zip(missing, answers, strict=True):
                rows.append(self._row(name, question, answer, batch, batch_s))
                if answer.session:
                    rows.append(await self._window_row(name, question, answer, number == 0))
                self._tick()
        self._keep(rows)

    def _ran(self, name: str) -> str:
        window = self._windows.get(name)
        return name if window is None else f"{name}:{window}"

    async def _answer(
        self, name: str, question: Question, max_new_tokens: int | None = None
    ) -> TimedAnswer:
        prompt, most = prompt_of(question), max_new_tokens or self._plan.max_new_tokens
        if is_baseline(name):
            assert self._baselines is not None
            encoded, window = self._judge.encode(prompt), colocated_window(name) or WARM_UP_WINDOW
            if name in (TARGET, EDGE_TARGET):
                return await answer_alone(self._baselines, encoded, most, name == EDGE_TARGET)
            return await answer_colocated(self._baselines, encoded, most, window)
        seed = SEED + question.index
        return await answer_together(
            self._client, prompt, method=name, max_new_tokens=most, seed=seed
        )

    def _row(
        self, name: str, question: Question, answer: TimedAnswer, batch: str, batch_s: float
    ) -> AnswerRow:
        key = self._setting.key(name, question)
        text = self._judge.decode(answer.token_ids) if answer.text is None else answer.text
        quality = self._judge.quality(self._judge.encode(prompt_of(question)), answer.token_ids)
        energy_j = self._energy_j(name, answer)
        return AnswerRow(
            method=name, ran=self._ran(name), dataset=key.dataset, prompt_id=key.prompt_id,
            rtt_ms=key.rtt_ms, draft=key.draft, variant=key.variant, clients=self._plan.clients,
            tokens=len(answer.token_ids), seconds=answer.seconds, batch_seconds=batch_s,
            decode_tokens=answer.decode_tokens, decode_seconds=answer.decode_seconds,
            tokens_per_s=answer.decode_tokens / max(answer.decode_seconds, 1e-9),
            first_token_ms=answer.first_token_ms, gap_p50_ms=answer.gap_ms(50),
            gap_p95_ms=answer.gap_ms(95), usage=answer.usage,
            right=self._judge.mark(question, text),
            nats_per_token=quality.log_likelihood / quality.num_tokens,
            agreement=quality.num_greedy / quality.num_tokens,
            regret=quality.regret / quality.num_tokens, energy_j=energy_j,
            energy_source=MODELLED, text=text, token_ids=answer.token_ids,
            device=key.device, dtype=self._judge.dtype, batch=batch,
        )  # fmt: skip

    def _energy_j(self, name: str, answer: TimedAnswer) -> float:
        if is_baseline(name):
            return self._power.alone_j(answer.seconds, on_edge=name == EDGE_TARGET)
        assert answer.usage is not None
        return self._power.answer_j(
            answer.seconds, answer.first_token_ms / 1e3, answer.decode_seconds, answer.usage
        )

    async def _window_row(
        self, name: str, question: Question, answer: TimedAnswer, with_timeline: bool
    ) -> WindowRow:
        told = await told_of(
            self._store, answer.session, self._telemetry_read, _REPORTS_S, with_timeline=True
        )
        heard = [
            r
            for w in told.windows
            if (r := told.reports.get((w.incarnation, w.number))) is not None
        ]
        return WindowRow(
            key=self._setting.key(name, question), windows=told.windows,
            expected=tuple(r.expected_accepted / max(r.num_drafted, 1) for r in heard),
            timeline=told.timeline if with_timeline else None,
        )  # fmt: skip
