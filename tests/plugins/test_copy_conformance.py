"""The conformance kit, run on `copy` in each of its modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import pytest

from storebackends.testing import BackendConformance

LoopFs = Callable[..., AbstractContextManager[Path]]


class TestAuto(BackendConformance):
    name = "copy"


class TestNever(BackendConformance):
    name = "copy"
    options: ClassVar = {"reflink": "never"}


class TestAlways(BackendConformance):
    name = "copy"
    options: ClassVar = {"reflink": "always"}

    @pytest.fixture
    def area(self, loop_fs: LoopFs) -> Iterator[Path]:
        with loop_fs("xfs") as folder:
            yield folder
