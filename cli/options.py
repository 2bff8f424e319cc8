"""Options that several commands share: how to sample, which models, where Redis is.

Ranges are checked where every request is checked, in `bus.protocol.requests`; here only the types
are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from bus.protocol.bounds import WINDOW, SessionCoupling
from bus.protocol.errors import ConfigurationError, RequestError
from bus.protocol.requests import GenerationRequest, new_request
from decoding import methods
from engines.kinds import DrafterKind

if TYPE_CHECKING:
    from engines.catalog.registry import Specs

__all__ = ["Sampling", "read_prompt"]

STDIN = "-"

_METHODS = "\n\n".join(
    ("How to decode:", *(f"{name}: {summary}" for name, summary in methods.summaries()))
)
"""A paragraph for each; typer prints them as lines."""

Prompt = Annotated[
    str | None, typer.Argument(help="The prompt, in quotes; - reads it from standard input.")
]
Method = Annotated[str | None, typer.Option(help=_METHODS, show_default="auto, lossless")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Longest answer, in tokens.", show_default="256")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 always takes the most probable token; 1 samples as the model is.", show_default="0"
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample only among the most probable tokens that together reach this "
        "probability; 1 is off.",
        show_default="1",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Sample only among this many most probable tokens; 0 is off.", show_default="0"
    ),
]
CoupledBy = Annotated[
    SessionCoupling | None,
    typer.Option(
        help="How draft and target share the seed. gumbel: a lossless method's answer is the "
        "target's own for the seed, and sends token ids alone. residual: only distributed as the "
        "target's, sends the draft's probabilities; accepts slightly more (docs/method.md).",
        show_default="gumbel",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Fixes every random choice: the same seed gives the same text.", show_default="random"
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; may be given several times."),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Give the model the prompt as it is, without chat template.")
]
ClientName = Annotated[
    str | None,
    typer.Option(
        help="Who asks; what is learnt about pace carries over to the client's next prompts.",
        show_default="anonymous",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Seconds to wait for the whole answer; then the prompt is cancelled.",
        show_default="as long as it takes",
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        help="Redis to use, e.g. redis://:password@host:6379/0.",
        show_default="E2SCI_REDIS_URL, else the running `e2sci up`",
    ),
]
Pair = Annotated[
    str | None,
    typer.Option(
        help="Named pair: its target and its draft, where --target and --draft name no other; "
        "`e2sci pull --list`, docs/models.md.",
        show_default="default",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Target model: default (SmolLM2-135M-Instruct), a registered name, a Hugging Face "
        "id, a directory or a .gguf file.",
        show_default="the pair's",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Draft model: default (shipped with this project), a registered name, a Hugging Face "
        "id, a directory or a .gguf file.",
        show_default="the pair's",
    ),
]
Speculator = Annotated[
    list[str] | None,
    typer.Option(
        help="Directory of a speculator of the target (methods medusa, eagle3; docs/speculators.md)"
        "; may be given once for each kind; none: without.",
        show_default="those shipped for the target",
    ),
]
MiddleModel = Annotated[
    str | None,
    typer.Option(
        help="Model of the middle workers (method pipespec); any draft may be one.",
        show_default="the draft",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Number format: int8, float32, bfloat16, or auto (int8 for named models on a CPU)."
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        min=int(WINDOW.low),
        max=int(WINDOW.high),
        help="Tokens drafted before each check.",
        show_default="4",
    ),
]
DraftedBy = Annotated[
    DrafterKind | None,
    typer.Option(
        help="Who drafts: the model; lookup (repeats what followed the same words earlier; costs "
        "nothing); lookup where it has something and else the model; or none (a thin client: the "
        "target writes by itself).",
        show_default="lookup+model",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of each model worker.", show_default="the cores, shared"),
]
Link = Annotated[
    str | None,
    typer.Option(
        help="To measure: emulate a network between edge and cloud, on this machine. A profile "
        "(lan, metro, 5g, wan, satellite, lossy, outages), a round trip such as 40ms, or a trace "
        "file; docs/link.md.",
        show_default="none",
    ),
]
Paced = Annotated[
    str,
    typer.Option(
        help="Measure as on another device: STEP,PASS, the least ms of a draft step and of a "
        "target pass (a machine that is slower does with a multiple of both and of the round "
        "trip); or contended, what each takes here while the other model runs, measured first.",
    ),
]
OwnPrompts = Annotated[
    int, typer.Option(min=1, max=20, help="How many of this project's prompts to answer.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The request options as given; None is "not given"."""

    method: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    coupling: SessionCoupling | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    raw: bool = False
    client: str | None = None

    def updated(self, values: dict[str, Any]) -> Self:
        """These options with some replaced, e.g. by a line of a prompts file.

        Raises:
            RequestError: there is no such option.
        """
        known = asdict(self)
        for name in values:
            if name not in known:
                raise RequestError(
                    f"{name!r}: no such field; known are prompt, messages, {', '.join(known)}"
                )
        return replace(self, **values)

    def request(self, prompt: str = "", messages: Any = None) -> GenerationRequest:
        """The request, checked.

        Args:
            messages: of a chat, instead of a prompt (`bus.protocol.chat.parse_messages`).

        Raises:
            RequestError: a value is wrong or the method unknown; the text says which.
        """
        request = new_request(prompt, messages=messages, **asdict(self))
        checked_method(request.method)
        return request


