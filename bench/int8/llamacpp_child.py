"""Times passes in llama.cpp, in another interpreter that has llama-cpp-python.

Imports nothing of this project. Speaks JSON, a line each way:

    → {"model": PATH, "core": N, "context": [token, …]}    ← {"version": "…", "vocab_size": V}
    → {"tokens": [token, …]}                               ← {"ms": 1.5}

A pass runs the tokens after the context, with logits of each, and is then removed. What fails is
answered {"error": "…"}. Between requests nothing runs; the end of the input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_CONTEXT_SIZE = 512


def main() -> None:
    """Answer until the input ends."""
    # Whatever the library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    passes: _Passes | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if passes is None:
                passes = _Passes(request)
                answer: dict[str, Any] = {
                    "version": passes.version,
                    "vocab_size": passes.vocab_size,
                }
            else:
                answer = {"ms": passes.time_ms(request["tokens"])}
        except Exception as error:  # noqa: BLE001 - reported to the other process, which knows what to do
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Passes:
    def __init__(self, request: dict[str, Any]) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {request["core"]})
        import llama_cpp  # noqa: PLC0415 - only after the process is on its core

        self._model = llama_cpp.Llama(
            request["model"],
            n_ctx=_CONTEXT_SIZE,
            n_batch=_CONTEXT_SIZE,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            verbose=False,
        )
        self.version = llama_cpp.__version__
        self.vocab_size = self._model.n_vocab()
        self._model.eval(request["context"])
        self._length = self._model.n_tokens

    def time_ms(self, tokens: list[int]) -> float:
        self._model.n_tokens = self._length  # `eval` removes every position from here on
        began = time.perf_counter()
        self._model.eval(tokens)
        return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
