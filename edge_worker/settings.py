"""Settings of an edge worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from bus.protocol.bounds import Threshold, Window
from bus.protocol.messages import MAX_SPARSE
from bus.runtime.worker import WorkerSettings
from decoding.edge_state import CONTROL_TTL_MS
from engines.catalog.registry import chosen_models
from engines.kinds import DrafterKind


class EdgeSettings(WorkerSettings):
    """An edge worker: the draft model, and how many prompts it answers at once."""

    toml_table: ClassVar[str] = "edge"

    pair: str = Field(
        "", description="Named pair (docs/models.md) whose draft runs; where empty, 'default'."
    )
    draft: str = Field(
        "",
        validate_default=True,
        description="Draft model: 'default' (shipped), a registered name, a Hugging Face id, a "
        "directory, a .gguf, the directory of an EAGLE-3 speculator (DIR or DIR@TARGET); where "
        "empty, the pair's.",
    )
    drafter: DrafterKind = Field(
        DrafterKind.LOOKUP_MODEL,
        description="Who drafts: 'model', 'lookup' (repeats what followed the same words earlier "
        "in prompt and answer; costs nothing), 'lookup+model' (lookup where it has something), or "
        "'none' (a thin client: no model is loaded, the target writes by itself).",
    )
    oracle: Path | None = Field(
        None,
        description="To measure: replay the answers recorded in this file (`e2sci bench pace`), "
        "each step taking the time of a real draft step; no lookup.",
    )
    oracle_error_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Share of positions at which the oracle is wrong."
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="int8, float32, bfloat16; auto: int8 for named models on a CPU, else bfloat16 "
        "where the hardware has it, else float32.",
    )
    device: str = Field("auto", description="auto, cpu, or cuda.")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="Torch threads; 0: all cores.")
    slots: Annotated[int, Field(ge=1)] = Field(4, description="Prompts answered at once.")
    prefix_cache_mb: Annotated[int, Field(ge=0)] = Field(
        512,
        description="MiB for the prefix cache: what finished sessions have run, so that the same "
        "prompt is not run again; 0: off.",
    )
    num_sparse: Annotated[int, Field(ge=1, le=MAX_SPARSE)] = Field(
        48, description="Probabilities sent for each drafted token (K)."
    )
    window: Window = Field(
        4, description="Drafted tokens a window, until the controller says otherwise (W)."
    )
    threshold: Threshold = Field(
        0.15, description="Acceptance threshold until the controller speaks (lossy methods)."
    )
    conservative_threshold: Threshold = Field(
        0.02, description="Threshold while the controller is silent (lossy methods)."
    )
    control_ttl_s: Annotated[float, Field(gt=0)] = Field(
        CONTROL_TTL_MS / 1e3,
        description="Seconds after its last word from which on the controller is silent; it "
        "repeats itself every second.",
    )
    least_step_ms: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="To measure as on another device: least ms of a draft step.",
    )
    step_counts: Path | None = Field(
        None, description="To measure: a file that counts padded steps and those that took longer."
    )
    timeline: bool = Field(
        False, description="Add each session's timeline to telemetry, for plots of it."
    )
    peer_wait_s: Annotated[float, Field(gt=0)] = Field(
        10.0,
        description="Seconds after which a prompt is refused if only cloud workers with another "
        "tokenizer are there. With none at all it waits.",
    )
    drain_s: Annotated[float, Field(ge=0)] = Field(
        5.0, description="Seconds that running prompts get when the worker leaves."
    )

    @field_validator("draft")
    @classmethod
    def _of_pair(cls, value: str, info: ValidationInfo) -> str:
        return chosen_models(info.data.get("pair"), None, value).draft
