"""Python, packages, processor and memory of this machine."""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from bench.doctor.checks import Check, failed, ok, warning
from engines.catalog.places import cache_root
from launch.python import ROOT

LEAST_PYTHON = (3, 11)
_EXACT = "torch"
"""Other versions of it compute other bits, and other packages replace it easily."""
_PIN = re.compile(
    r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^;\s]+)(?:\s*;.*extra == ['\"]([^'\"]+)['\"])?"
)
_GROUPS = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 2**60
"""cgroup v1 writes a number above this where there is no limit."""
_LEAST_FREE_BYTES = 2e9
_BUSY = 0.5
"""Share of the cores that others keep busy, from which on measured times are too long."""


def check_python(version: Sequence[int] = sys.version_info[:3]) -> Check:
    """Whether this Python can run the project."""
    name = ".".join(map(str, version))
    if tuple(version[:2]) < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return failed(
            "python", f"Python {name} is too old; {least} or newer is needed.",
            f"Install Python {least} and make the virtual environment again with it.",
            version=name,
        )  # fmt: skip
    return ok("python", f"Python {name} at {sys.executable}.", version=name)


# --- packages ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pins:
    """Versions that the project was tested with: of what it needs, and of each extra's packages."""

    needed: Mapping[str, str]
    extras: Mapping[str, Mapping[str, str]]


def read_pins(project: Path = ROOT / "pyproject.toml") -> Pins | None:
    """From `pyproject.toml`, else from the installed package; None where there is neither."""
    if project.is_file():
        content = tomllib.loads(project.read_text("utf-8"))["project"]
        extras = content.get("optional-dependencies", {})
        return Pins(
            _pinned(content["dependencies"]),
            {extra: _pinned(lines) for extra, lines in extras.items()},
        )
    try:
        lines = metadata.requires("e2sci") or []
    except metadata.PackageNotFoundError:
        return None
    names = {found[3] for line in lines if (found := _PIN.match(line)) and found[3]}
    return Pins(
        _pinned(line for line in lines if "extra ==" not in line),
        {name: _pinned(line for line in lines if f"'{name}'" in line.replace('"', "'"))
         for name in sorted(names)},
    )  # fmt: skip


def _pinned(lines: Iterator[str] | Sequence[str]) -> dict[str, str]:
    return {found[1]: found[2] for line in lines if (found := _PIN.match(line))}


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_packages(pins: Pins | None) -> list[Check]:
    """Installed versions against the pins."""
    if pins is None:
        return [warning("packages", "The pinned versions cannot be read: this is no checkout and "
                        "the package e2sci is not installed.",
                        "Install the project: pip install -e .")]  # fmt: skip
    missing, others = list[str](), list[str]()
    for package, pinned in pins.needed.items():
        found = installed_version(package)
        if found is None:
            missing.append(f"{package}=={pinned}")
        elif found.partition("+")[0] != pinned:
            others.append(f"{package} is {found} instead of {pinned}")
    checks = []
    if missing:
        checks.append(failed("packages", f"Not installed: {', '.join(missing)}.",
                             "Install them: pip install -e ."))  # fmt: skip
    checks += [_other_version(text) for text in others]
    absent = _absent_extras(pins)
    rest = f" Extras not installed: {', '.join(absent)}." if absent else ""
    if not checks:
        checks.append(ok("packages", f"All {len(pins.needed)} packages have the pinned versions, "
                         f"torch {pins.needed.get(_EXACT, '')} among them.{rest}",
                         packages=len(pins.needed)))  # fmt: skip
    elif rest:
        checks.append(ok("packages", rest.strip()))
    return checks


def _other_version(text: str) -> Check:
    if text.startswith(f"{_EXACT} "):
        return failed("packages", f"{text}.", "Answers may differ in their last bits from other "
                      "machines; reinstall: pip install -e .")  # fmt: skip
    return warning("packages", f"{text}.", "This version is not tested; pip install -e . installs "
                   "the pinned one.")  # fmt: skip


def _absent_extras(pins: Pins) -> list[str]:
    return [
        extra for extra, packages in pins.extras.items()
        if any(installed_version(package) is None for package in packages)
    ]  # fmt: skip


# --- processor --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Processor:
    """Name, architecture, and the instruction sets that Linux names."""

    name: str
    architecture: str
    flags: frozenset[str]


def read_processor(info: Path = Path("/proc/cpuinfo")) -> Processor:
    """Of the first core; without `/proc` there are no flags."""
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    fields: dict[str, str] = {}
    for line in lines:
        key, mark, value = line.partition(":")
        if mark:
            fields.setdefault(key.strip(), value.strip())
    return Processor(
        fields.get("model name", platform.processor() or "unknown processor"),
        platform.machine(),
        frozenset(fields.get("flags", fields.get("Features", "")).split()),
    )


def check_processor(processor: Processor) -> Check:
    """Which instructions the int8 passes find. They are compiled for the machine's own, give the
    same bits with any of them, and use vectors of eight lanes (`engines.torch.kernels`)."""
    name, flags = processor.name, processor.flags
    if processor.architecture not in ("x86_64", "AMD64"):
        return warning(
            "processor", f"{name} is no x86-64 processor; int8 has been tested on those alone.",
            "Compare probe digests in `e2sci status`, or use --dtype float32.",
            architecture=processor.architecture,
        )  # fmt: skip
    sets = [label for flag, label in (("avx2", "AVX2"), ("avx512f", "AVX-512"),
            ("avx512_vnni", "AVX-512 VNNI"), ("avx_vnni", "AVX-VNNI"),
            ("amx_int8", "AMX int8")) if flag in flags]  # fmt: skip
    figures = {"avx2": "avx2" in flags, "avx512": "avx512f" in flags,
               "vnni": bool(flags & {"avx512_vnni", "avx_vnni"})}  # fmt: skip
    if "avx2" not in flags:
        return warning("processor", f"{name} has no AVX2: int8 passes run on vectors of half the "
                       "size, and slowly.", "Expect a lower speed; nothing else changes.",
                       **figures)  # fmt: skip
    return ok(
        "processor", f"{name} has {', '.join(sets)}; int8 passes are compiled for it.", **figures
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control group allows: cores (may be a fraction) and bytes; None is no limit."""

    cores: float | None = None
    memory_bytes: int | None = None


def read_limits(groups: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> Limits:
    """The tightest limit of this process's control group and those around it, v2 or v1."""
    cores, sizes = list[float](), list[int]()
    for folder in _folders(groups, own):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")
        ]  # fmt: skip
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
            cores.append(int(words[0]) / int(words[1]))
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if words and words[0].isdecimal() and int(words[0]) < _UNLIMITED_BYTES:
            sizes.append(int(words[0]))
    return Limits(min(cores, default=None), min(sizes, default=None))


def _folders(groups: Path, own: Path) -> list[Path]:
    """Of the group and all around it; those of v1 lie below their controllers' names."""
    found = [groups, groups / "cpu", groups / "memory"]
    for line in own.read_text("utf-8").splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        inner = groups if not controllers else groups / controllers.split(",")[0]
        for part in Path(path.lstrip("/")).parts:
            inner /= part
            found.append(inner)
    return [folder for folder in found if folder.is_dir()]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split()
    except OSError:
        return []


def check_cores(limits: Limits, load: float | None, cores: int | None = None) -> list[Check]:
    """Cores that this process may use, and whether others are using them.

    Args:
        load: runnable processes, the mean of the last minute; None where our own workers are
            among them.
        cores: None asks the system.
    """
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    figures = {
        "cores": cores,
        "load": None if load is None else round(load, 2),
        "quota_cores": limits.cores,
    }
    checks = []
    if limits.cores is not None and limits.cores < cores:
        checks.append(warning(
            "cores", f"The container may use {limits.cores:g} of {cores} cores at a time, so "
            "threads wait for one another.",
            f"Start workers with --threads {max(1, int(limits.cores / 2))}, or raise the "
            "container's CPU limit.", **figures,
        ))  # fmt: skip
    if load is not None and load > _BUSY * cores:
        checks.append(warning(
            "load", f"Other programs keep {load:.1f} of {cores} cores busy; measured times are "
            "longer than on an idle machine.", "Run the doctor again when the machine is idle.",
            **figures,
        ))  # fmt: skip
    if cores < 2:
        checks.append(warning(
            "cores", "There is one core, which edge and cloud worker would share: neither can "
            "run while the other does.", "Run the edge worker on another machine.", **figures,
        ))  # fmt: skip
    seen = "." if load is None else f", load {load:.1f}."
    return checks or [ok("cores", f"{cores} cores{seen}", **figures)]


def check_memory(limits: Limits, model_bytes: int, available: int | None = None) -> Check:
    """Whether the models fit.

    Args:
        model_bytes: of their files; 0 where they are not known.
        available: bytes; None asks the system.
    """
    available = psutil.virtual_memory().available if available is None else available
    if limits.memory_bytes is not None:
        available = min(available, limits.memory_bytes)
    figures = {"available_bytes": available, "model_bytes": model_bytes}
    sentence = f"{available / 1e9:.1f} GB of memory are free"
    if available < max(2 * model_bytes, _LEAST_FREE_BYTES):
        return warning(
            "memory", f"{sentence}; the files of the models have {model_bytes / 1e9:.1f} GB, and "
            "int8 takes up to twice a 4-bit file, besides torch in each worker.",
            "Free memory, raise the container's limit or choose a smaller pair.", **figures,
        )  # fmt: skip
    return ok("memory", f"{sentence}; the models' files have {model_bytes / 1e9:.1f} GB.",
              **figures)  # fmt: skip


def check_cache(folder: Path | None = None) -> Check:
    """Whether converted models can be kept."""
    folder = folder or cache_root()
    place = folder
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        return failed("cache", f"{folder} cannot be written: models cannot be converted.",
                      "Set XDG_CACHE_HOME to a directory that can.")  # fmt: skip
    free = psutil.disk_usage(str(place)).free
    if free < _LEAST_FREE_BYTES:
        return warning("cache", f"{free / 1e9:.1f} GB are free for converted models in {folder}.",
                       "Free some space, or set XDG_CACHE_HOME.", free_bytes=free)  # fmt: skip
    return ok("cache", f"Converted models are kept in {folder}; {free / 1e9:.0f} GB are free.",
              free_bytes=free)  # fmt: skip
