"""The scheduler over a toy target: who gets rows, whose text is whose, and whose failure."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import Ack, Feedback
from cloud_worker import scheduler as module
from cloud_worker.costs import FIRST_CHUNK, LARGEST_CHUNK, SMALLEST_CHUNK, PassCosts
from cloud_worker.scheduler import BUDGET, Scheduler
from decoding import cloud, methods
from decoding.cloud_events import (
    AckArrived,
    Crop,
    Event,
    FetchRow,
    Forward,
    OpenArrived,
    Prefill,
    Send,
    WindowArrived,
)
from decoding.cloud_state import TREE_TOKENS
from decoding.engine import ProposedTree, Segment, TargetRow
from decoding.methods import Method, medusa
from tests.sessions import OPENING, drafted_window
from tests.toy import ToyCache, ToyDraft, ToyPair, ToyTarget, likely_tree, target_alone

PAIR = ToyPair()
LIMITS = cloud.Limits(vocab_size=64, context_length=4096, threshold_min=-1.0, threshold_max=0.3)
SD, AUTO = methods.sd.METHOD, methods.auto.METHOD


class Thread:
    """The model thread, run by hand."""

    def __init__(self) -> None:
        self.jobs: deque[Callable[[], None]] = deque()

    def post(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def turn(self) -> None:
        """What is posted by now."""
        for _ in range(len(self.jobs)):
            self.jobs.popleft()()

    def run(self) -> None:
        while self.jobs:
            self.turn()


class Gauge:
    def begin(self) -> None: ...

    def end(self, seconds: float) -> None: ...


class Recorded(ToyTarget):
    """Keeps how many rows each session had in each pass; fails for one session when told to."""

    def __init__(self) -> None:
        super().__init__(PAIR)
        self.passes: list[list[int]] = []
        self.closed: list[ToyCache] = []
        self.broken: ToyCache | None = None

    def run(self, batch: Sequence[Segment[ToyCache]]) -> list[list[TargetRow]]:
        if any(segment.cache is self.broken for segment in batch):
            super().run(batch[:1])  # a pass may have done a part of its work
            raise RuntimeError("out of memory")
        self.passes.append([len(segment.tokens) for segment in batch])
        return super().run(batch)

    def close(self, cache: ToyCache) -> None:
        self.closed.append(cache)


@dataclass(eq=False)
class Client:
    """A session at the cloud whose edge drafts windows of `window` tokens, one after the other;
    with 0 none: then it only acknowledges, where `acks`."""

    scheduler: Scheduler[ToyCache]
    target: ToyTarget
    prompt: tuple[int, ...]
    window: int
    temperature: float = 0.0
    method: Method = SD
    lease: int = 256
    most: int = 24
    acks: bool = True
    text: tuple[int, ...] = ()
    feedbacks: list[Feedback] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        message = self.opening = replace(
            OPENING, method=self.method.name, prompt=pack_tokens(self.prompt),
            max_new_tokens=self.most, temperature=self.temperature,
        )  # fmt: skip
        self.text, self.number = self.prompt, 0
        self.crops: tuple[Crop, ...] = ()
        limits = replace(LIMITS, lease=self.lease)
        self.state, effects = cloud.begin(message, self.method, "cloud", limits, handle=1)
        self.cache = self.target.open(self.state.sampling, self.method.speculator)
        self.run(effects, self.scheduler.submit)
        self.go_on()

    @property
    def ended(self) -> bool:
        return len(self.text) >= len(self.prompt) + self.most

    def go_on(self) -> None:
        self.number += 1
        if self.window:
            draft = ToyDraft(PAIR, self.state.sampling, self.text[:-1])
            _, tokens, _, _ = draft.draft(self.text[-1:], self.window, frozenset())
            message = drafted_window(
                self.text, tokens, len(self.prompt), number=self.number,
                acknowledged=len(self.text),
            )  # fmt: skip
            self.completed(WindowArrived(message, 0.0))
        elif self.acks:
            self.completed(AckArrived(Ack(1, self.number, len(self.text)), 0.0))

    def completed(self, event: Event) -> None:
        self.state, effects = cloud.step(self.state, event)
        self.run(effects, self.scheduler.take)

    def run(
        self, effects: tuple[Any, ...], take: Callable[[Any, Any, tuple[Crop, ...]], None]
    ) -> None:
        for effect in effects:
            match effect:
                case Crop():
                    self.crops += (effect,)
                case Prefill() | Forward() | FetchRow():
                    crops, self.crops = self.crops, ()
                    take(self, effect, crops)
                case Send(Feedback() as feedback):
                    self.feedbacks.append(
                        replace(feedback, held_ms=0.0, verify_ms=0.0, queue_ms=0.0)
                    )
                    self.text = self.text[: feedback.start] + feedback.token_ids
                    if not self.ended:
                        self.go_on()

    def alone(self) -> tuple[int, ...]:
        """What the target writes without any of this."""
        return target_alone(PAIR, self.prompt, self.state.sampling, self.most, frozenset())


class House:
    """A scheduler, its target, and sessions."""

    def __init__(self) -> None:
        self.thread, self.target = Thread(), Recorded()
        scheduler: Any = Scheduler
        self.scheduler: Scheduler[ToyCache] = scheduler(
            self.target, self.thread, Gauge(), self.failed
        )
        self.clients: list[Client] = []

    def failed(self, client: Any, error: Exception) -> None:
        client.error = error

    def add(
        self, prompt: tuple[int, ...], window: int = 4, temperature: float = 0.0, **fields: Any
    ) -> Client:
        client = Client(self.scheduler, self.target, prompt, window, temperature, **fields)
        self.clients.append(client)
        return client


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(0, PAIR.vocab_size, length).tolist())


COMPANY = st.lists(
    st.tuples(
        st.integers(1, 90), st.sampled_from([(SD, 1), (SD, 9), (AUTO, 0), (AUTO, 4)]),
        st.sampled_from([0.0, 1.0]),
    ),
    min_size=2, max_size=5,
)  # fmt: skip


@given(COMPANY)
@settings(max_examples=20, deadline=None)
def test_a_sessions_text_is_the_same_alone_and_in_company(
    company: list[tuple[int, tuple[Method, int], float]],
) -> None:
    together = House()
    for seed, (length, (method, window), temperature) in enumerate(company):
        together.add(prompt(length, seed), window, temperature, method=method, most=12)
        together.thread.turn()  # they come one after the other
    together.thread.run()
    for client in together.clients:
        alone = House()
        again = alone.add(
            client.prompt, client.window, client.temperature, method=client.method, most=12
        )
        alone.thread.run()
        assert client.ended
        assert client.text == again.text
        assert client.text[len(client.prompt) :][: client.most] == client.alone()
        if client.method is SD:
            assert client.feedbacks == again.feedbacks


def test_every_session_with_work_is_in_every_pass() -> None:
    house = House()
    for seed in range(20):
        house.add(prompt(9, seed), window=30)
    house.thread.run()
    windows = [rows for rows in house.target.passes if len(rows) == 20]
    assert windows
    assert all(min(rows) >= 1 for rows in windows)
    assert max(map(sum, house.target.passes)) <= 20 + max(BUDGET, LARGEST_CHUNK)


def test_sessions_that_run_on_have_a_row_each_in_every_pass() -> None:
    house = House()
    one, other = (house.add(prompt(1, seed), window=0, method=AUTO) for seed in range(2))
    house.thread.run()
    assert house.target.passes == [[1, 1]] * 24
    assert (one.text[1:], other.text[1:]) == (one.alone(), other.alone())


def test_a_session_that_runs_on_stops_at_its_lease_until_it_is_acknowledged() -> None:
    house = House()
    client = house.add((5,), window=0, method=AUTO, lease=4, acks=False)
    house.thread.run()
    assert client.text[1:] == client.alone()[:4]
    client.acks = True
    client.go_on()
    house.thread.run()
    assert client.text[1:] == client.alone()


def test_what_is_over_is_shared_equally_by_those_who_want_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BUDGET", 20)
    house = House()
    for seed, window in enumerate((2, 30, 30)):
        house.add((1 + seed,), window=window)
    house.thread.run()
    first = next(rows for rows in house.target.passes if len(rows) == 3)
    assert sum(first) == 3 + 20
    assert sorted(first)[0] <= 3  # the short window needs no more
    assert abs(sorted(first)[1] - sorted(first)[2]) <= 1


def test_a_long_prompt_leaves_room_for_the_others() -> None:
    house = House()
    chatting = house.add((1, 2), window=2)
    house.thread.turn()
    house.thread.turn()
    long = house.add(prompt(1500, 3), window=2)
    house.thread.run()
    beside = [rows for rows in house.target.passes if len(rows) == 2]
    assert beside
    assert max(map(max, beside)) <= LARGEST_CHUNK
    assert len(chatting.text) == len(chatting.prompt) + chatting.most or len(chatting.text) > 20
    assert len(long.text) >= 1500 + long.most


def test_a_long_prompt_does_not_stop_who_runs_on() -> None:
    house = House()
    writing = house.add((1, 2), window=0, method=AUTO, most=400)
    house.thread.turn()
    long = house.add(prompt(900, 3), window=2)
    house.thread.run()
    beside = [rows for rows in house.target.passes if len(rows) == 2]
    assert sum(map(max, beside)) >= 899
    assert all(min(rows) == 1 for rows in beside)
    assert len(writing.text) > len(beside)
    assert len(long.text) >= 900 + long.most


@pytest.mark.parametrize(("method", "window"), [(SD, 4), (AUTO, 0), (AUTO, 4)])
def test_a_failure_ends_the_session_it_belongs_to(method: Method, window: int) -> None:
    house, expected = House(), House()
    for seed in range(3):
        house.add(prompt(5, seed), window, method=method)
        expected.add(prompt(5, seed), window, method=method)
    house.thread.turn()
    house.target.broken = house.clients[1].cache
    house.thread.run()
    expected.thread.run()
    assert [client.error is None for client in house.clients] == [True, False, True]
    for index in (0, 2):
        assert house.clients[index].text == expected.clients[index].text


def test_a_session_opened_again_in_a_long_prompt_waits_for_what_has_begun_of_it() -> None:
    house = House()
    client = house.add(prompt(300, 1), window=0, method=AUTO)
    for _ in range(2):
        house.thread.turn()
    assert 0 < len(client.cache.tokens) < 299, "in the middle of the prompt"
    for incarnation in (2, 3):
        again = replace(client.opening, incarnation=incarnation)
        client.completed(OpenArrived(again, handle=1))
    house.thread.run()
    assert client.text[300:] == client.alone()


def test_a_session_that_ends_drops_its_work_and_gives_its_cache_back() -> None:
    house = House()
    one, other = house.add(prompt(300, 1)), house.add(prompt(5, 2))
    house.thread.turn()
    house.scheduler.close(one)
    house.thread.run()
    assert house.target.closed == [one.cache]
    assert not one.feedbacks
    assert len(other.text) >= len(other.prompt) + other.most


@pytest.mark.parametrize(("method", "window"), [(SD, 4), (AUTO, 0)])
def test_a_session_may_end_while_a_pass_runs(
    monkeypatch: pytest.MonkeyPatch, method: Method, window: int
) -> None:
    """What the pass brings it is dropped, and so is the work it asks for because of that."""
    house = House()
    ending, other = (house.add(prompt(1, n), window, method=method) for n in range(2))
    run = house.target.run

    def closing(batch: Any) -> Any:
        if len(house.target.passes) == 2:
            house.scheduler.close(ending)
        return run(batch)

    monkeypatch.setattr(house.target, "run", closing)
    house.thread.run()
    assert house.target.closed == [ending.cache]
    assert [len(rows) for rows in house.target.passes[:4]] == [2, 2, 2, 1]
    assert ending.text[1:] == ending.alone()[: len(ending.text) - 1]
    assert other.ended


# --- costs ------------------------------------------------------------------------------------


def measured(fixed_ms: float, each_ms: float, *sizes: int) -> PassCosts:
    costs = PassCosts()
    for rows in sizes:
        costs.add(rows, fixed_ms + each_ms * rows)
    return costs


@pytest.mark.parametrize("others", [1, 4, 8, 30])
def test_a_chunk_keeps_a_pass_to_twice_its_time(others: int) -> None:
    costs = measured(60.0, 2.0, 1, 2, 4, 8, 16, 40, 80)
    chunk = costs.chunk(others)
    assert 60 + 2 * (others + chunk) <= 2 * (60 + 2 * others)
    following = next(size for size in (6, 8, 12, 16, 24, 32, 48, 64, 96) if size > chunk)
    assert 60 + 2 * (others + following) > 2 * (60 + 2 * others)


def test_where_nobody_waits_a_chunk_is_as_long_as_makes_rows_cheap() -> None:
    sizes = (1, 4, 16, 64, 128, 256)
    assert measured(600.0, 2.0, *sizes).chunk(0) == LARGEST_CHUNK  # weights are most of it
    assert measured(10.0, 2.0, *sizes).chunk(0) == 96  # 2.10 a row; 2.04 in the largest
    assert measured(0.0, 2.0, *sizes).chunk(0) == SMALLEST_CHUNK


def test_sizes_are_tried_up_to_twice_the_largest_known() -> None:
    assert PassCosts().chunk(0) == FIRST_CHUNK
    assert PassCosts().chunk(3) == SMALLEST_CHUNK
    costs = measured(100.0, 0.0, 8)
    assert costs.chunk(4) == 12  # 16 rows in all
    costs.add(16, 100.0)
    assert costs.chunk(4) == 24


def test_passes_of_one_size_say_nothing_of_others() -> None:
    """A line through them would have any slope; noise must not make chunks large."""
    costs = measured(7.0, 2.4, 1, 64)
    rng = np.random.default_rng(0)
    for _ in range(500):
        costs.add(8, 26.0 + rng.normal())
    assert costs.chunk(8) <= 12


def test_old_measurements_fade() -> None:
    costs = measured(0.0, 10.0, 1, 9, 18, 36)
    assert costs.chunk(9) == 8
    for _ in range(30):
        for rows in (1, 9, 18, 36):
            costs.add(rows, 90.0 + rows)
    assert costs.chunk(9) >= 32


class Proposing(Recorded):
    """Its speculator proposes likely trees."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = dataclasses.replace(PAIR, speculator=likely_tree)
        self.speculators = ("medusa",)


