"""How functions of this package are compiled, and where their machine code is kept.

numba drops cached code when the file of a function changes, but not when a file does whose
functions it calls; hence a directory for each state of the package's sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import config, njit

from engines.catalog.places import cache_root

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """Compile a function at its first call in any process; later ones load it."""
    before = config.CACHE_DIR  # numba's own setting, NUMBA_CACHE_DIR
    try:
        config.CACHE_DIR = str((Path(before) if before else cache_root() / "kernels") / _digest())
        result: Any = njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        config.CACHE_DIR = before
    return cast("_Function", result)


@cache
def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
