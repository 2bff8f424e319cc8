"""Requests that the gateway's tests make, and what they expect of an error."""

from __future__ import annotations

from typing import Any

import httpx2

from tests.gateway.scripted import MODEL

CHAT = "/v1/chat/completions"
HI = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": MODEL, "prompt": "Hi"}
JSON = {"Content-Type": "application/json"}
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def post(http: httpx2.AsyncClient, body: Any, path: str = CHAT) -> dict[str, Any]:
    """The error object of a request that must fail with 400."""
    response = await http.post(path, json=body)
    assert response.status_code == 400, response.text
    return error(response)


def error(response: httpx2.Response) -> dict[str, Any]:
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found
