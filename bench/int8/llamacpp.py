"""llama.cpp as a process beside ours, in a virtual environment of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from bus.protocol.errors import ConfigurationError

_CHILD = Path(__file__).with_name("llamacpp_child.py")
_EXPECTED = "expected a Python interpreter whose packages include llama-cpp-python"


class LlamaCpp:
    """`with LlamaCpp(python, gguf, core, context) as llama: llama.time_ms(tokens)`.

    One request is answered at a time; between them the process waits.

    Args:
        python: an interpreter that has llama-cpp-python.
        gguf: the model's file.
        core: it runs on, with one thread.
        context: tokens before each pass.
        script: run by the interpreter; `bench.int8.llamacpp_child` describes what it speaks.
    """

    def __init__(
        self, python: Path, gguf: Path, core: int, context: Sequence[int], script: Path = _CHILD
    ) -> None:
        self._command = [str(python), "-I", str(script)]
        self._begin = {"model": str(gguf), "core": core, "context": list(context)}
        self._python = python
        self.version = ""

    def __enter__(self) -> Self:
        """Raises ConfigurationError where it does not start."""
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                encoding="utf-8",
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise ConfigurationError(
                f"{self._python} cannot be started ({error.strerror}); {_EXPECTED}"
            ) from error
        try:
            self.version = str(self._ask(self._begin, "version"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def time_ms(self, tokens: Sequence[int]) -> float:
        """Milliseconds of one pass over `tokens` after the context.

        Raises:
            ConfigurationError: it failed; the text holds its reason.
        """
        return float(self._ask({"tokens": list(tokens)}, "ms"))

    def _ask(self, request: dict[str, Any], wanted: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            if "error" not in answer:
                return answer[wanted]
            reason = answer["error"]
        except (BrokenPipeError, ValueError, KeyError, TypeError):
            reason = self._last_line() or "it ended without an answer"
        raise ConfigurationError(f"llama.cpp in {self._python} failed: {reason}; {_EXPECTED}")

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else ""
