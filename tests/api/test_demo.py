"""The demo as a user meets it: every adapter's own task through POST /generate, 16 clients, all adapters mixed."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from adapter_server.api.server import Server
from adapter_server.config import DEMO_BASE, EngineConfig, ServerConfig
from adapter_server.engine.engine import build
from adapter_server.engine.worker import Worker
from adapter_server.registry.store import Store
from adapter_server.text import Text

ADAPTERS = Path(__file__).parents[2] / "adapters"
LORAS = {"LORA"}
CLIENTS = 16
Question = tuple[str | None, str, str]  # adapter, prompt, right answer


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    store = Store(ADAPTERS, settle_s=0)
    engine = build(DEMO_BASE, EngineConfig(), store, "adapter-server-demo")
    ready: SimpleQueue[str] = SimpleQueue()
    server = Server(
        lambda deliver: Worker(engine, deliver), store, Text(DEMO_BASE), engine.info, ServerConfig(port=0), ready.put
    )
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    yield ready.get(timeout=30)
    server.should_exit = True
    thread.join(30)


def questions(each: int) -> list[Question]:
    """So many unseen prompts for the base and for each adapter, shuffled."""
    files = {None: DEMO_BASE / "eval.jsonl"} | {f.parent.name: f for f in ADAPTERS.glob("*/eval.jsonl")}
    asked = [
        (name, line["prompt"], line["expected"])
        for name, file in files.items()
        for line in map(json.loads, file.read_text().splitlines()[:each])
    ]
    random.Random(0).shuffle(asked)
    return asked


def family(name: str | None) -> str:
    return "base" if name is None else json.loads((ADAPTERS / name / "adapter_config.json").read_text())["peft_type"]


def peft_says(name: str | None, prompt: str) -> str:
    """The same adapter alone under PEFT, batch 1."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    model = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)
    model = model if name is None else zoo.load_peft(model, ADAPTERS / name)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode(), zoo.quiet():
        out = model.generate(**ids, max_new_tokens=64, do_sample=False)
    start = 0 if out.shape[1] < ids.input_ids.shape[1] else ids.input_ids.shape[1]
    return str(tokenizer.decode(out[0, start:], skip_special_tokens=True))


@pytest.mark.parametrize("each", [40, pytest.param(100, marks=pytest.mark.soak)])
def test_every_adapter_reaches_its_accuracy_mixed_with_all_others(address: str, each: int) -> None:
    asked = questions(each)
    with httpx.Client(base_url=address, timeout=60) as http, ThreadPoolExecutor(CLIENTS) as clients:

        def ask(question: Question) -> str:
            name, prompt, _ = question
            answer = http.post("/generate", json={"prompt": prompt, "adapter": name, "max_new_tokens": 64})
            return str(answer.raise_for_status().json()["text"])

        answers = list(clients.map(ask, asked))
    wrong = [(q, a) for q, a in zip(asked, answers, strict=True) if a != q[2]]
    missed = Counter(name for (name, _, _), _ in wrong)
    for name in {name for name, _, _ in asked}:
        bar = 95 if family(name) in {"base", *LORAS} else 90
        assert 100 * (each - missed[name]) >= bar * each, f"{name}: {missed[name]} of {each} wrong"
    for (name, prompt, _), answer in wrong:
        assert answer == peft_says(name, prompt), (name, prompt)
