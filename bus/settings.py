"""Settings: one typed object per process, from flags, environment (`E2SCI_*`) and a TOML file.

Flags win over the environment, the environment over the file. The file is the one that
`E2SCI_CONFIG` names, else `./e2sci.toml` if there is one. Its top level holds what all workers
share; a table named as a class's `toml_table` holds what only that worker has:

    redis_url = "redis://10.0.0.5:6379/0"
    [edge]
    slots = 4

Nothing else in the project reads the environment. This module does not know what settings mean.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError
from redis.asyncio.connection import parse_url

from bus.protocol.errors import ConfigurationError

__all__ = ["BusSettings", "LogFormat", "LogLevel"]

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]

_DEFAULT_FILE = "e2sci.toml"
TOML_TABLES = frozenset(("cloud", "controller", "dashboard", "edge", "gateway", "middle"))
"""Every worker's `toml_table`; a table of another name is a slip of the pen."""
_Z85_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


class BusSettings(BaseSettings):
    """What every process needs to reach the others; each worker adds its own in a subclass."""

    model_config = SettingsConfigDict(
        env_prefix="E2SCI_",
        extra="forbid",  # a misspelt key in the file is an error, not silence
        hide_input_in_errors=True,  # the input may be a URL with a password
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        frozen=True,
    )
    toml_table: ClassVar[str] = ""

    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        repr=False,
        description="Where Redis (7.0 or newer) or Valkey listens: redis://, rediss:// or unix://.",
    )
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = Field(
        default="e2sci:", description="What every Redis key starts with."
    )
    curve_public_key: str | None = Field(
        default=None, description="This installation's CURVE public key, Z85, 40 characters."
    )
    curve_secret_key: str | None = Field(
        default=None,
        repr=False,
        description="The secret key that belongs to it, Z85, 40 characters.",
    )
    insecure: bool = Field(
        default=False,
        description="Allow sockets beyond loopback without keys (private networks only).",
    )
    log_level: LogLevel = Field(
        default="INFO", description="Least severe records that are written."
    )
    log_format: LogFormat = Field(
        default="text", description="Form of log records: a line of text, or of JSON."
    )
    lease_s: Annotated[float, Field(ge=0.05, le=3600)] = Field(
        default=10.0,
        description="Seconds without renewal after which another edge takes a request over.",
    )
    max_queue: Annotated[int, Field(ge=1)] = Field(
        default=10_000, description="Requests, queued and running, at which new ones are refused."
    )
    result_ttl_s: Annotated[int, Field(ge=1)] = Field(
        default=3600, description="Seconds a result is kept after its end."
    )
    max_deliveries: Annotated[int, Field(ge=1)] = Field(
        default=3, description="Deliveries after which a request that never ends is given up."
    )

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str) -> str:
        try:
            parse_url(value)
        except ValueError as error:  # its text repeats the URL, password and all
            raise ValueError(
                "expected redis://[user:password@]host:port/db, rediss://… or unix://path"
            ) from error
        return value

    @field_validator("curve_public_key", "curve_secret_key", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value  # compose passes unset variables on as ""

    @field_validator("curve_public_key", "curve_secret_key")
    @classmethod
    def _check_key(cls, value: str | None) -> str | None:
        if value is not None and not _Z85_KEY.fullmatch(value):
            raise ValueError("expected a Z85 key of 40 characters, as zmq.curve_keypair() makes it")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_key_pair(self) -> Self:
        if (self.curve_public_key is None) != (self.curve_secret_key is None):
            raise ValueError("curve_public_key and curve_secret_key: set both or neither")
        return self

    @property
    def redacted_redis_url(self) -> str:
        """The Redis URL fit for logs and errors: without user, password and query."""
        parts = urlsplit(self.redis_url)
        credentials, _, host = parts.netloc.rpartition("@")
        secret = bool(credentials) or "password=" in parts.query
        return f"{parts.scheme}://{'***@' if secret else ''}{host}{parts.path}"

    @classmethod
    def load(cls, **values: Any) -> Self:
        """Settings from `values`, environment and file.

        Raises:
            ConfigurationError: a value is wrong or the file cannot be read; the text says which.
        """
        try:
            return cls(**values)
        except (ValidationError, SettingsError) as error:
            raise ConfigurationError(_describe(error)) from None

    @classmethod
    def from_cli(cls, args: Sequence[str] | None = None) -> Self:
        """Settings from command-line flags (`sys.argv` where None), environment and file.

        Raises:
            ConfigurationError: as `load`. An unknown flag or `--help` raises SystemExit.
        """
        try:
            return CliApp.run(cls, cli_args=None if args is None else list(args))
        except (ValidationError, SettingsError) as error:
            raise ConfigurationError(_describe(error)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _TomlSource(settings_cls, cls.toml_table)


class _TomlSource(PydanticBaseSettingsSource):
    """The top level of the TOML file plus the worker's own table; other workers' are not ours."""

    def __init__(self, settings_cls: type[BaseSettings], table: str) -> None:
        super().__init__(settings_cls)
        self._table = table

    def get_field_value(
        self,
        field: FieldInfo,  # noqa: ARG002 -- pydantic's signature
        field_name: str,
    ) -> tuple[Any, str, bool]:
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        named = os.environ.get("E2SCI_CONFIG", "")
        path = Path(named or _DEFAULT_FILE)
        if not named and not path.is_file():
            return {}
        try:
            content = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"settings file {path}: {error}") from error
        for name, value in content.items():
            if isinstance(value, dict) and name not in TOML_TABLES | {self._table}:
                near = get_close_matches(name, sorted(TOML_TABLES), n=1, cutoff=0.0)[0]
                raise ConfigurationError(
                    f"settings file {path}: no worker has a table [{name}]; did you mean [{near}]? "
                    f"There are: {', '.join(sorted(TOML_TABLES))}"
                )
        shared = {key: value for key, value in content.items() if not isinstance(value, dict)}
        own = content.get(self._table, {}) if self._table else {}
        return {**shared, **own}


def _describe(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return f"settings: {error}"
    problems = [
        f"{'.'.join(map(str, item['loc'])) or 'settings'}: "
        f"{item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    return "settings: " + "; ".join(problems)