def checked_method(name: str) -> str:
    """A method's name.

    Raises:
        RequestError: there is no such method.
    """
    if methods.find(name) is None:
        raise RequestError(f"method: {methods.why_unknown(name)}")
    return name


def read_prompt(argument: str) -> str:
    """The prompt as given, or all of standard input for `-`.

    Raises:
        RequestError: standard input is not UTF-8.
    """
    if argument != STDIN:
        return argument
    return _decoded(sys.stdin.buffer.read(), "standard input")


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        RequestError: it cannot be read or is not UTF-8.
    """
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8 (byte {error.start}); encode the text as UTF-8"
        ) from None


def checked_models(pair: str | None, target: str | None, draft: str | None) -> Specs:
    """Target and draft to use (`engines.catalog.registry.chosen_models`), before anything is
    started.

    Raises:
        ConfigurationError: there is no such pair.
        ModelError: a model is not where its spec says; the text says what to do.
    """
    from engines.catalog.registry import chosen_models
    from engines.catalog.sources import require_found

    specs = chosen_models(pair, target, draft)
    require_found(specs)
    return specs


def checked_drafts(
    pair: str | None, target: str | None, drafts: Sequence[str] | None
) -> tuple[str, tuple[str, ...]]:
    """The same for several drafts; without any, it is the pair's.

    Raises:
        ConfigurationError, ModelError: as `checked_models`.
    """
    from engines.catalog.sources import require_found

    first = checked_models(pair, target, drafts[0] if drafts else None)
    others = (drafts or [])[1:]
    require_found(others)
    return first.target, (first.draft, *others)


def checked_link(link: str | None) -> str | None:
    """Before anything is started.

    Raises:
        ConfigurationError: there is no such link.
    """
    if link is not None:
        from launch.link.profiles import find_link

        find_link(link)
    return link


def speculator_setting(given: list[str] | None) -> str | None:
    """The cloud workers' setting.

    Raises:
        ModelError: a directory holds no speculator.
    """
    # Here because few commands need it.
    from engines.catalog.speculators import as_setting

    return as_setting(given) if given else None


def checked_dtype(dtype: str) -> str:
    known = ("auto", "float32", "bfloat16", "int8")
    if dtype not in known:
        raise typer.BadParameter(f"--dtype {dtype!r} is unknown; use one of {', '.join(known)}")
    return dtype


def number(text: str, most: float) -> float:
    """A number in 0 … `most`.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise ConfigurationError(f"{text.strip()!r}: expected a number in 0 … {most:g}")
    return value