MEDUSA = medusa.METHOD


def proposing() -> House:
    house = House()
    house.target = house.scheduler._target = Proposing()
    return house


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_of_two_sessions_share_a_pass_and_change_no_text(temperature: float) -> None:
    house = proposing()
    clients = [
        house.add(prompt(3, seed), window=0, temperature=temperature, method=MEDUSA)
        for seed in range(2)
    ]
    house.add(prompt(80, 9), window=9, temperature=temperature)
    house.thread.run()
    assert all(client.text[len(client.prompt) :] == client.alone() for client in clients)
    assert all(any(f.proposed for f in client.feedbacks) for client in clients)
    whole = TREE_TOKENS + 1
    assert any(rows[:2] == [whole, whole] for rows in house.target.passes), "a tree and a token"


def test_a_tree_is_no_larger_than_its_sessions_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET", 9)
    house = proposing()
    clients = [house.add((1 + seed,), window=0, method=MEDUSA) for seed in range(3)]
    house.thread.run()
    together = [rows for rows in house.target.passes if len(rows) == 3]
    assert together
    assert max(map(max, together)) == 4
    assert all(client.text[1:] == client.alone() for client in clients)


def test_a_bad_tree_ends_its_session_only() -> None:
    house = proposing()

    def wrong(pair: ToyPair, text: tuple[int, ...], most: int) -> ProposedTree:
        tree = likely_tree(pair, text, most)
        return replace(tree, parents=(5,) * most) if text[0] == 2 else tree

    house.target.pair = dataclasses.replace(PAIR, speculator=wrong)
    good, bad = (house.add((1 + seed, 3), window=0, method=MEDUSA) for seed in range(2))
    house.thread.run()
    assert "the speculator proposed" in str(bad.error)
    assert good.text[2:] == good.alone()
