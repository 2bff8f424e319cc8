"""What the controller is to use, changed while it runs: a wish by a person, and its answer.

A dashboard writes the *wish*; the controller looks at it every second, takes it over or says why
not, and tells what is *in use*. Only the controller changes how sessions are controlled. This
module does not know what the numbers do.
"""

from __future__ import annotations

import time

import msgspec

from bus.protocol.bounds import Gain, Hold, Memory, Nats, Smoothing, Threshold, Window
from bus.store.connection import Connection
from bus.store.keys import Keys

__all__ = ["InUse", "Tuning", "Tunings", "Wish", "decode_wish"]


class Tuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Those settings of the controller that may change while it runs, by the same names.

    Attributes:
        threshold, window: of methods under the fixed policy, in nats and tokens.
        base_threshold, least_threshold, greatest_threshold: T_base, T_min and T_max in nats.
        credit_gain: α_s. credit_smoothing: β. credit_memory: k, in windows.
        threshold_band: in nats. threshold_hold: in windows.
    """

    threshold: Threshold
    window: Window
    base_threshold: Nats
    least_threshold: Nats
    greatest_threshold: Nats
    credit_gain: Gain
    credit_smoothing: Smoothing
    credit_memory: Memory
    threshold_band: Nats
    threshold_hold: Hold


class Wish(msgspec.Struct, frozen=True):
    """What somebody wants to be used, since when (seconds since the epoch)."""

    tuning: Tuning
    at: float


class InUse(msgspec.Struct, frozen=True):
    """What the controller uses.

    Attributes:
        tuning: now. own: what it was started with.
        at: since when, in seconds since the epoch. problem: why the latest wish is not taken over.
    """

    tuning: Tuning
    own: Tuning
    at: float
    problem: str = ""


class Tunings:
    """Wish and answer. Every method raises StoreUnavailableError without Redis."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def wish(self) -> bytes:
        """As it is stored, for `decode_wish`; empty where there is none."""
        return await self._connection.execute("GET", self._keys.tuning) or b""

    async def ask(self, tuning: Tuning, seen: bytes) -> bool:
        """Wish for `tuning`, unless the wish is no longer the one that was `seen`.

        Returns whether it was written.
        """
        wish = msgspec.json.encode(Wish(tuning, time.time()))
        return bool(
            await self._connection.run_script(
                "replace_unchanged", [self._keys.tuning], [seen, wish]
            )
        )

    async def withdraw(self) -> None:
        """No wish: the controller goes back to what it was started with."""
        await self._connection.execute("DEL", self._keys.tuning)

    async def say(self, in_use: InUse) -> None:
        """By the controller: what it uses."""
        await self._connection.execute("SET", self._keys.tuning_in_use, msgspec.json.encode(in_use))

    async def in_use(self) -> InUse | None:
        """What the controller has said last; None where none of this release has."""
        stored = await self._connection.execute("GET", self._keys.tuning_in_use)
        try:
            return None if stored is None else msgspec.json.decode(stored, type=InUse)
        except msgspec.DecodeError:
            return None


def decode_wish(stored: bytes) -> Wish:
    """Raises msgspec.DecodeError where it is none, or a number is out of its bounds."""
    return msgspec.json.decode(stored, type=Wish)
