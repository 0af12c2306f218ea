"""Clients that cannot be installed beside the server: in an environment of their own, which `make soak` makes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import live
from live import Live

OWN = Path(__file__).parents[2] / ".venv" / "clients" / "bin" / "python"
PYTHON = Path(os.environ.get("CLIENTS_PYTHON", OWN))
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}: `make soak` makes it"),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    with live.demo() as running:
        yield running


@pytest.mark.parametrize("client", ["lorax", "text_generation", "litellm"])
def test_it_is_content(demo: Live, client: str) -> None:
    script = Path(__file__).with_name("outside.py")
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}
    words = [PYTHON, "-W", "ignore", script, client, demo.address]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr
    demo.settle()
