"""Settings of the gateway: where it listens, who may use it, and how much."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from bus.protocol.errors import InsecureBindError
from bus.settings import BusSettings

__all__ = ["GatewaySettings"]


class GatewaySettings(BusSettings):
    """What the gateway needs beyond `BusSettings` (table `[gateway]` of the TOML file)."""

    toml_table: ClassVar[str] = "gateway"

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="Port to listen on; 0 takes a free one."
    )
    api_keys_file: Path | None = Field(
        None, description="File of `e2sci keys add`; unset: no key is asked for, loopback only."
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        2 * 2**20, description="Longest request body."
    )
    requests_per_minute: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Generations a minute of one key, or of one address without keys; 0: no limit.",
    )
    max_streams: Annotated[int, Field(ge=1, le=4000)] = Field(
        1000, description="Choices generated at once; a new request beyond them gets 429."
    )
    default_max_tokens: Annotated[int, Field(ge=1)] = Field(
        1024,
        description="Longest chat answer where the request names none; at most half the context.",
    )
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Seconds after which a request is cancelled and answered with 504."
    )
    client_timeout_s: Annotated[float, Field(ge=1)] = Field(
        60.0,
        description="Seconds within which a request must have come whole (408), and after which a "
        "client is gone that takes nothing of its answer.",
    )
    drain_s: Annotated[float, Field(ge=0)] = Field(
        5.0, description="Seconds that open answers may take to finish when the gateway leaves."
    )
    cors_origins: tuple[str, ...] = Field(
        (), description='Web origins whose pages may call the API, or "*"; none by default.'
    )

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _empty_is_no_file(cls, value: Any) -> Any:
        return None if value == "" else value  # compose passes unset variables on as ""

    def check_binding(self) -> None:
        """Refuse to listen beyond loopback without keys, unless `insecure` allows it.

        Raises:
            InsecureBindError: anyone who reaches this address could use the models.
        """
        if self.api_keys_file is not None or self.insecure or _is_loopback(self.host):
            return
        raise InsecureBindError(
            f"the gateway would listen on {self.host} and ask for no key; set api_keys_file "
            "(E2SCI_API_KEYS_FILE, made by `e2sci keys add NAME`), listen on 127.0.0.1, or set "
            "E2SCI_INSECURE=1 on a private network"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
