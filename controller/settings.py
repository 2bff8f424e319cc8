"""Settings of the controller."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from bus.protocol.bounds import Gain, Hold, Memory, Nats, Port, Smoothing, Threshold, Window
from bus.runtime.worker import WorkerSettings

DEFAULT, UNCALIBRATED = "default", "none"


class CreditSignal(StrEnum):
    """What of a window credit follows."""

    EXPECTED = "expected"
    REALISED = "realised"


class ControllerSettings(WorkerSettings):
    """The controller: its sockets and what its policy sets."""

    toml_table: ClassVar[str] = "controller"

    reports_port: Port = Field(0, description="Port for window reports; 0: any.")
    updates_port: Port = Field(0, description="Port for control updates; 0: any.")
    threshold: Threshold = Field(
        0.15, description="Acceptance threshold of the fixed policy, in nats (lossy methods only)."
    )
    window: Window = Field(4, description="Drafted tokens a window of the fixed policy (W).")
    calibration: str = Field(
        DEFAULT,
        description="File that `e2sci calibrate` wrote for this pair; 'default': the shipped one; "
        "'none': credit moves the threshold without one.",
    )
    base_threshold: Nats = Field(
        0.15, description="T_base of credit inertia, in nats: the threshold at neutral credit."
    )
    least_threshold: Nats = Field(
        0.02, description="T_min in nats; also the conservative threshold."
    )
    greatest_threshold: Nats = Field(
        0.30, description="T_max in nats. Cloud workers have a bound of their own."
    )
    credit_gain: Gain = Field(
        1.0, description="α_s: nats that the threshold moves for each unit of credit."
    )
    credit_smoothing: Smoothing = Field(
        0.3, description="β: weight of the newest window in credit."
    )
    credit_memory: Memory = Field(5, description="k: windows that credit remembers.")
    credit_signal: CreditSignal = Field(
        CreditSignal.EXPECTED,
        description="What credit follows: 'expected', the accepted tokens expected without a "
        "threshold; 'realised', those that stood, which a relaxed threshold raises itself.",
    )
    threshold_band: Nats = Field(
        0.01, description="A threshold's change smaller than this, in nats, is not made."
    )
    threshold_hold: Hold = Field(2, description="Windows between two changes of the threshold.")
    carry_credit: bool = Field(
        False, description="A client's next prompt begins with the credit of its last one."
    )
    reports: bool = Field(
        False, description="Add each window's report to telemetry, for calibration."
    )
    takeover_s: Annotated[float, Field(gt=0)] = Field(
        3.0, description="A second controller takes over when the first is silent for so long."
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if not self.least_threshold <= self.base_threshold <= self.greatest_threshold:
            raise ValueError(
                f"expected least_threshold ≤ base_threshold ≤ greatest_threshold, got "
                f"{self.least_threshold}, {self.base_threshold}, {self.greatest_threshold}"
            )
        return self
