"""A package index and a hub on loopback: real wheels, real pip, HTTP that can be held up."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Register = Callable[[str], Path]
"""Takes TOML for the user's registry; returns its path."""

HUB_REPO, HUB_FILE = "acme/tiny-gguf", "tiny.gguf"
PART_BYTES = 300_000


@dataclass
class Index:
    """What the server has and what was asked of it.

    Attributes:
        files: wheels and source packages by file name.
        hub: the content of the file on the hub, if it has it.
        held: file names whose answer waits until `release` is set.
        asked: file names that were fetched, the hub's with the byte they began at.
        reached: set once a held file has been asked for.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    hub: bytes | None = None
    etag: str | None = None
    cut_hub_at: int | None = None
    held: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def add_wheel(self, package: str, content: Mapping[str, bytes], version: str = "1.0") -> str:
        """Put a wheel with these files in it on the index; returns its file name."""
        stem = f"{package.replace('-', '_')}-{version}"
        name = f"{stem}-py3-none-any.whl"
        path = f"{stem}.dist-info"
        meta = {
            f"{path}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
            f"{path}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
            "Tag: py3-none-any\n",
            f"{path}/RECORD": "",
        }
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for inner, body in content.items():
                archive.writestr(inner, body)
            for inner, text in meta.items():
                archive.writestr(inner, text)
        self.files[name] = data.getvalue()
        return name

    def wheels_asked(self) -> list[str]:
        """Wheels fetched, in order of their names."""
        return sorted(name for name in self.asked if name.endswith(".whl"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, index: Index, *args: object) -> None:
        self.index = index
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "simple":
            self._page(rest.strip("/"))
        elif kind == "files" and rest in self.index.files:
            self._file(rest)
        elif self.path.endswith(f"{HUB_REPO}/resolve/main/{HUB_FILE}") and self.index.hub:
            self._hub(self.index.hub)
        else:
            self._send(HTTPStatus.NOT_FOUND, b"")

    def _page(self, package: str) -> None:
        prefix = package.replace("-", "_") + "-"
        links = [f'<a href="/files/{name}">{name}</a>' for name in self.index.files
                 if name.replace(package + "-", prefix).startswith(prefix)]  # fmt: skip
        self._send(HTTPStatus.OK, "\n".join(links).encode(), {"Content-Type": "text/html"})

    def _file(self, name: str) -> None:
        if self.command == "GET":
            self.index.asked.append(name)
            if name in self.index.held:
                self.index.reached.set()
                self.index.release.wait(60)
        self._send(HTTPStatus.OK, self.index.files[name])

    def _hub(self, content: bytes) -> None:
        etag = self.index.etag or hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        begin = 0
        status = HTTPStatus.OK
        if asked := self.headers.get("Range"):
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.index.asked.append(f"{HUB_FILE} from {begin}")
        self._send(status, content[begin:], headers, self.index.cut_hub_at)

    def _send(
        self,
        status: HTTPStatus,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        cut_at: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut_at is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[:cut_at])
        self.wfile.flush()
        self.index.reached.set()
        self.index.release.wait(60)
        self.close_connection = True


@contextmanager
def serve() -> Iterator[Index]:
    """An empty index, served until the end."""
    index = Index()
    server = _Server(("127.0.0.1", 0), partial(_Handler, index))
    index.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        index.release.set()
        server.shutdown()
        server.server_close()


def content_of(num_parts: int) -> list[bytes]:
    """Different bytes for each part; the last one is shorter."""
    sizes = [PART_BYTES] * (num_parts - 1) + [PART_BYTES // 3]
    return [hashlib.shake_256(bytes([i])).digest(size) for i, size in enumerate(sizes)]


def entry(name: str, parts: list[bytes], *, hub: bool = False, sha256: str | None = None) -> str:
    """TOML of a model whose parts are those bytes."""
    whole = b"".join(parts)
    lines = [
        f'[models."{name}"]',
        f'file = "{HUB_FILE if hub else name + ".gguf"}"',
        f"size_bytes = {len(whole)}",
        f'sha256 = "{sha256 or hashlib.sha256(whole).hexdigest()}"',
        'licence = "Apache-2.0"',
        "context_length = 256",
    ]
    if hub:
        lines.append(f'hub = {{ repo = "{HUB_REPO}", file = "{HUB_FILE}" }}')
    lines += [
        f'[[models."{name}".pypi]]\npackage = "{name}-part{i}"\nversion = "1.0"\n'
        f'path = "{part_path(name, i)}"\nsize_bytes = {len(part)}\n'
        f'sha256 = "{hashlib.sha256(part).hexdigest()}"'
        for i, part in enumerate(parts)
    ]
    return "\n".join(lines) + "\n"


def part_path(name: str, i: int) -> str:
    """Of a part in its wheel."""
    return f"{name}_part{i}/data/part.bin"


def publish(index: Index, name: str, parts: list[bytes]) -> list[str]:
    """Wheels of a model on the index; their file names in the order of the parts."""
    return [
        index.add_wheel(f"{name}-part{i}", {part_path(name, i): part})
        for i, part in enumerate(parts)
    ]
