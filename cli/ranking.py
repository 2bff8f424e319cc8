"""The command `e2sci rank`: which tokens texts hold most often, for drafts with a smaller head.

As in `cli.main`, what loads torch is imported where it is used.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from bus.protocol.errors import ConfigurationError
from cli import options
from cli.group import INTERRUPTED, say

__all__ = ["rank"]


def rank(
    model: Annotated[
        str,
        typer.Argument(
            help="The model whose tokens to rank: default, a registered name, a Hugging Face id, "
            "a directory or a .gguf file. Its weights are not loaded.",
            show_default=False,
        ),
    ],
    corpus: Annotated[
        list[Path],
        typer.Option(
            help="Texts to count in: .jsonl (all strings of a row, without ids) or .txt; may be "
            "given several times."
        ),
    ],
    size: Annotated[int, typer.Option(min=16, help="Tokens to keep, most frequent first.")] = 65536,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the ranking; drafts find those in the default directory.",
            show_default="MODEL.safetensors among the user's rankings",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Rank a model's tokens by how often texts hold them.

    A draft with a head of the V most frequent tokens (--draft NAME@V) needs
    such a ranking of its tokenizer; docs/models.md. Count in texts like the
    answers you expect.
    """
    from engines.catalog.sources import require_found

    require_found([model])
    from engines.catalog.ranking import own_rankings, save_ranking
    from engines.catalog.ranking import rank as run_rank
    from engines.tokenizer import tokenizer_digest
    from engines.torch.corpus import load_vocabulary

    missing = [path for path in corpus if not path.is_file()]
    if missing:
        raise ConfigurationError(f"{missing[0]}: no such file; expected a .jsonl or .txt of texts")
    vocabulary = load_vocabulary(model)
    digest = tokenizer_digest(vocabulary.tokenizer)
    try:
        texts = _shown(corpus, quiet=json)
        ranking = run_rank(vocabulary.tokenizer, texts, vocabulary.size, size)
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    path = out or own_rankings() / f"{vocabulary.name}.safetensors"
    save_ranking(path, ranking.ids, digest)
    figures = {
        "path": str(path), "tokenizer_digest": digest, "size": len(ranking.ids),
        "counted_tokens": ranking.counted, "distinct_tokens": ranking.distinct,
        "covered": ranking.covered,
    }  # fmt: skip
    if json:
        typer.echo(json_module.dumps(figures))
    else:
        typer.echo(
            f"{path}: {len(ranking.ids)} of {vocabulary.size} tokens, counted over "
            f"{ranking.counted} ({ranking.distinct} different); the ranking covers "
            f"{ranking.covered:.2%} of them"
        )


def _shown(paths: list[Path], quiet: bool) -> Iterator[str]:
    """The files' texts, with a progress bar over their bytes."""
    from bench.progress import byte_bar
    from engines.torch.corpus import read_corpus

    bar = byte_bar()
    bar.disable = quiet
    with bar:
        for path in paths:
            task = bar.add_task(path.name, total=path.stat().st_size)
            for text, num_bytes in read_corpus(path):
                yield text
                bar.advance(task, num_bytes)
