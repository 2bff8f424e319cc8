"""What all sessions of an edge worker share."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from decoding.engine import Drafter
from edge_worker.addresses import Addresses
from edge_worker.memory import PathMemory
from edge_worker.peers import Peers
from engines.thread import ModelThread


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What all sessions of an edge worker share.

    Attributes:
        counters: of the worker. turns: numbers sessions in their order of arrival.
        addresses: the sessions that messages reach.
    """

    drafter: Drafter[Any]
    thread: ModelThread
    peers: Peers
    mismatch_wait_s: float
    memory: PathMemory
    counters: Counter[str] = field(default_factory=Counter)
    turns: Iterator[int] = field(default_factory=itertools.count)
    addresses: Addresses = field(default_factory=Addresses)
