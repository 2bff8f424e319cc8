"""One draft over one link: find `sd`'s best static window, then let all methods take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from bench.answers import read_answer
from bench.cores import pin, put_models_last
from bench.pace.alone import TargetAlone, alone_row
from bench.pace.plan import SWEEP_PROMPTS, Plan, Setting
from bench.pace.rows import PaceRow, StackRow, tokens_per_s
from bench.paced import Device
from bench.prompts import PROMPTS
from bench.telemetry import read_telemetry
from bench.windows import climb, first_guess
from bus.client import Client
from bus.store import DraftSpan, TimelineEntry
from decoding import methods
from launch.link.process import read_report
from launch.stack import Stack, StackOptions

_SWEEP = -1
Tick = Callable[[], None]


class MeasuredStack:
    """Edge, cloud and link of one setting.

    Args:
        device: whose times steps and passes take.
        answers: file of recorded answers for an oracle draft.
        alone: takes its turns with the methods, or None.
        tick: called after each prompt of a repetition, answered by all methods.
    """

    def __init__(
        self, plan: Plan, setting: Setting, device: Device, answers: Path,
        alone: TargetAlone | None, tick: Tick,
    ) -> None:  # fmt: skip
        self._plan, self._setting, self._alone, self._tick = plan, setting, alone, tick
        # speeds of whole answers take in the prompt, which no method is to find already run
        env = {"E2SCI_TIMELINE": "1", "E2SCI_PREFIX_CACHE_MB": "0", **device.env()}
        if setting.error_rate is not None:
            env |= {
                "E2SCI_ORACLE": str(answers),
                "E2SCI_ORACLE_ERROR_RATE": str(setting.error_rate),
            }
        options = StackOptions(
            target=plan.target, draft=setting.draft, dtype=plan.dtype, drafter="model", threads=1,
            link=f"{setting.rtt_ms:g}ms", middle=int(methods.need_middle(plan.methods)),
        )  # fmt: skip
        self._stack = Stack(options, log=lambda _: None, quiet=True, env=env)

    async def run(self) -> tuple[list[PaceRow], list[TimelineEntry], StackRow]:
        """Everything that is measured in this setting."""
        async with self._stack:
            pin(self._stack)
            models_last = put_models_last(self._stack)
            async with Client(redis_url=self._stack.redis_url) as client:
                await self._warm_up(client)
                rows, window = await self._sweep(client)
                rows += await self._repetitions(client, f"sd:{window}")
            entries = await read_telemetry(self._stack.redis_url)
        timelines = [entry for entry in entries if isinstance(entry, TimelineEntry)]
        return rows, timelines, self._stack_row(timelines, models_last)

    async def _warm_up(self, client: Client) -> None:
        for method in ("sd", *self._plan.methods):
            await self._answer(client, method, _SWEEP, 0)

    async def _sweep(self, client: Client) -> tuple[list[PaceRow], int]:
        """Answers with all windows tried, and the best window."""
        rows: list[PaceRow] = []

        async def speed(window: int) -> float:
            own = [
                await self._answer(client, f"sd:{window}", _SWEEP, prompt_id)
                for prompt_id in range(min(SWEEP_PROMPTS, self._plan.prompts))
            ]
            rows.extend(own)
            return tokens_per_s(own)

        speeds = await climb(speed, first_guess(self._setting.error_rate))
        return rows, max(speeds, key=speeds.__getitem__)

    async def _repetitions(self, client: Client, sd: str) -> list[PaceRow]:
        rows = []
        for repeat in range(self._plan.repeats):
            for prompt_id in range(self._plan.prompts):
                rows += [
                    await self._answer(client, method, repeat, prompt_id)
                    for method in self._plan.turns(repeat, prompt_id, sd)
                ]
                if self._alone is not None and prompt_id % self._plan.repeats == repeat:
                    rows.append(self._answer_alone(self._alone, repeat, prompt_id))
                self._tick()
        return rows

    async def _answer(self, client: Client, method: str, repeat: int, prompt_id: int) -> PaceRow:
        got = await read_answer(
            client, PROMPTS[prompt_id], method=method, temperature=0.0,
            max_new_tokens=self._plan.max_new_tokens, seed=self._plan.seed(prompt_id, repeat),
        )  # fmt: skip
        at = self._setting
        return PaceRow(
            at.draft, at.error_rate, at.rtt_ms, method, repeat, prompt_id,
            got.usage.decode_tokens, got.usage.decode_seconds, got.usage,
        )  # fmt: skip

    def _answer_alone(self, alone: TargetAlone, repeat: int, prompt_id: int) -> PaceRow:
        row = alone_row(*alone.answer(prompt_id), prompt_id)
        return replace(row, draft=self._setting.draft, rtt_ms=self._setting.rtt_ms, repeat=repeat)

    def _stack_row(self, timelines: Sequence[TimelineEntry], models_last: bool) -> StackRow:
        report = read_report(list(self._stack.process("link-1").last_lines))
        at = self._setting
        return StackRow(
            at.draft, at.error_rate, at.rtt_ms, _step_ms(timelines), report.late_median_ms,
            report.late_p99_ms, report.late_max_ms, models_last,
        )  # fmt: skip


def _step_ms(timelines: Sequence[TimelineEntry]) -> float:
    """Median over the draft jobs of all sessions in lockstep, their first one left out: it holds
    the prompt."""
    return statistics.median(
        (span.end_ms - span.at_ms) / span.num_tokens
        for entry in timelines
        if (method := methods.find(entry.method)) is not None and method.lockstep
        for span in [e for e in entry.events if isinstance(e, DraftSpan)][1:]
        if span.num_tokens
    )
