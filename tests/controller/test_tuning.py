"""Settings changed while the controller runs, on a real Valkey."""

from __future__ import annotations

import msgspec
import pytest

from bus.settings import BusSettings
from bus.store import Store
from controller.policies import Policies
from controller.settings import ControllerSettings
from controller.tuning import Tuner, tuning_of
from decoding.control import FixedPolicy
from decoding.credit import CreditPolicy


@pytest.fixture
def settings(bus_settings: BusSettings) -> ControllerSettings:
    return ControllerSettings.load(
        redis_url=bus_settings.redis_url, key_prefix=bus_settings.key_prefix, calibration="none"
    )


async def test_a_wish_is_taken_over_and_a_withdrawn_one_forgotten(
    store: Store, settings: ControllerSettings
) -> None:
    policies = Policies(settings)
    tuner = Tuner(settings, store, policies)
    await tuner.look()
    before = await store.tunings.in_use()
    assert before is not None
    assert before.tuning == before.own == tuning_of(settings)

    wanted = msgspec.structs.replace(before.own, threshold=0.4, base_threshold=0.2, credit_memory=3)
    assert await store.tunings.ask(wanted, b"")
    await tuner.look()
    assert policies("fsd") == FixedPolicy(0.4, settings.window)
    credit = policies("e2sci")
    assert isinstance(credit, CreditPolicy)
    assert (credit.law.base, credit.law.memory) == (0.2, 3)
    after = await store.tunings.in_use()
    assert after is not None
    assert (after.tuning, after.own, after.problem) == (wanted, before.own, "")

    await store.tunings.withdraw()
    await tuner.look()
    assert policies("fsd") == FixedPolicy(settings.threshold, settings.window)


async def test_what_makes_no_sense_changes_nothing_and_is_told(
    store: Store, settings: ControllerSettings
) -> None:
    policies = Policies(settings)
    tuner = Tuner(settings, store, policies)
    own = tuning_of(settings)
    await store.tunings.ask(msgspec.structs.replace(own, least_threshold=0.3), b"")
    await tuner.look()
    in_use = await store.tunings.in_use()
    assert in_use is not None
    assert in_use.tuning == own
    assert "least_threshold ≤ base_threshold" in in_use.problem
    assert policies("fsd") == FixedPolicy(settings.threshold, settings.window)


@pytest.mark.parametrize("stored", [b"nonsense", b'{"tuning": {}, "at": 1}', b"\xff"])
async def test_garbage_in_the_wish_is_no_trouble(
    store: Store, settings: ControllerSettings, stored: bytes
) -> None:
    await store._connection.execute("SET", f"{settings.key_prefix}tuning", stored)
    await Tuner(settings, store, Policies(settings)).look()
    in_use = await store.tunings.in_use()
    assert in_use is not None
    assert in_use.problem


async def test_of_two_who_saw_the_same_one_wins(store: Store, settings: ControllerSettings) -> None:
    own = tuning_of(settings)
    assert await store.tunings.ask(own, b"")
    assert not await store.tunings.ask(msgspec.structs.replace(own, window=2), b"")
    seen = await store.tunings.wish()
    assert await store.tunings.ask(msgspec.structs.replace(own, window=2), seen)


async def test_a_redis_that_came_back_empty_is_told_again(
    store: Store, settings: ControllerSettings
) -> None:
    tuner = Tuner(settings, store, Policies(settings))
    await tuner.look()
    await store._connection.execute("DEL", f"{settings.key_prefix}tuning-in-use")
    await tuner.look()
    assert await store.tunings.in_use() is not None
