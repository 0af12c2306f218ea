"""Adapters on disk, a tokenizer, and servers over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import files
from adapter_server.config import ServerConfig
from adapter_server.text import Text
from fakes import save_byte_tokenizer
from serving import Served, serving

LORA = files.CONFIG
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8}
TASKED = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 8, "num_tasks": 3}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(save_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(
        {"shout": LORA, "pirate": LORA, "prefix": PREFIX, "prefix2": PREFIX, "tasks": TASKED}.items()
    ):
        files.age(files.write(root / name, seed, config))
    files.age(files.write(root / "broken", 9, weights=b"no safetensors"))
    return root


@pytest.fixture(scope="module")
def shared(text: Text, adapters: Path) -> Iterator[Served]:
    with serving(text, adapters, ServerConfig(max_body_bytes=20_000)) as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """The module's server, its worker as new afterwards."""
    yield shared
    worker = shared.worker
    worker.step_s, worker.limit, worker.refuse, worker.residents = 0.0, 64, None, ()
    worker.script = lambda request: None
    worker.requests.clear()
    worker.calls.clear()


@pytest.fixture
def own(text: Text, adapters: Path) -> Iterator[Served]:
    """A server for tests that end it."""
    with serving(text, adapters, ServerConfig(drain_timeout_s=1.0)) as served:
        yield served
