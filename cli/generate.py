"""`e2sci generate`: answer prompts with one process tree that lives no longer than that.

Or, with `target_only`, with the target alone in this process: what an exact method must give.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import msgspec
import typer

from bus.client import Chunk, Client
from bus.protocol.errors import RequestError, RequestFailedError
from bus.protocol.messages import FinishReason
from bus.protocol.requests import GenerationRequest
from bus.settings import BusSettings
from bus.store import Usage
from cli.group import say
from cli.options import Sampling
from cli.submit import follow
from launch.stack import Stack, StackOptions

__all__ = ["Generated", "answers_alone", "answers_together", "parse_prompts"]


class Generated(msgspec.Struct, frozen=True):
    """One answer.

    Attributes:
        token_ids: of the answer; an EOS that ended it is the last.
        text: without special tokens and stop string.
        finish_reason: `stop` or `length`.
        stats: `usage` (docs/architecture.md), method and seed.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    stats: dict[str, Any]


def parse_prompts(text: str, sampling: Sampling) -> list[GenerationRequest]:
    """Requests from JSON lines: each an object with `prompt` or `messages`, and any option that
    differs.

    Raises:
        RequestError: a line is wrong; the text says which.
    """
    requests = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = msgspec.json.decode(line, type=dict[str, Any])
            prompt = fields.pop("prompt", "")
            if not isinstance(prompt, str):
                raise RequestError("prompt: expected text")
            messages = fields.pop("messages", None)
            requests.append(sampling.updated(fields).request(prompt, messages))
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"line {number}: expected a JSON object, {error}") from None
        except RequestError as error:
            raise RequestError(f"line {number}: {error}") from None
    return requests


async def answers_together(
    requests: Sequence[GenerationRequest], options: StackOptions, stream: bool
) -> AsyncGenerator[Generated, None]:
    """Answers by draft and target in their own processes, in order.

    Args:
        stream: print each answer's text as it comes.

    Raises:
        RequestFailedError: a request ended with an error.
        ConfigurationError: the processes cannot be started.
    """
    ready = False

    def log(line: str) -> None:
        if ready:  # before that the error that ends the start says it all
            say(line)

    stack = Stack(options, log=log, quiet=True)
    async with stack:
        ready = True
        settings = BusSettings.load(redis_url=stack.redis_url)
        async with Client(settings=settings) as client:
            for request in requests:
                yield await _answer_together(client, request, stream)
        ready = False


async def _answer_together(client: Client, request: GenerationRequest, stream: bool) -> Generated:
    tokens: list[int] = []
    text: list[str] = []

    def take(_request_id: str, chunk: Chunk) -> None:
        tokens.extend(chunk.token_ids)
        text.append(chunk.text)
        if stream:
            typer.echo(chunk.text, nl=chunk.end is not None)

    end = await follow(client, request, take)
    if end.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        raise RequestFailedError(end.error or "the request was cancelled")
    stats = {**msgspec.to_builtins(end.usage), "method": request.method, "seed": request.seed}
    return Generated(tokens, "".join(text), end.finish_reason.value, stats)


def answers_alone(
    requests: Sequence[GenerationRequest],
    target: str,
    dtype: str,
    threads: int | None,
    stream: bool,
) -> Iterator[Generated]:
    """Answers by the target alone, one pass a token, in order.

    Raises:
        ModelError: the target cannot be loaded.
        RequestError: a prompt does not fit the model.
    """
    import torch

    from engines.torch.target import TargetModel

    if threads is not None:
        torch.set_num_threads(threads)
    model = TargetModel.load(target, dtype)
    for request in requests:
        yield _answer_alone(model, request, stream)


def _answer_alone(model: Any, request: GenerationRequest, stream: bool) -> Generated:
    from bench.reference import generate_alone
    from decoding.sampling import SamplingParams
    from edge_worker.text import AnswerText
    from engines.chat import encode_request

    prompt = encode_request(model.tokenizer, request)
    if len(prompt) + request.max_new_tokens > model.context_length:
        raise RequestError(
            f"{len(prompt)} prompt tokens and {request.max_new_tokens} new ones are more than the "
            f"{model.context_length} of the model's context; ask for fewer"
        )
    sampling = SamplingParams(request.temperature, request.top_p, request.top_k, request.seed)
    answer = AnswerText(model.tokenizer, request.stop)
    tokens: list[int] = []
    text: list[str] = []
    began = time.monotonic()
    for token in generate_alone(model, prompt, sampling, request.max_new_tokens, model.eos_tokens):
        tokens.append(token)
        text.append(answer.push([token]))
        if stream:
            typer.echo(text[-1], nl=False)
        if answer.stopped:
            break
    text.append(answer.flush())
    if stream:
        typer.echo(text[-1])
    ended = answer.stopped or tokens[-1] in model.eos_tokens
    reason = FinishReason.STOP if ended else FinishReason.LENGTH
    seconds = time.monotonic() - began
    usage = Usage(
        prompt_tokens=len(prompt),
        completion_tokens=len(tokens),
        seconds=seconds,
        tokens_per_s=len(tokens) / seconds,
        dtype=str(model.dtype),
        bitwise=model.probe.bitwise,
        probe_digest=model.probe.digest,
    )
    stats = {**msgspec.to_builtins(usage), "method": "target-only", "seed": request.seed}
    return Generated(tokens, "".join(text), reason.value, stats)
