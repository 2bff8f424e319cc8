"""Where this project keeps a user's files. Needs neither torch nor a configuration."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Where fetched and converted models are kept: `$XDG_CACHE_HOME/e2sci`, else
    `~/.cache/e2sci`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "e2sci"


def files_dir() -> Path:
    """Where `e2sci pull` puts the files of registered models."""
    return cache_root() / "files"


def user_registry() -> Path:
    """The user's own named models and pairs: `$XDG_CONFIG_HOME/e2sci/models.toml`, else
    `~/.config/e2sci/models.toml`. It need not exist."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "e2sci" / "models.toml"
