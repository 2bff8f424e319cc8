"""Settings of a cloud worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from bus.protocol.bounds import Port, Threshold
from bus.protocol.errors import ConfigurationError
from bus.runtime.worker import WorkerSettings
from bus.store import Role
from decoding.cloud_state import TREE_TOKENS
from engines.catalog.registry import chosen_models
from engines.padding import LeastTimes


def _least_times(value: Any) -> str:
    """As `LeastTimes.parse` takes it; a number in a TOML file counts too."""
    try:
        return str(LeastTimes.parse(str(value)))
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


class CloudSettings(WorkerSettings):
    """A cloud worker: the target model, its sockets, and how many sessions it holds."""

    toml_table: ClassVar[str] = "cloud"
    role: ClassVar[Role] = Role.CLOUD

    pair: str = Field(
        "", description="Named pair (docs/models.md) whose target runs; where empty, 'default'."
    )
    target: str = Field(
        "",
        validate_default=True,
        description="Target model: 'default', a registered name, a Hugging Face id, a directory, a "
        ".gguf; where empty, the pair's.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="int8, float32, bfloat16; auto: int8 for named models on a CPU, else bfloat16 "
        "where the hardware has it, else float32.",
    )
    device: str = Field("auto", description="auto, cpu, or cuda.")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="Torch threads; 0: all cores.")
    windows_port: Port = Field(0, description="Port for draft windows; 0: any.")
    feedback_port: Port = Field(0, description="Port for feedback; 0: any.")
    advertise_windows_port: Port = Field(
        0, description="Port at which others reach windows_port, where it is another; 0: it is not."
    )
    advertise_feedback_port: Port = Field(0, description="The same for feedback_port.")
    max_sessions: Annotated[int, Field(ge=1)] = Field(64, description="Sessions held at once.")
    session_ttl_s: Annotated[float, Field(gt=0)] = Field(
        300.0, description="Seconds without a message after which a session's cache is freed."
    )
    evict_idle_s: Annotated[float, Field(ge=0)] = Field(
        10.0, description="A full worker frees the longest idle session if idle for this long."
    )
    prefix_cache_mb: Annotated[int, Field(ge=0)] = Field(
        512,
        description="MiB for the prefix cache: what finished sessions have run, so that the same "
        "prompt is not run again; 0: off.",
    )
    threshold_min: Threshold = Field(-1.0, description="Windows' thresholds are raised to this.")
    threshold_max: Threshold = Field(0.30, description="Windows' thresholds are lowered to this.")
    speculator: str = Field(
        "",
        description="Directories of speculators that `e2sci train` wrote, separated by commas "
        "(docs/speculators.md); none; where empty, those shipped for the target.",
    )
    tree_tokens: Annotated[int, Field(ge=0, le=64)] = Field(
        TREE_TOKENS,
        description="Most tokens of a tree that a speculator proposes for one pass; 0: none is "
        "proposed.",
    )
    busy_watts: Annotated[float, Field(ge=0)] = Field(
        5.6,
        description="Watts while a pass runs, where no counter measures them (extra `energy`): one "
        "core of a server processor.",
    )
    least_pass_ms: Annotated[str, BeforeValidator(_least_times)] = Field(
        "0",
        description="To measure as on another device: least ms of a pass over windows, whatever "
        "its length (130), or by its tokens (1:130,2:135,8:190; linear between them).",
    )
    pass_counts: Path | None = Field(
        None, description="To measure: a file that counts padded passes and those that took longer."
    )
    drain_s: Annotated[float, Field(ge=0)] = Field(
        5.0, description="Seconds that running passes get when the worker leaves."
    )

    @field_validator("target")
    @classmethod
    def _of_pair(cls, value: str, info: ValidationInfo) -> str:
        return chosen_models(info.data.get("pair"), value, None).target


class MiddleSettings(CloudSettings):
    """A middle worker: the same with a model between draft and target, whose text are drafts."""

    toml_table: ClassVar[str] = "middle"
    role: ClassVar[Role] = Role.MIDDLE

    pair: str = Field(
        "", description="Named pair (docs/models.md) whose draft runs; where empty, 'default'."
    )
    target: str = Field(
        "",
        validate_default=True,
        description="The middle model: any spec that a draft may have ('default' is the shipped "
        "draft); where empty, the pair's draft.",
    )

    @field_validator("target")
    @classmethod
    def _of_pair(cls, value: str, info: ValidationInfo) -> str:
        return chosen_models(info.data.get("pair"), None, value).draft
