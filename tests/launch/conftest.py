from __future__ import annotations

import pytest

from tests.launch.kept import KeptLog


@pytest.fixture
def log() -> KeptLog:
    return KeptLog()
