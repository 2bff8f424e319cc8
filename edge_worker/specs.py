"""From a request to a session's specification."""

from __future__ import annotations

from bus.protocol.errors import RequestError
from bus.protocol.requests import GenerationRequest, session_id
from decoding import methods
from decoding.edge_state import MAX_CONTEXT, SessionSpec
from decoding.sampling import SamplingParams
from engines.tokenizer import encode_prompt
from engines.torch.drafter import ModelDrafter
from engines.torch.thin import NoDrafter

EdgeModel = ModelDrafter | NoDrafter


def spec_of(
    request: GenerationRequest, model: EdgeModel, edge: str, drafts: bool = True
) -> SessionSpec:
    """Check the request against what the edge's model can do.

    Where the target writes on by itself, what the draft cannot hold is left to it.

    Args:
        drafts: whether the edge has anything to draft with.

    Raises:
        RequestError: the text says what is wrong and what to do.
    """
    method = methods.find(request.method)
    if method is None:
        offered = ", ".join(methods.names())
        raise RequestError(f"unknown method {request.method!r}; known methods: {offered}")
    prompt = encode_prompt(model.tokenizer, request.prompt, request.raw)
    total = len(prompt) + request.max_new_tokens
    staged = bool(method.inner)  # a middle worker drafts, and knows its own limits
    if not method.runs_on and not drafts:
        raise RequestError(
            f"method {method.name!r} needs a draft and this edge has none (drafter 'none'); use "
            "auto"
        )
    if not method.runs_on and total > model.context_length:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_new_tokens is "
            f"{request.max_new_tokens}: {total} together, the context of the draft {model.name} "
            f"holds {model.context_length}. Shorten the prompt, ask for fewer tokens, or use auto, "
            "with which the target goes on by itself"
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
        drafts=drafts or staged,
        draft_context=MAX_CONTEXT if staged else model.context_length,
    )
