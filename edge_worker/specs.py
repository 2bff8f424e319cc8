"""From a request to a session's specification."""

from __future__ import annotations

from bus.protocol.bounds import SessionCoupling
from bus.protocol.errors import RequestError
from bus.protocol.requests import GenerationRequest, session_id
from decoding import methods
from decoding.edge_state import MAX_CONTEXT, SessionSpec
from decoding.engine import DrafterCapabilities
from decoding.methods import Method
from decoding.sampling import SamplingParams
from engines.chat import encode_request
from engines.torch.drafter import ModelDrafter
from engines.torch.speculators.drafter import Eagle3Drafter
from engines.torch.thin import NoDrafter

EdgeModel = ModelDrafter | Eagle3Drafter | NoDrafter

HOW_TO_GET = {
    "ranked_head": (
        "a draft with a head of frequent tokens alone",
        "start the edge with --draft NAME@16384",
    ),
    "features": (
        "a draft that reads the target's features",
        "start the edge with --draft DIR, a directory of `e2sci train eagle3`",
    ),
}
"""What each of `DrafterCapabilities` is to a user, and what to do for it."""


def spec_of(
    request: GenerationRequest,
    model: EdgeModel,
    edge: str,
    drafter: DrafterCapabilities | None,
) -> SessionSpec:
    """Check the request against what the edge's model can do.

    Where the target writes on by itself, what the draft cannot hold is left to it.

    Args:
        drafter: what the edge's drafter can do; None: there is none.

    Raises:
        RequestError: the text says what is wrong and what to do.
    """
    method = methods.find(request.method)
    if method is None:
        raise RequestError(f"method: {methods.why_unknown(request.method)}")
    if method.steps is not None and request.coupling is not SessionCoupling.GUMBEL:
        raise RequestError(
            f"method {method.name!r} needs coupling 'gumbel', got {str(request.coupling)!r}: else "
            "the target's own steps would depend on when drafts arrive"
        )
    if method.speculator and request.coupling is not SessionCoupling.GUMBEL:
        raise RequestError(
            f"method {method.name!r} needs coupling 'gumbel', got {str(request.coupling)!r}: a "
            "tree is judged by the target's own tokens, which are a function of seed and position"
        )
    _check_logprobs(request, method)
    if request.ignore_eos and method.steps is not None:
        raise RequestError(f"ignore_eos: method {method.name!r} writes whole steps; use auto")
    prompt = encode_request(model.tokenizer, request)
    total = len(prompt) + request.max_new_tokens
    staged = bool(method.inner)  # a middle worker drafts, and knows its own limits
    if method.needs_draft and drafter is None:
        raise RequestError(
            f"method {method.name!r} needs a draft and this edge has none (drafter 'none'); use "
            "auto"
        )
    if drafter is not None and (missing := method.missing_of_drafter(drafter)):
        what, how = HOW_TO_GET[missing[0]]
        raise RequestError(
            f"method {method.name!r} needs {what}; this edge drafts with {model.name} and has "
            f"none: {how}, or use another method"
        )
    if drafter is not None and _gets_no_features(method, drafter):
        raise RequestError(
            f"method {method.name!r} gives a draft no features of the target, and {model.name} "
            "drafts by these alone: use eagle3-edge, or start the edge with another --draft"
        )
    if method.needs_draft and total > model.context_length:
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
        drafts=(drafter is not None or staged) and not method.speculator,
        draft_context=MAX_CONTEXT if staged else model.context_length,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        traceparent=request.traceparent,
        ignore_eos=request.ignore_eos,
    )


def _check_logprobs(request: GenerationRequest, method: Method) -> None:
    """Log-probabilities need a row of the target for each token, in the session itself."""
    if request.logprobs is None:
        return
    if request.coupling is not SessionCoupling.GUMBEL:
        raise RequestError(f"logprobs: they need coupling 'gumbel', got {str(request.coupling)!r}")
    if method.steps is not None:
        raise RequestError(
            f"logprobs: method {method.name!r} writes whole steps and gives none; use auto"
        )


def _gets_no_features(method: Method, drafter: DrafterCapabilities) -> bool:
    """Whether this edge's drafter would draft and have nothing to read."""
    drafts = not method.speculator and not method.inner
    return drafter.features and drafts and not method.reads_features
