"""Answers in steps, with toy engines over real sockets and a real Valkey."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from bus.protocol.messages import FinishReason, OpenSession
from bus.store import WindowEntry
from decoding import methods, steps
from decoding.engine import Segment
from decoding.sampling import SamplingParams
from edge_worker import server
from engines.kinds import DrafterKind, drafter_of
from tests.edge_worker.shell import NEVER, PAIR, Drafter, House, ToyTokenizer
from tests.toy import ToyDraft, target_alone

MOST = 60


class BlankTokenizer(ToyTokenizer):
    """One token in three is a blank line: the judge does not distinguish those."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return "\n\n" if token % 3 == 0 else super().convert_ids_to_tokens(token)


TOKENIZER = BlankTokenizer()


def start(house: House, **settings: Any) -> None:
    house.start(Drafter(tokenizer=TOKENIZER), **settings)


def step_of(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The first step of a text."""
    whole = (n for n in range(1, len(tokens)) if steps.is_whole(TOKENIZER.decode(tokens[:n])))
    return tokens[: next(whole, len(tokens))]


def by_definition(
    name: str, method: str, sampling: SamplingParams | None = None
) -> tuple[tuple[int, ...], list[bool]]:
    """Tokens of an answer, and which of its steps are the draft's: step after step."""
    rule, sampling = methods.find(method).steps, sampling or SamplingParams()  # type: ignore[union-attr]
    assert rule is not None
    prompt = text = tuple(TOKENIZER.encode(f"prompt {name}"))
    accepted = []
    while (room := min(rule.max_tokens, MOST - len(text) + len(prompt))) > 0:
        _, ours, _, _ = ToyDraft(PAIR, sampling).draft(text, room, NEVER)
        drafted = step_of(ours)
        written = step_of(target_alone(PAIR, text, sampling, room, NEVER))
        texts = TOKENIZER.decode(drafted), TOKENIZER.decode(written)
        same = steps.is_whole(texts[0]) == steps.is_whole(texts[1]) and rule.judge(*texts)
        text += drafted if same else written
        accepted.append(same)
    return text[len(prompt) :], accepted


@pytest.mark.parametrize("method", ["lookahead", "lookahead-similar"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_answers_are_those_of_one_step_after_the_other(
    house: House, method: str, temperature: float
) -> None:
    house.cloud(pass_s=0.001)
    start(house)
    fields = {"method": method, "max_new_tokens": MOST, "temperature": temperature, "seed": 3}
    names = [f"r{i}" for i in range(4)]
    for name in names:
        await house.submit(name, **fields)
    sampling = SamplingParams(temperature, seed=3)
    accepted_steps, refused_steps = list[int](), list[int]()
    for name in names:
        tokens, text, end = await house.answer(name)
        expected, accepted = by_definition(name, method, sampling)
        assert end.end.error == ""
        assert tokens == expected
        assert text == TOKENIZER.decode(expected)
        usage = end.end.usage
        assert (usage.steps, usage.accepted_steps) == (len(accepted), sum(accepted))
        accepted_steps.append(usage.accepted_steps)
        refused_steps.append(usage.steps - usage.accepted_steps)
        assert usage.judge == methods.find(method).steps.judge.name  # type: ignore[union-attr]
        assert not usage.lossless
        assert usage.passes > 0
        assert min(usage.bytes_up, usage.bytes_down) > 0
    assert min(sum(accepted_steps), sum(refused_steps)) > 0


async def test_the_text_is_not_the_targets_own(house: House) -> None:
    """Else the method would be labelled wrongly."""
    texts = {name: by_definition(name, "lookahead")[0] for name in ("r0", "r1", "r2", "r3")}
    start(house)
    assert any(text != house.expected(name, MOST) for name, text in texts.items())


async def test_telemetry_shows_a_window_for_each_step(house: House) -> None:
    house.cloud()
    start(house)
    await house.submit("r1", method="lookahead", max_new_tokens=MOST)
    tokens, _, _ = await house.answer("r1")
    entries = await house.telemetry(1)
    windows = [entry for entry in entries if isinstance(entry, WindowEntry)]
    _, accepted = by_definition("r1", "lookahead")
    assert [not window.rollback for window in windows] == accepted
    assert sum(window.num_committed for window in windows) == len(tokens)
    assert {window.request for window in windows} == {"r1"}
    assert all(w.num_accepted == (0 if w.rollback else w.num_committed) for w in windows)
    assert any(window.draft_ms > 0 for window in windows)


async def test_the_target_writes_several_steps_at_once(house: House) -> None:
    """Sessions of different steps share passes."""
    cloud = house.cloud(pass_s=0.01)
    sizes: list[int] = []
    run = cloud.target.run

    def counted(batch: list[Segment[Any]]) -> Any:
        sizes.append(len(batch))
        return run(batch)

    cloud.target.run = counted
    start(house)
    await house.submit("r1", method="lookahead", max_new_tokens=MOST)
    await house.answer("r1")
    assert max(sizes) > 1
    assert max(sizes) <= 5
    opened = [message for message in house.sent if isinstance(message, OpenSession)]
    # One that is slow to be ready is asked for again, under the same incarnation.
    asked = {(message.session, message.incarnation) for message in opened}
    assert len({session for session, _ in asked}) == len(asked)
    assert {message.method for message in opened} == {"lookahead"}


async def test_a_stop_string_ends_the_answer_inside_a_step(house: House) -> None:
    house.cloud()
    start(house)
    expected, _ = by_definition("r1", "lookahead")
    text = TOKENIZER.decode(expected)
    at = next(i for i in range(20, len(expected)) if expected[i] % 3)
    stop = TOKENIZER.decode(expected[at : at + 1])
    await house.submit("r1", method="lookahead", max_new_tokens=MOST, stop=(stop,))
    tokens, shown, end = await house.answer("r1")
    first = text.index(stop)
    assert end.end.finish_reason is FinishReason.STOP
    assert shown == text[:first]
    assert TOKENIZER.decode(tokens) == text[: first + 1]
    assert tokens == expected[: len(tokens)]


async def test_cancellation_closes_every_session_of_the_answer(house: House) -> None:
    cloud = house.cloud(pass_s=0.05)
    start(house)
    await house.submit("r1", method="lookahead", max_new_tokens=MOST)
    await house.until(lambda: len(house.opens()) > 1)
    await house.store.queue.cancel("r1")
    _, _, end = await house.answer("r1")
    assert end.end.finish_reason is FinishReason.CANCELLED
    await house.until(lambda: not cloud.worker._sessions)
    await house.until(lambda: not list(house.edge._context.addresses))
    await house.submit("r2", method="lookahead", max_new_tokens=8)
    assert (await house.answer("r2"))[2].end.error == ""


@pytest.mark.parametrize("broken", ["draft", "prefill"])
async def test_a_draft_that_raises_ends_its_answer_only(house: House, broken: str) -> None:
    house.cloud()
    start(house)

    def raises(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    setattr(house.drafter, broken, raises)
    long = "x" * 400  # so long that it is read in chunks
    await house.fails("r1", "the draft failed: no memory", prompt=long, method="lookahead")
    delattr(house.drafter, broken)
    await house.submit("r2", method="lookahead", max_new_tokens=8)
    assert (await house.answer("r2"))[2].end.error == ""


async def test_a_target_that_cannot_take_a_step_ends_the_answer(house: House) -> None:
    cloud = house.cloud()
    cloud.target.vocab_size = 1
    cloud.worker._limits = replace(cloud.worker._limits, vocab_size=1)
    start(house)
    await house.fails("r1", "token ids must lie in 0 … 0", method="lookahead")


@pytest.mark.parametrize("method", ["lookahead", "lookahead-similar"])
async def test_what_steps_need_is_checked_first(
    house: House, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.cloud()
    start(house)
    await house.fails("r1", "needs coupling 'gumbel'", method=method, coupling="residual")
    await house.fails("r2", "the context of the draft", method=method, max_new_tokens=5000)
    monkeypatch.setattr(server, "NoDrafter", Drafter)  # this edge has none
    await house.fails("r3", "needs a draft", method=method)


async def test_another_cloud_worker_goes_on_where_one_leaves(house: House) -> None:
    first = house.cloud("cloud-1", pass_s=0.02)
    start(house)
    await house.submit("r1", method="lookahead", max_new_tokens=MOST)
    await house.until(lambda: len(house.opens()) > 2)
    house.cloud("cloud-2")
    house.clouds.remove(first)
    await first.lapse()
    await first.stop()
    tokens, _, end = await house.answer("r1")
    assert end.end.error == ""
    assert tokens == by_definition("r1", "lookahead")[0]


async def test_lookup_does_not_write_steps(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model does, whoever drafts for other methods."""
    house.cloud()
    monkeypatch.setattr(
        server, "drafter_for", lambda _, model: drafter_of(DrafterKind.LOOKUP, model)
    )
    start(house)
    await house.submit("r1", method="lookahead", max_new_tokens=MOST)
    tokens, _, _ = await house.answer("r1")
    assert tokens == by_definition("r1", "lookahead")[0]


async def test_sessions_of_other_methods_run_beside(house: House) -> None:
    house.cloud()
    start(house)
    await asyncio.gather(
        house.submit("r1", method="lookahead", max_new_tokens=MOST),
        house.submit("r2", method="sd", max_new_tokens=MOST),
    )
    assert (await house.answer("r1"))[0] == by_definition("r1", "lookahead")[0]
    assert (await house.answer("r2"))[0] == house.expected("r2", MOST)
