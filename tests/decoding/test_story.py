"""What a session's story keeps and how it reads."""

from __future__ import annotations

from bus.protocol.messages import CloseSession, Fault, FaultCode, FinishReason, SessionReady
from decoding.edge_events import FaultArrived, Finish, Opened, SeekPeer, Send, Tick
from decoding.story import MAX_EVENTS, Story


def test_a_story_says_when_what_came_and_what_followed() -> None:
    story = Story()
    story.begun(1000.0, "takes up the request")
    story.told(1005.0, Opened(SessionReady("s1", 3, "cloud-1", 7), 5.0), (), "opening", "running")
    fault = FaultArrived(Fault("s1", FaultCode.OVERLOADED, "full"), 1.0)
    story.told(1250.0, fault, (SeekPeer("full"),), "running", "seeking")
    end = (Send(CloseSession("s1", 3, "error")), Finish(FinishReason.ERROR))
    story.told(1300.4, Tick(1.0), end, "seeking", "finished")
    assert story.lines() == [
        "0 ms  takes up the request  begun",
        "5 ms  Opened SessionReady incarnation=3 cloud='cloud-1' handle=7  opening → running",
        "250 ms  FaultArrived Fault code=overloaded detail='full'  running → seeking  [SeekPeer]",
        "300 ms  Tick  seeking → finished  [Send CloseSession, Finish]",
    ]


def test_what_changes_nothing_is_not_kept_and_the_rest_is_bounded() -> None:
    story = Story()
    story.told(0.0, Tick(0.0), (), "running", "running")
    assert story.lines() == []
    for number in range(MAX_EVENTS + 5):
        story.told(float(number), Tick(0.0), (SeekPeer(str(number)),), "running", "running")
    assert len(story.lines()) == MAX_EVENTS
    assert story.num_events == MAX_EVENTS + 5
    assert story.lines()[-1].startswith(f"{MAX_EVENTS + 4} ms  Tick")
