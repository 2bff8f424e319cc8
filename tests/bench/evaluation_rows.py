"""Rows as an evaluation writes them, for tests."""

from __future__ import annotations

from typing import Any

from bench.evaluation.rows import AnswerRow
from bus.store import Usage

USAGE = Usage(
    drafted_tokens=40, accepted_tokens=30, wasted_tokens=10, rollbacks=4, prehit_rejections=1,
    bytes_up=4000, bytes_down=800, edge_idle=0.25, cloud_idle=0.5,
)  # fmt: skip


def row(method: str, prompt_id: int = 0, **changes: Any) -> AnswerRow:
    values: dict[str, Any] = {
        "method": method, "ran": method, "dataset": "gsm8k", "prompt_id": prompt_id,
        "rtt_ms": 40.0, "draft": "model", "variant": "", "clients": 1, "tokens": 40,
        "seconds": 4.0, "batch_seconds": 4.0 + prompt_id / 1e3, "decode_tokens": 30,
        "decode_seconds": 3.0, "tokens_per_s": 10.0, "first_token_ms": 500.0, "gap_p50_ms": 80.0,
        "gap_p95_ms": 200.0, "usage": None if method == "target" else USAGE, "right": None,
        "nats_per_token": -0.5, "agreement": 1.0, "regret": 0.0, "energy_j": 8.0,
        "energy_source": "modelled", "text": "…", "token_ids": (1, 2), "device": "as it is",
    }  # fmt: skip
    return AnswerRow(**(values | changes))
