"""Passes that take a set time, to measure as on a device of another class.

A device on which a pass takes 60 ms whatever its length can be stood in for by one that is quicker:
the thread sleeps for the rest. Where it is not quick enough, everything is made slower by the same
factor, the link included.
"""

from __future__ import annotations

import time


def pad(began: float, least_ms: float) -> None:
    """Sleep until `least_ms` after `began`, a `time.perf_counter()`; not at all if that is past."""
    left = began + least_ms / 1e3 - time.perf_counter()
    if least_ms and left > 0:
        time.sleep(left)
