"""From a request to a session's specification."""

from __future__ import annotations

from bus.protocol.errors import RequestError
from bus.protocol.requests import GenerationRequest, session_id
from decoding import methods
from decoding.edge_state import SessionSpec
from decoding.sampling import SamplingParams
from engines.tokenizer import encode_prompt
from engines.torch.drafter import ModelDrafter


def spec_of(request: GenerationRequest, model: ModelDrafter, edge: str) -> SessionSpec:
    """Check the request against what the edge's model can do.

    Raises:
        RequestError: the text says what is wrong and what to do.
    """
    method = methods.find(request.method)
    if method is None:
        offered = ", ".join(methods.names())
        raise RequestError(f"unknown method {request.method!r}; known methods: {offered}")
    prompt = encode_prompt(model.tokenizer, request.prompt, request.raw)
    total = len(prompt) + request.max_new_tokens
    if total > model.context_length:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_new_tokens is "
            f"{request.max_new_tokens}: {total} together, the model's context holds "
            f"{model.context_length}. Shorten the prompt or ask for fewer tokens"
        )
    return SessionSpec(
        session=session_id(request.id),
        client=request.client,
        edge=edge,
        method=method,
        prompt=prompt,
        sampling=SamplingParams(
            request.temperature, request.top_p, request.top_k, request.seed, request.coupling
        ),
        max_new_tokens=request.max_new_tokens,
        tokenizer_digest=model.tokenizer_digest,
    )
