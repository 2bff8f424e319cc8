"""The command `e2sci`: the process supervisor, the embedded Valkey server, submitting prompts."""

from __future__ import annotations

__version__ = "0.1.0"
