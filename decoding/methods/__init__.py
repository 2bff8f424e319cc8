"""Decoding methods, one file each: acceptance rule, pace and control, by name.

A name may carry parameters after colons. A whole number is the window of a method in lockstep,
whatever the controller says: `sd:6`. A number with a decimal point is the threshold of a lossy
method in nats, the base of it where credit moves it: `fsd:0.25`, `e2sci:0.1`, `fsd:0.25:6`.

`e2sci+NAME` is E²-SCI laid over another method, with parameters as any: `e2sci+fsd:0.25`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from math import log

from decoding.methods import (
    amusd,
    auto,
    e2sci,
    eagle3,
    eagle3_edge,
    fr_spec,
    fsd,
    lookahead,
    medusa,
    pipespec,
    plc,
    plc_literal,
    sd,
)
from decoding.methods.base import Method
from decoding.methods.paces import Lockstep
from decoding.pacing import MAX_LOCKSTEP_WINDOW

__all__ = ["Method", "find", "how_to_get", "names", "need_middle", "summaries", "why_unknown"]

_METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        auto.METHOD, auto.CHAIN, sd.METHOD, plc.METHOD, plc_literal.METHOD, fsd.METHOD, fsd.AHEAD,
        amusd.METHOD, *pipespec.METHODS, fr_spec.METHOD, lookahead.METHOD, lookahead.SIMILAR,
        *medusa.METHODS, eagle3.METHOD, eagle3_edge.METHOD, *e2sci.METHODS,
    )
}  # fmt: skip

_OVER = f"{e2sci.METHOD.name}+"
_WINDOW = re.compile(r"[1-9][0-9]?")
_THRESHOLD = re.compile(r"0\.[0-9]{1,6}")


def names() -> tuple[str, ...]:
    """Names of all methods, in the order they are offered; those laid over others come last."""
    return (*_METHODS, *(_OVER + host for host in _hosts()))


def _hosts() -> tuple[str, ...]:
    """Methods that E²-SCI can be laid over."""
    return tuple(name for name, host in _METHODS.items() if not e2sci.why_not_over(host))


def summaries() -> tuple[tuple[str, str], ...]:
    """For help texts: (name, what it does), those laid over others in one line."""
    plain = ((name, method.summary) for name, method in _METHODS.items())
    over = "E²-SCI over another method: its acceptance, and its pace over lockstep (lossy)"
    return (*plain, (f"{_OVER}NAME", over))


def need_middle(names: Iterable[str]) -> bool:
    """Whether some of these methods draft by a middle worker."""
    return any(method.inner for name in names if (method := find(name)) is not None)


def find(name: str) -> Method | None:
    """The method of that name, or None; with `:T` the threshold is T, 0.0 … ln 2, and with `:W`
    the window is W, 1 … `MAX_LOCKSTEP_WINDOW`."""
    base, *parameters = name.split(":")
    method = _without_parameters(base)
    if method is None or not parameters:
        return method
    method = replace(method, name=name)
    if _THRESHOLD.fullmatch(parameters[0]):
        threshold = float(parameters.pop(0))
        if not method.acceptance.compares or threshold > log(2.0):
            return None
        method = replace(method, threshold=threshold)
    if parameters:
        window = parameters.pop(0)
        if not isinstance(method.pace, Lockstep) or not _WINDOW.fullmatch(window):
            return None
        if int(window) > MAX_LOCKSTEP_WINDOW:
            return None
        method = replace(method, pace=Lockstep(int(window)))
    return None if parameters else method


def _without_parameters(name: str) -> Method | None:
    if not name.startswith(_OVER):
        return _METHODS.get(name)
    host = _METHODS.get(name.removeprefix(_OVER))
    return None if host is None or e2sci.why_not_over(host) else e2sci.over(host)


def how_to_get(speculator: str) -> str:
    """What to do where a target has no speculator of that kind."""
    return (
        f"start the cloud worker with --speculator DIR (`e2sci train {speculator}` makes one for "
        "its target)"
    )


def why_unknown(name: str) -> str:
    """Why there is no method of a name, and which there are, in one line."""
    host = find(name.removeprefix(_OVER)) if name.startswith(_OVER) else None
    if host is not None and (why := e2sci.why_not_over(host)):
        hosts = ", ".join(_hosts())
        return f"{name!r} is refused: {why}; lay e2sci over one of {hosts}"
    known = ", ".join(_METHODS)
    return (
        f"there is no {name!r}; known are {known}; {_OVER}NAME (E²-SCI over another), NAME:W "
        "(window of one in lockstep), NAME:T (threshold of a lossy one); see docs/credit.md"
    )
