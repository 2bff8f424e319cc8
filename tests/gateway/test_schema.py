"""Requests made from the gateway's own OpenAPI document (schemathesis): no 500, and every response
is as documented."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.gateway.scripted import ScriptedEdge

MAX_EXAMPLES = 40
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_schema_conformance,
]  # fmt: skip


def check_operations(url: str) -> int:
    """Call every operation with valid and invalid requests; returns how many were called."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: list[Any] = list(schema.get_all_operations())
    operations = [one.ok() for one in found]
    for operation in operations:
        check_operation(operation, schemathesis.GenerationMode.POSITIVE)
        if operation.body:  # without one there is nothing to get wrong
            check_operation(operation, schemathesis.GenerationMode.NEGATIVE)
    return len(operations)


def check_operation(operation: Any, mode: Any) -> None:
    cases = operation.as_strategy(generation_mode=mode)

    @settings(
        max_examples=MAX_EXAMPLES, deadline=None, derandomize=True,
        phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases)
    def call(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "default"  # no generated name is a model's
        case.call_and_validate(checks=CHECKS)

    call()


@pytest.mark.long
async def test_generated_requests_get_documented_responses(edge: ScriptedEdge, url: str) -> None:
    assert await asyncio.to_thread(check_operations, url) == 8
    assert edge.seen, "no generated request was valid"


async def test_the_document_names_what_is_answered(url: str) -> None:
    async with httpx2.AsyncClient(base_url=url) as http:
        document = (await http.get("/openapi.json")).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert chat.keys() == {
        "200",
        "400",
        "401",
        "403",
        "404",
        "408",
        "413",
        "429",
        "500",
        "503",
        "504",
    }
    assert chat["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
