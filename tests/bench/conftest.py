"""The scripts of benchmarks/, which is no package, as modules."""

from __future__ import annotations

from types import ModuleType

import pytest

from scripts import script


@pytest.fixture(scope="session")
def rivals() -> ModuleType:
    return script("rivals")


@pytest.fixture(scope="session")
def table() -> ModuleType:
    return script("table")


@pytest.fixture(scope="session")
def llama() -> ModuleType:
    return script("llama")


@pytest.fixture(scope="session")
def gpu() -> ModuleType:
    return script("gpu")
