"""Numbers that are set in several places have the same bounds in all of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from pydantic import TypeAdapter, ValidationError

from bus.protocol.bounds import SMOOTHING, THRESHOLD, WINDOW, Bounds, Smoothing, Threshold, Window


@pytest.mark.parametrize(
    ("kind", "bounds"), [(Threshold, THRESHOLD), (Window, WINDOW), (Smoothing, SMOOTHING)]
)
def test_msgspec_and_pydantic_agree(kind: Any, bounds: Bounds) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    outside = [bounds.low - 1, bounds.high + 1] + [bounds.low] * bounds.above
    inside = [bounds.high] + [bounds.low] * (not bounds.above)
    for value in inside:
        assert msgspec.convert(value, kind) == adapter.validate_python(value) == value
    for value in outside:
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(value, kind)
        with pytest.raises(ValidationError):
            adapter.validate_python(value)
