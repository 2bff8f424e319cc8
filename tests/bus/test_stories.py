"""Sessions' stories in Redis."""

from __future__ import annotations

from typing import Any

from bus.store import Keys, Store, StoryWriter
from bus.store import stories as module


class Told:
    def __init__(self, *lines: str) -> None:
        self.said = list(lines)

    @property
    def num_events(self) -> int:
        return len(self.said)

    def lines(self) -> list[str]:
        return self.said


async def test_each_worker_tells_its_own(store: Store, redis: Any, key_prefix: str) -> None:
    await store.stories.save("s1", "edge-1", ["begun"])
    await store.stories.save("s1", "cloud-1", ["opened"])
    await store.stories.save("s1", "edge-1", ["begun", "finished"])
    assert await store.stories.load("s1") == {
        "cloud-1": ["opened"], "edge-1": ["begun", "finished"],
    }  # fmt: skip
    assert await store.stories.load("s2") == {}
    assert await redis.ttl(Keys(key_prefix).story("s1")) > 0


async def test_what_cannot_be_read_is_left_out(store: Store, redis: Any, key_prefix: str) -> None:
    await store.stories.save("s1", "edge-1", ["begun"])
    await redis.hset(Keys(key_prefix).story("s1"), "stranger", b"\xff")
    assert await store.stories.load("s1") == {"edge-1": ["begun"]}


async def test_only_what_has_changed_is_written_and_the_end_once_more(
    store: Store, redis: Any, key_prefix: str
) -> None:
    writer, story, key = StoryWriter(store.stories, "edge-1"), Told("begun"), Keys(key_prefix).story
    await writer.write([("s1", story)])
    assert await store.stories.load("s1") == {"edge-1": ["begun"]}
    await redis.delete(key("s1"))
    await writer.write([("s1", story)])
    assert await store.stories.load("s1") == {}
    story.said.append("finished")
    writer.ended("s1", story)
    await writer.write([])
    assert await store.stories.load("s1") == {"edge-1": ["begun", "finished"]}
    await redis.delete(key("s1"))
    await writer.write([])
    assert await store.stories.load("s1") == {}


async def test_stories_that_wait_for_redis_are_bounded(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MOST_ENDED", 2)
    writer = StoryWriter(store.stories, "edge-1")
    for name in ("s1", "s2", "s3"):
        writer.ended(name, Told("finished"))
    await writer.write([])
    assert [bool(await store.stories.load(name)) for name in ("s1", "s2", "s3")] == [
        False, True, True,
    ]  # fmt: skip
