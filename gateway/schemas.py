"""Bodies of requests as OpenAI's API has them, with vLLM's `top_k` and our own `e2sci`.

A field that would change the answer and is not supported is refused by name; null and values that
change nothing are accepted (`NEUTRAL`). Ranges are checked where every request is checked, in
`bus.protocol.requests`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

from bus.protocol.bounds import MAX_LOGPROBS
from bus.protocol.chat import MAX_MESSAGES

__all__ = [
    "MAX_N",
    "MAX_PROMPTS",
    "ChatRequest",
    "CompletionRequest",
    "Extension",
    "GenerationBody",
    "Message",
    "Prompt",
]

MAX_N = 16
MAX_PROMPTS = 128
_MAX_PARTS = 1024

_ANY = object()
"""Of a field that is a note of the caller's to OpenAI: it has no effect on an answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": (_ANY,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (_ANY,),
    "prompt_cache_retention": (_ANY,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (_ANY,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Fields that are not supported, with the values that change nothing; null is one for each."""
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
    "type": ("text", "message"),
}
"""Of a message: the API's own answers may be sent back as they came."""


_MAX_DIVERGENCE = math.log(2.0)
"""Of Jensen and Shannon, in nats: no threshold is higher."""


def _document(neutral: dict[str, tuple[Any, ...]]) -> Callable[[dict[str, Any]], None]:
    """Writes fields of no effect into a model's JSON schema, and that there are no others."""

    def extend(schema: dict[str, Any]) -> None:
        schema["additionalProperties"] = False
        for name, values in neutral.items():
            free = any(value is _ANY for value in values)
            schema["properties"].setdefault(
                name,
                {"description": "Accepted, without effect."}
                if free
                else {
                    "description": "Not supported; these values are accepted, without effect.",
                    "enum": [None, *values],
                },
            )

    return extend


Prompt = str | list[int]
"""Text or token ids."""


class _Items:
    """Of a list: at most so many items, and the first wrong one ends the check. A body may hold a
    million of them, whose errors would take a minute and fill the response."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema: dict[str, Any] = {**handler(source), "fail_fast": True}
        if self._most is not None:
            schema["max_length"] = self._most
        return cast("CoreSchema", schema)


def _kind(value: Any) -> str:
    return "[list]" if isinstance(value, list) else "[text]"


_Text = Annotated[str, Tag("[text]")]
_Texts = Annotated[list[str], _Items(), Tag("[list]")]
_ONE_OR_LIST = Discriminator(_kind)
"""Of text or a list only the one that is given reports what is wrong."""


def _prompts(value: Any) -> list[Prompt]:
    if isinstance(value, str) or _are_ids(value):
        return [value]
    if not isinstance(value, list) or not (_are_texts(value) or all(map(_are_ids_or_none, value))):
        raise ValueError(
            "expected a text, a list of texts, a list of token ids, or a list of such lists"
        )
    if not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"expected 1 … {MAX_PROMPTS} prompts, got {len(value)}")
    if not all(value):
        raise ValueError("empty; give some text or token ids")
    return value


def _are_texts(value: list[Any]) -> bool:
    return all(isinstance(item, str) for item in value)


def _are_ids_or_none(value: Any) -> bool:
    return value == [] or _are_ids(value)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


_IDS = {"type": "array", "items": {"type": "integer"}}
_MANY = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
Prompts = Annotated[
    list[Prompt],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {**_IDS, "minItems": 1},
                {**_MANY, "items": {"type": "string"}},
                {**_MANY, "items": _IDS},
            ],
            "title": "Prompt",
        }
    ),
]
"""One or several, as a list however they come."""


class _Body(BaseModel):
    # strict: "5" is no number. Infinity and NaN are not JSON, though Python reads them.
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Body):
    """A part of a message's content. Images, audio and files are not supported."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


_Parts = Annotated[list[TextPart], _Items(_MAX_PARTS), Tag("[list]")]
Content = Annotated[_Text | _Parts, _ONE_OR_LIST]


class Message(_Body):
    """What a participant said. `developer` is another name of `system`; tools are not supported."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_document(_MESSAGE_NEUTRAL))

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _check_extra(self) -> Self:
        _refuse_unsupported(self.model_extra or {}, _MESSAGE_NEUTRAL, "of a message ")
        return self


class StreamOptions(_Body):
    """`continuous_usage_stats` (vLLM) puts usage so far into each chunk; there `prompt_tokens` is 0
    until the last."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Extension(_Body):
    """Our own options: the decoding method, the threshold of a lossy one (e2sci where none is
    named), how draft and target share the seed, and whether the prompt goes to the model without
    the chat template (completions: true where absent)."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = None
    threshold: Annotated[float, Field(ge=0, le=_MAX_DIVERGENCE)] | None = None
    coupling: Literal["gumbel", "residual"] | None = None
    raw: bool | None = None


class GenerationBody(_Body):
    """What both ways to generate share. An absent `temperature` is 1, as in OpenAI's API."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_document(NEUTRAL))

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[_Text | _Texts, _ONE_OR_LIST] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: int | None = None
    user: str | None = None
    ignore_eos: bool | None = None
    e2sci: Extension | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        extra = dict(self.model_extra or {})
        if extra.get("best_of") == self.n and type(extra.get("best_of")) is int:
            del extra["best_of"]
        _refuse_unsupported(extra, NEUTRAL, "")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: they need stream: true")
        return self


class ChatRequest(GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], _Items(MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if not self.messages:
            raise ValueError("messages: none; give at least one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: it needs logprobs: true")
        return self


class CompletionRequest(GenerationBody):
    """Body of `POST /v1/completions`: texts or lists of token ids to continue."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


def _refuse_unsupported(
    extra: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str
) -> None:
    for name, value in extra.items():
        if name not in neutral:
            raise ValueError(f"{name[:100]}: the field {where}is not known here; remove it")
        if value is None or any(_same(value, one) for one in neutral[name]):
            continue
        kept = ", ".join(repr(one) for one in neutral[name] if one is not _ANY)
        alone = f"; accepted, without effect: null{', ' + kept if kept else ''}"
        raise ValueError(f"{name}: not supported{alone}")


def _same(value: Any, neutral: Any) -> bool:
    """JSON's equality: false is not 0."""
    if neutral is _ANY:
        return True
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
