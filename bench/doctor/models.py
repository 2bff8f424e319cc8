"""The files of the pair: there, readable, of the registered size and digest."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from bench.doctor.checks import Check, failed, ok, warning
from bus.protocol.errors import ConfigurationError, ModelError
from engines.catalog.digests import file_digest
from engines.catalog.registry import DEFAULT, Specs, load_registry, split_head
from engines.catalog.sources import find_source, split_speculator

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_SHIPPED = resources.files("engines") / "torch" / "shipped"


def check_models(specs: Specs, whole: bool) -> tuple[list[Check], int]:
    """Target and draft, and how many bytes their files have.

    Args:
        whole: also compare the digest of a registered model's file.
    """
    checks, total = list[Check](), 0
    for role, spec in zip(("target", "draft"), specs, strict=True):
        check, size = _check_model(role, spec, whole)
        checks.append(check)
        total += size
    return checks, total


def _check_model(role: str, spec: str, whole: bool) -> tuple[Check, int]:
    try:
        files = _files(role, spec)
        if files is None:
            return _on_the_hub(role, spec), 0
        for file in files:
            with file.open("rb") as opened:
                opened.read(1)
        size = sum(file.stat().st_size for file in files)
        if not files or not size:
            return failed(role, f"The {role} {spec!r} has no weights.",
                          "Fetch or save the model again."), 0  # fmt: skip
        if whole and (wrong := _wrong_digest(role, spec)):
            return wrong, size
    except (ConfigurationError, ModelError) as error:
        return failed(role, f"The {role} {spec!r} cannot be used: {error}.",
                      "Fetch it with `e2sci pull`, or choose another pair."), 0  # fmt: skip
    except OSError as error:
        return failed(role, f"The {role} {spec!r} cannot be read: {error}.",
                      "Make its files readable for this user."), 0  # fmt: skip
    digest = ", as registered" if whole and split_head(spec)[0] in load_registry().models else ""
    return ok(role, f"The {role} {spec} is here, {size / 1e6:,.0f} MB{digest}.",
              spec=spec, file_bytes=size), size  # fmt: skip


def _files(role: str, spec: str) -> list[Path] | None:
    """The files with a model's weights; None where it is on the hub."""
    if role == "draft" and spec == DEFAULT:
        return sorted(Path(str(_SHIPPED)).glob("*.safetensors"))
    if (speculator := split_speculator(spec)) is not None:
        return sorted(speculator[0].glob("*.safetensors"))
    source = find_source(split_head(spec)[0])
    if not source.is_local:
        return None
    if source.gguf is not None:
        return [source.gguf]
    return [file for kind in _WEIGHTS for file in sorted(Path(source.location).glob(kind))]


def _on_the_hub(role: str, spec: str) -> Check:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - few need it

    name = split_head(spec)[0]
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return ok(role, f"The {role} {spec} is in the Hugging Face cache.", spec=spec)
    return warning(role, f"The {role} {spec} is not in the Hugging Face cache; the first start "
                   "downloads it.", "Let it, or name a local directory.", spec=spec)  # fmt: skip


def _wrong_digest(role: str, spec: str) -> Check | None:
    name = split_head(spec)[0]
    model = load_registry().models.get(name)
    if model is None or file_digest(model.path) == model.sha256:
        return None
    return failed(role, f"{model.path} differs from the registered {name!r}: another SHA-256.",
                  f"Delete the file and fetch it again: e2sci pull {name}")  # fmt: skip
