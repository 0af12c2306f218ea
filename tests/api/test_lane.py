"""The peft lane over HTTP: beside packed rows, and under an encoder-decoder."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import httpx
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import files
import tiny
import zoo
from adapter_server.api.server import Server
from adapter_server.config import EngineConfig, ServerConfig
from adapter_server.engine.engine import build
from adapter_server.engine.worker import Worker
from adapter_server.registry.store import Store
from adapter_server.text import Text
from fakes import EOS, save_byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns while it loads, on a thread of ours
ASKED = {"prompt": "red cat>", "max_new_tokens": 8, "return_token_ids": True, "ignore_eos": True}


@contextmanager
def serving(base: Path, adapters: Path) -> Iterator[httpx.Client]:
    store = Store(adapters, settle_s=0.1)
    engine = build(base, EngineConfig(max_rows=16, kv_bytes=64 << 20), store)
    ready: SimpleQueue[str] = SimpleQueue()
    config = replace(ServerConfig(), port=0)
    server = Server(lambda deliver: Worker(engine, deliver), store, Text(base), engine.info, config, ready.put)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with httpx.Client(base_url=ready.get(timeout=20), timeout=30) as client:
        yield client
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("packed")
    base = tiny.save_base(root / "tiny")
    files.age(tiny.save_lora(root / "adapters" / "lora", 1))
    config = peft.LilyConfig(r=4, num_B=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    zoo.save_adapter(lambda: AutoModelForCausalLM.from_pretrained(base), config, root / "adapters" / "lily")
    files.age(root / "adapters" / "lily")
    with serving(base, root / "adapters") as client:
        yield client


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("t5")
    base = save_t5(root / "tiny")
    config = peft.LoraConfig(r=4, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    zoo.save_adapter(lambda: T5ForConditionalGeneration.from_pretrained(base), config, root / "adapters" / "lora")
    files.age(root / "adapters" / "lora")
    with serving(base, root / "adapters") as client:
        yield client


def save_t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=257, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=EOS,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return save_byte_tokenizer(folder)


def ask(http: httpx.Client, adapter: str | None, **fields: object) -> dict[str, object]:
    response = http.post("/generate", json={**ASKED, "adapter": adapter, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, object] = response.json()
    return answer


def test_both_lanes_at_once_and_each_says_which_it_is(http: httpx.Client) -> None:
    names = ["lily", "lora", None] * 3
    single = {name: ask(http, name)["token_ids"] for name in ("lily", "lora", None)}
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda name: ask(http, name)["token_ids"], names))
    assert together == [single[name] for name in names]
    assert len(set(map(str, single.values()))) == 3
    lanes = {name: http.get(f"/adapters/{name}").json()["lane"] for name in ("lily", "lora")}
    assert lanes == {"lily": "peft", "lora": "packed"}
    info = http.get("/info").json()
    assert (info["lane"], "AttentionInterface" in info["lane_why"]) == ("packed", True)


def test_a_stream_of_the_lane_has_the_same_tokens(http: httpx.Client) -> None:
    whole = ask(http, "lily")
    with http.stream("POST", "/generate", json={**ASKED, "adapter": "lily", "stream": True}) as response:
        data = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(event.get("text", "") for event in data[:-1]) == whole["text"]


def test_what_the_lane_cannot_do_is_a_422(http: httpx.Client) -> None:
    merged = http.post("/generate", json={**ASKED, "adapter": "lily", "mode": "merged"})
    assert (merged.status_code, merged.json()["error"]["code"]) == (422, "not_mergeable")
    both = [{"name": "lily"}, {"name": "lora"}]
    composed = http.post("/generate", json={**ASKED, "adapter": both})
    assert (composed.status_code, composed.json()["error"]["param"]) == (422, "adapter")


def test_load_and_unload_take_and_give_the_memory(http: httpx.Client) -> None:
    assert http.post("/adapters/lily/load").status_code == 200
    assert http.get("/adapters/lily").json()["device_bytes"] > 0
    assert http.post("/adapters/lily/unload").status_code == 200
    assert http.get("/adapters/lily").json()["device_bytes"] == 0


def test_an_encoder_decoder_answers_as_transformers_does(t5: httpx.Client, tmp_path: Path) -> None:
    info = t5.get("/info").json()
    assert (info["lane"], info["lane_why"]) == ("peft", "it is an encoder-decoder")
    model = T5ForConditionalGeneration.from_pretrained(save_t5(tmp_path)).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([Text(tmp_path).encode("red cat>")])
    with torch.inference_mode():
        out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert ask(t5, None)["token_ids"] == out[0, 1:].tolist()
    assert ask(t5, "lora")["token_ids"] != out[0, 1:].tolist()
    assert ask(t5, "lora", mode="merged")["token_ids"] == ask(t5, "lora")["token_ids"]
