"""What a link may be: the table of profiles, round trips, trace files."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.protocol.errors import ConfigurationError
from launch.link.profiles import PROFILES, Conditions, Trace, find_link, parse_trace

S = 1_000_000_000
TRACE = """
{"at_s": 0, "one_way_ms": 20, "jitter_ms": 2, "mbps": 20}
{"at_s": 1.5, "mbps": null, "loss": 0.01}

{"at_s": 2, "outage": true}
{"at_s": 2.5, "outage": false, "one_way_ms": 5}
"""


@pytest.mark.parametrize(
    ("name", "round_trip_ms"),
    [("loopback", 0), ("lan", 1), ("metro", 10), ("5g", 40), ("wan", 80), ("satellite", 300)],
)
def test_profiles_are_named_by_their_round_trip(name: str, round_trip_ms: float) -> None:
    assert 2 * find_link(name).at(0).one_way_ms == round_trip_ms
    assert PROFILES[name].name == name


def test_profiles_have_what_their_names_say() -> None:
    assert PROFILES["5g"].trace.at(0) == Conditions(20, jitter_ms=4, mbps=20)
    assert PROFILES["lossy"].trace.at(0).loss == 0.02
    outages = PROFILES["outages"].trace
    assert [outages.at(round(at_s * S)).outage for at_s in (0, 4.3, 4.5, 4.9, 5, 9.5)] == [
        False, False, True, True, False, True,
    ]  # fmt: skip


def test_a_round_trip_is_a_link() -> None:
    assert find_link("40ms").at(10 * S) == Conditions(20)
    assert find_link("0.5ms").at(0) == Conditions(0.25)


def test_a_trace_file_is_a_link_and_its_lines_change_what_they_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    trace = find_link(str(path))
    assert trace.at(0) == trace.at(round(1.4 * S)) == Conditions(20, 2, 20)
    assert trace.at(round(1.5 * S)) == Conditions(20, 2, None, 0.01)
    assert trace.at(2 * S) == Conditions(20, 2, None, 0.01, outage=True)
    assert trace.at(100 * S) == Conditions(5, 2, None, 0.01)
    assert trace.open_from(2 * S) == trace.open_from(round(2.2 * S)) == round(2.5 * S)
    assert trace.open_from(1 * S) == 1 * S


def test_a_repeating_trace_begins_again_and_so_do_its_outages() -> None:
    trace = parse_trace(
        '{"at_s": 0, "one_way_ms": 1, "outage": true}\n{"at_s": 1, "outage": false}\n'
        '{"at_s": 2, "outage": true}\n{"at_s": 3, "repeat": true}'
    )
    assert trace.open_from(0) == 1 * S
    assert trace.open_from(round(2.5 * S)) == 4 * S  # over the end, and the start is one too
    assert trace.open_from(6 * S) == 7 * S
    assert trace.open_from(round(4.2 * S)) == round(4.2 * S)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "starts at 0"),
        ('{"at_s": 1, "one_way_ms": 1}', "starts at 0"),
        ('{"at_s": 0}', "line 1: the first line needs one_way_ms"),
        ('{"at_s": 0, "one_way_ms": 1}\n{"at_s": 0, "loss": 0}', "must rise"),
        ('{"at_s": 0, "one_way_ms": 1}\n{"at_s": 1, "outage": true}', "outage for ever"),
        ('{"at_s": 0, "one_way_ms": 1, "outage": true}\n{"at_s": 1, "repeat": true}', "for ever"),
        ('{"at_s": 0, "one_way_ms": 1}\n{"at_s": 0, "repeat": true}', "must rise"),
        ('{"at_s": 0, "one_way_ms": 1}\n{"at_s": 1, "repeat": true}\n{"at_s": 2}', "line 3"),
        ('{"at_s": 0, "one_way_ms": 1, "jiter_ms": 1}', "line 1: .*jiter_ms"),
        ('{"at_s": 0, "one_way_ms": -1}', "line 1: "),
        ('{"at_s": 0, "one_way_ms": 1, "mbps": 0}', "line 1: "),
        ('{"at_s": 0, "one_way_ms": 1, "loss": 0.9}', "line 1: "),
        ('{"at_s": 0, "one_way_ms": "fast"}', "line 1: "),
        ("nonsense", "line 1: "),
    ],
)
def test_a_wrong_trace_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        parse_trace(text)


@pytest.mark.parametrize("spec", ["6g", "40", "ms", "-1ms", "99999999ms", "/dev/null", "/"])
def test_what_is_no_link_is_refused(spec: str) -> None:
    with pytest.raises(ConfigurationError):
        find_link(spec)


def test_an_unknown_link_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"no link '6g'; use loopback, lan, .* 40ms, or"):
        find_link("6g")


def test_a_trace_needs_a_step() -> None:
    with pytest.raises(ConfigurationError):
        Trace([])
