"""The scripts of benchmarks/, which is no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
