"""What a cloud worker says of itself in the registry."""

from __future__ import annotations

from engines.torch.target import TargetModel
from tests.cloud_worker.conftest import Start
from tests.engines.tiny import CONTEXT_LENGTH


async def test_the_registry_record_says_what_it_runs(start: Start, target: TargetModel) -> None:
    house = start(max_sessions=7)
    record = house.record
    assert (record.bitwise, record.probe_digest) == (target.probe.bitwise, target.probe.digest)
    assert (record.worker_id, record.role, record.dtype, record.device) == (
        "cloud-1", "cloud", "float32", "cpu",
    )  # fmt: skip
    assert (record.tokenizer_digest, record.vocab_size, record.context_length) == (
        target.tokenizer_digest, target.vocab_size, CONTEXT_LENGTH,
    )  # fmt: skip
    assert record.eos_tokens == tuple(sorted(target.eos_tokens))
    assert record.capacity == 7
    assert set(record.endpoints) == {"windows", "feedback"}
