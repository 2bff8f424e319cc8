"""The package `openai`, unmodified, against the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import (
    APIError,
    AsyncOpenAI,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
)

from tests.gateway.conftest import until
from tests.gateway.scripted import MODEL, PROBE, WORDS, ScriptedEdge

TEXT = "".join(WORDS)
HI: list[Any] = [{"role": "user", "content": "Hi"}]
FIRST_OF_N = 3


async def test_the_models_are_those_of_the_cloud_workers(
    edge: ScriptedEdge, openai: AsyncOpenAI
) -> None:
    models = [model async for model in openai.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await openai.models.retrieve(MODEL)).owned_by == "e2sci"
    assert (await openai.models.retrieve("default")).id == MODEL
    with pytest.raises(NotFoundError, match="does not exist; served: 'tiny-target'") as caught:
        await openai.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


async def test_a_chat_completion(edge: ScriptedEdge, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "H"}, {"type": "text", "text": "i"},
            ]},
        ],
        max_completion_tokens=9, temperature=0.5, top_p=0.9, seed=4, stop="END", user="ann",
        extra_body={"top_k": 5, "e2sci": {"method": "e2sci", "coupling": "residual"}},
    )  # fmt: skip
    [request] = edge.seen
    assert [(one.role, one.content) for one in request.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]
    given = request.model_dump(exclude={"id", "messages", "traceparent"}, exclude_defaults=True)
    assert given == {
        "method": "e2sci", "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
        "coupling": "residual", "seed": 4, "stop": ("END",), "client": "ann",
    }  # fmt: skip
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.id == f"chatcmpl-{request.id}"
    assert (answer.model, answer.system_fingerprint) == (MODEL, PROBE)
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 5, 12)
    details = usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (6, 2)
    own = {"drafted": 8, "accepted": 6, "rollbacks": 1, "lossless": True}
    assert answer.model_extra == {"e2sci": {"request_ids": [request.id], **own}}


async def test_absent_options_take_openais_defaults(
    edge: ScriptedEdge, openai: AsyncOpenAI
) -> None:
    await openai.chat.completions.create(model="default", messages=HI)
    await openai.completions.create(model="default", prompt="Hi")
    chat, text = edge.seen
    assert (chat.temperature, chat.max_new_tokens, chat.client) == (1.0, 1024, "anonymous")
    assert (text.temperature, text.max_new_tokens, text.raw) == (1.0, 16, True)
    assert chat.seed != text.seed


async def test_a_stream_and_its_usage(edge: ScriptedEdge, openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        model=MODEL, messages=HI, stream=True, max_tokens=3, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert [delta.content for delta in deltas] == ["", "Hello there", ",", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == FIRST_OF_N
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["e2sci"]["request_ids"] == [edge.seen[0].id]
    assert {chunk.id for chunk in chunks} == {f"chatcmpl-{edge.seen[0].id}"}


def ask_synchronously(url: str) -> tuple[str | None, list[str]]:
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(model=MODEL, messages=HI)
        stream = client.completions.create(model=MODEL, prompt="Hi", stream=True)
        return whole.choices[0].message.content, [chunk.choices[0].text for chunk in stream]


async def test_the_synchronous_client(edge: ScriptedEdge, url: str) -> None:
    whole, pieces = await asyncio.to_thread(ask_synchronously, url)
    assert whole == TEXT
    assert pieces == ["Hello there", ", world", "!", ""]


async def test_n_choices_have_seeds_of_their_own(edge: ScriptedEdge, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(
        model=MODEL, messages=HI, n=FIRST_OF_N, seed=2**63 - 2, stream=False
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(request.seed for request in edge.seen) == [0, 2**63 - 2, 2**63 - 1]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 15)
    texts = ["", "", ""]
    stream = await openai.chat.completions.create(model=MODEL, messages=HI, n=3, stream=True)
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [TEXT] * 3


async def test_log_probabilities_of_a_chat(edge: ScriptedEdge, openai: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HI, "logprobs": True, "max_tokens": 3}
    answer = await openai.chat.completions.create(**options, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [(one.token, one.logprob, one.bytes) for one in content[:2]] == [
        ("Hello", -0.5, list(b"Hello")),
        (" there", -0.5, list(b" there")),
    ]
    assert [(top.token, top.logprob) for top in content[2].top_logprobs] == [
        (",", -0.5),
        ("~1", -1.0),
    ]
    tokens = []
    async for chunk in await openai.chat.completions.create(**options, stream=True):
        found = chunk.choices[0].logprobs
        tokens += [one.token for one in (found.content or [])] if found else []
    assert tokens == list(WORDS[:3])
    assert [request.logprobs for request in edge.seen] == [2, 0]


async def test_echo_with_log_probabilities(edge: ScriptedEdge, openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(
        model=MODEL, prompt="a b c", echo=True, logprobs=1, max_tokens=2
    )
    [choice] = answer.choices
    assert choice.text == "a b cHello there"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", " b", " c", "Hello", " there"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs is not None
    assert list(choice.logprobs.top_logprobs) == [
        None, {" b": -0.5}, {" c": -0.5}, {"Hello": -0.5}, {" there": -0.5},
    ]  # fmt: skip
    assert choice.logprobs.text_offset == [0, 1, 3, 5, 10]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scored", [False, True])
async def test_echo_alone_returns_no_token_of_an_answer(
    edge: ScriptedEdge, openai: AsyncOpenAI, stream: bool, scored: bool
) -> None:
    options: dict[str, Any] = {"logprobs": 1} if scored else {}
    answer: Any = await openai.completions.create(
        model=MODEL, prompt=[11, 12, 13], echo=True, max_tokens=0, stream=stream, **options
    )
    chunks = [chunk async for chunk in answer] if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a b c"
    assert chunks[-1].choices[0].finish_reason == "length"
    if scored:
        assert chunks[0].choices[0].logprobs.tokens == ["a", " b", " c"]
    else:
        assert chunks[0].choices[0].logprobs is None
    if not stream:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 0)
    [request] = edge.seen
    assert (request.prompt_ids, request.max_new_tokens) == ((11, 12, 13), 1)
    assert (request.logprobs, request.prompt_logprobs) == (1 if scored else 0, True)


async def test_several_prompts(edge: ScriptedEdge, openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(
        model=MODEL, prompt=["one", "two"], n=2, seed=5, max_tokens=1, echo=True
    )
    assert [choice.text for choice in answer.choices] == ["oneHello"] * 2 + ["twoHello"] * 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * 7
    assert sorted((request.prompt, request.seed) for request in edge.seen) == [
        ("one", 5), ("one", 6), ("two", 5), ("two", 6),
    ]  # fmt: skip
    await openai.completions.create(model=MODEL, prompt=[[1, 2], [3]])
    assert sorted(request.prompt_ids for request in edge.seen[4:]) == [(1, 2), (3,)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_edge_is_400(
    edge: ScriptedEdge, openai: AsyncOpenAI, stream: bool
) -> None:
    edge.error = "method: there is no method 'x'"
    with pytest.raises(BadRequestError, match="there is no method 'x'") as caught:
        await openai.chat.completions.create(model=MODEL, messages=HI, stream=stream)
    assert caught.value.param == "e2sci.method"


async def test_a_failure_while_it_runs_is_500_or_an_error_in_the_stream(
    edge: ScriptedEdge, openai: AsyncOpenAI
) -> None:
    edge.error, edge.error_after, edge.error_s = "every cloud worker has gone", 1, 0.1
    with pytest.raises(InternalServerError, match="every cloud worker has gone"):
        await openai.chat.completions.create(model=MODEL, messages=HI)
    stream = await openai.chat.completions.create(model=MODEL, messages=HI, stream=True)
    pieces = [await anext(stream), await anext(stream)]
    assert [chunk.choices[0].delta.content for chunk in pieces] == ["", "Hello there"]
    with pytest.raises(APIError, match="every cloud worker has gone"):
        await anext(stream)


async def test_an_internal_error_before_the_first_token_is_500(
    edge: ScriptedEdge, openai: AsyncOpenAI
) -> None:
    for edge.error, edge.error_s in (
        ("internal error in the edge worker; see its log", 0.0),
        ("no cloud worker answers", 20.0),
    ):
        with pytest.raises(InternalServerError, match=edge.error):
            await openai.chat.completions.create(model=MODEL, messages=HI)


async def test_closing_a_stream_cancels_its_requests(
    edge: ScriptedEdge, openai: AsyncOpenAI
) -> None:
    edge.held = asyncio.Event()
    stream = await openai.chat.completions.create(model=MODEL, messages=HI, n=2, stream=True)
    async for _ in stream:
        if len(edge.seen) == 2:
            break
    await stream.close()
    await until(lambda: sorted(edge.cancelled) == sorted(one.id for one in edge.seen))


async def test_a_caller_that_gives_up_cancels_its_request(
    edge: ScriptedEdge, openai: AsyncOpenAI
) -> None:
    edge.held = asyncio.Event()
    asking = asyncio.create_task(openai.chat.completions.create(model=MODEL, messages=HI))
    await until(lambda: bool(edge.seen))
    asking.cancel()
    await until(lambda: edge.cancelled == [edge.seen[0].id])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            "context_overflow: prompt and max_new_tokens take 9",
            "context_length_exceeded",
            " max_tokens",
        ),
        ("unknown_method: log-probabilities need coupling", None, "log-probabilities need"),
    ],
)
async def test_a_refusal_of_the_cloud_is_400_with_openais_code(
    edge: ScriptedEdge, openai: AsyncOpenAI, error: str, code: str | None, words: str
) -> None:
    edge.error = error
    with pytest.raises(BadRequestError, match=words) as caught:
        await openai.chat.completions.create(model=MODEL, messages=HI)
    assert caught.value.code == code


async def test_our_own_options_reach_the_queue(edge: ScriptedEdge, openai: AsyncOpenAI) -> None:
    for own in ({"threshold": 0.1}, {"method": "fsd", "threshold": 0.2}, {"method": "sd"}):
        await openai.chat.completions.create(
            model=MODEL, messages=HI, extra_body={"e2sci": own, "ignore_eos": True}
        )
    assert [request.method for request in edge.seen] == ["e2sci:0.1", "fsd:0.2", "sd"]
    assert all(request.ignore_eos for request in edge.seen)
