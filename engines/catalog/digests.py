"""SHA-256 of large files, remembered as long as a file's size and time of change stay."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from engines.catalog.places import cache_root


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    stat = path.stat()
    place = str(path.resolve())
    seen = {"path": place, "size_bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    record = cache_root() / "digests" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(record.read_text("utf-8"))
        if {key: known[key] for key in seen} == seen:
            return str(known["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # the record only saves time
        record.parent.mkdir(parents=True, exist_ok=True)
        scratch = record.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(seen | {"sha256": digest}), "utf-8")
        scratch.replace(record)
    return digest
