from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.host import Host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    logger = logging.getLogger("storebackends")
    before = logger.handlers, logger.level
    yield Host(tmp_path)
    logger.handlers, logger.level = before
