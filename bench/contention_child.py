"""One model that is timed, or runs without a break: `python -m bench.contention_child`.

Requests are [order, tokens]: `time` answers with the milliseconds of a pass over so many tokens (of
a draft step, for the draft), `run` answers at once and runs until the next request.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import torch
import zmq

from bench.child import listen
from bench.passes import CONTEXT, DraftStep, TargetPass
from engines.torch.drafter import ModelDrafter
from engines.torch.target import TargetModel

MODULE = "bench.contention_child"
TARGET, DRAFT = "target", "draft"
PASS_SIZES = (1, 2, 4, 8, 16)


class Order(StrEnum):
    """What a child is asked for."""

    TIME = "time"
    RUN = "run"
    STOP = "stop"


def main() -> None:
    parser = argparse.ArgumentParser(description="A model to time beside another.")
    parser.add_argument("--role", choices=(TARGET, DRAFT), required=True)
    parser.add_argument("--model", required=True, help="as for `e2sci up`")
    parser.add_argument("--dtype", default="auto", help="as for `e2sci up`")
    parser.add_argument("--threads", type=int, default=1, help="as for `e2sci up`")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timed = _passes(options) if options.role == TARGET else _steps(options)
    serve(listen(), timed)


def serve(socket: Any, timed: Callable[[int], float]) -> None:
    """Answer requests for ever.

    Args:
        timed: runs a pass over so many tokens; its milliseconds.
    """
    running = False
    sizes = itertools.cycle(PASS_SIZES)
    while True:
        while running and not socket.poll(0, zmq.POLLIN):
            timed(next(sizes))
        asker, word = socket.recv_multipart()
        order, size = msgspec.msgpack.decode(word, type=tuple[Order, int])
        running = order is Order.RUN
        answer = timed(size) if order is Order.TIME else 0.0
        socket.send_multipart([asker, msgspec.msgpack.encode(answer)])


def _passes(options: argparse.Namespace) -> Callable[[int], float]:
    target = TargetModel.load(options.model, options.dtype)
    rng = np.random.default_rng(0)
    context = rng.integers(0, target.vocab_size, CONTEXT).tolist()
    passes = {
        size: TargetPass(target, context, rng.integers(0, target.vocab_size, size).tolist())
        for size in PASS_SIZES
    }
    return lambda size: passes[size].run()


def _steps(options: argparse.Namespace) -> Callable[[int], float]:
    draft = ModelDrafter.load(options.model, options.dtype)
    context = np.random.default_rng(0).integers(0, draft.vocab_size, CONTEXT).tolist()
    step = DraftStep(draft, context)
    return lambda _: step.run()


if __name__ == "__main__":
    main()
