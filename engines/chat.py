"""From a request to token ids: prompts, chat messages, ids as they are.

Special tokens come from the chat template alone, never from what users, systems and assistants
write; where there is no template, from the tokenizer alone (a leading `<s>`). The template is
rendered with contents in which the first and last characters of control tokens (`<`, `>`) are
replaced with private characters, one for one. The control tokens that the result holds are the
template's. Then the characters are put back, and `engines.controls` encodes the text as a whole.

Knows chat templates. Does not know models' weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from bus.protocol.chat import ChatMessage, Role
from bus.protocol.errors import RequestError
from bus.protocol.requests import GenerationRequest
from engines.controls import Controls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["encode_messages", "encode_prompt", "encode_request", "prepare"]

_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_PROBE = "Answer in rhymes"
_JOINED_BY = "\n\n"
"""Between a system's message and the user's that it is folded into."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What is worked out once for a tokenizer.

    Attributes:
        takes_system: by chat template, whether it shows a system's message.
    """

    controls: Controls
    takes_system: dict[str, bool]


_known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_lock = threading.Lock()


def prepare(tokenizer: Tokenizer) -> None:
    """Work out what later calls share, which takes about as long as loading the tokenizer; else
    the first of them does.

    Raises:
        ModelError: the tokenizer cannot be copied.
    """
    _of(tokenizer)


def encode_request(tokenizer: Tokenizer, request: GenerationRequest) -> tuple[int, ...]:
    """Token ids of a request's prompt, messages or prompt_ids, for the model to go on from.

    `prompt_ids` are taken as they are. They may name control tokens: they are numbers, which no
    text can turn into.

    Raises:
        RequestError: as `encode_prompt` and `encode_messages`; or an id is not a token.
    """
    if request.messages:
        return encode_messages(tokenizer, request.messages)
    if not request.prompt_ids:
        return encode_prompt(tokenizer, request.prompt, request.raw)
    num_tokens = _of(tokenizer).controls.num_tokens
    for place, token in enumerate(request.prompt_ids):
        if token >= num_tokens:
            raise RequestError(
                f"prompt_ids: id {token} at index {place} is not a token of this model; expected "
                f"ids below {num_tokens}"
            )
    return request.prompt_ids


def encode_prompt(tokenizer: Tokenizer, text: str, raw: bool) -> tuple[int, ...]:
    """Token ids of a prompt, ready for the model to go on from.

    Args:
        text: what the user typed.
        raw: False puts it as the user's turn into the model's chat template and opens the
            answer's turn; True takes the text as it is (a tokenizer that begins texts with a
            special token still does). No part of it becomes a control token either way.

    Raises:
        RequestError: empty, not valid Unicode, or no chat template where one is needed.
    """
    if not text:
        raise RequestError("the prompt is empty; expected some text")
    if not raw:
        return encode_messages(tokenizer, [ChatMessage(role=Role.USER, content=text)])
    _check_unicode(text)
    return _not_empty(_of(tokenizer).controls.encode(text, add_special_tokens=True))


def encode_messages(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
    """Token ids of a chat in the model's template, with the answer's turn opened.

    Where the template knows no system's message, those that begin the chat are put before the
    first user's, each with an empty line after it.

    Raises:
        RequestError: not valid Unicode, no chat template, or the template refuses the chat or
            leaves out a system's message.
    """
    if not tokenizer.chat_template:
        raise RequestError(
            "this model has no chat template; send the prompt as raw text (raw=1, --raw)"
        )
    for message in messages:
        _check_unicode(message.content)
    known = _of(tokenizer)
    if messages and messages[0].role is Role.SYSTEM and not _takes_system(tokenizer, known):
        messages = _folded(messages)
    private = _private_marks(known.controls.marks, [message.content for message in messages])
    text = _rendered(tokenizer, known.controls, messages, private)
    _check_shown(messages, text, private)
    back = {ord(twin): mark for mark, twin in private.items()}
    marked = known.controls.mark(text).translate(back)
    return _not_empty(known.controls.encode(marked, add_special_tokens=False))


def _of(tokenizer: Tokenizer) -> _Known:
    with _lock:
        known = _known.get(tokenizer)
        if known is None:
            known = _known[tokenizer] = _Known(Controls(tokenizer), {})
        return known


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8 text: {error}") from error


def _not_empty(ids: Iterable[int]) -> tuple[int, ...]:
    found = tuple(ids)
    if not found:
        raise RequestError("the prompt has no tokens for this model; expected some text")
    return found


def _render(tokenizer: Tokenizer, messages: Iterable[Mapping[str, str]]) -> str:
    """The template's text, with the answer's turn opened. Raises TemplateError."""
    return str(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    )


def _rendered(
    tokenizer: Tokenizer,
    controls: Controls,
    messages: Sequence[ChatMessage],
    private: Mapping[str, str],
) -> str:
    """The chat with private characters in place of the marks of contents, so that the control
    tokens in it are the template's.

    Templates of reasoning models look for `</think>` in an assistant's message and leave out what
    comes before it. So that message is given with its control tokens, where the template writes
    the same control tokens with them as without.
    """
    table = str.maketrans(dict(private))
    plain = [(str(one.role), one.content.translate(table)) for one in messages]
    try:
        text = _render(tokenizer, map(_as_mapping, plain))
    except TemplateError as error:
        raise RequestError(f"the model's chat template refused the prompt: {error}") from error
    shown = [
        (role, _translate_around(controls, one.content, table) if role == "assistant" else content)
        for one, (role, content) in zip(messages, plain, strict=True)
    ]
    if shown == plain:
        return text
    try:
        other = _render(tokenizer, map(_as_mapping, shown))
    except TemplateError:
        return text
    written = [match[0] for match in controls.find(text)]
    return other if written == [match[0] for match in controls.find(other)] else text


def _as_mapping(message: tuple[str, str]) -> dict[str, str]:
    return {"role": message[0], "content": message[1]}


def _translate_around(controls: Controls, text: str, table: dict[int, str]) -> str:
    """`text` translated, but for the control tokens in it."""
    pieces, end = [], 0
    for match in controls.find(text):
        pieces += [text[end : match.start()].translate(table), match[0]]
        end = match.end()
    return "".join([*pieces, text[end:].translate(table)])


def _private_marks(marks: Iterable[str], contents: Iterable[str]) -> dict[str, str]:
    """A private character for each mark, none of which occurs in the contents."""
    used = set[str]().union(*contents)
    free = (chr(code) for codes in _PRIVATE for code in codes if chr(code) not in used)
    private = dict(zip(marks, free, strict=False))
    if len(private) < len(set(marks)):
        raise RequestError("the prompt uses nearly all private Unicode characters; leave some out")
    return private


def _takes_system(tokenizer: Tokenizer, known: _Known) -> bool:
    """Whether the template shows a system's message that begins a chat."""
    template = str(tokenizer.chat_template)
    if template not in known.takes_system:
        chat = [("system", _PROBE), ("user", "Hi")]
        try:
            known.takes_system[template] = _PROBE in _render(tokenizer, map(_as_mapping, chat))
        except TemplateError:
            known.takes_system[template] = False
    return known.takes_system[template]


def _folded(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Messages with the system's that begin them put before the first user's."""
    systems: list[str] = []
    for message in messages:
        if message.role is not Role.SYSTEM:
            break
        systems.append(message.content)
    others = list(messages[len(systems) :])
    for place, message in enumerate(others):
        if message.role is Role.USER:
            content = _JOINED_BY.join([*systems, message.content])
            others[place] = ChatMessage(role=Role.USER, content=content)
            return others
    raise RequestError(
        "this model's chat template knows no system message, and the chat has no user's message "
        "to put it before; add one"
    )


def _check_shown(messages: Sequence[ChatMessage], text: str, private: Mapping[str, str]) -> None:
    """Some templates show one system's message of several and drop the others."""
    table = str.maketrans(dict(private))
    systems = [place for place, one in enumerate(messages) if one.role is Role.SYSTEM]
    if systems in ([], [0]):
        return
    for place in systems:
        if messages[place].content.strip().translate(table) not in text:
            raise RequestError(
                f"message {place}: the model's chat template leaves this system message out; give "
                "one system message, as the first"
            )
