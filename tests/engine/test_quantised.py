"""A base in fewer bits: adapters run beside it as PEFT runs them, and merged equals unmerged where 4 bit is exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.engine.model import load
from adapter_server.registry.store import Store

pytest.importorskip("bitsandbytes")
NAMES = ("lora", "dora", "ia3", "lora_saved", "prefix", "prompt")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk; wide enough for a block of 64 weights to be a row."""
    made = tmp_path_factory.mktemp("base")
    zoo.tiny_base("llama").save_pretrained(made)
    return made


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
        yield


def base(folder: Path, kind: str) -> transformers.PreTrainedModel:
    model = load(folder, "float32", CPU, kind)
    model.generation_config.eos_token_id = None
    return model


def alone(folder: Path, kind: str, name: str | None, prompt: tuple[int, ...]) -> list[int]:
    model = base(folder, kind)
    model = model if name is None else zoo.load_peft(model, rig.saved("llama", name))
    with torch.inference_mode(), zoo.quiet():
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        out = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=mask, max_new_tokens=rig.NEW, do_sample=False
        )
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_tokens_are_pefts_over_the_same_bits(folder: Path, kind: str) -> None:
    engine = Engine(base(folder, kind), EngineConfig(kv_bytes=16 << 20), Store(rig.registry("llama"), settle_s=0))
    digest = engine.model.digest()
    names = [n for n in NAMES if (kind, n) != ("int8", "dora")]  # which PEFT itself cannot run on a CPU
    cases = [(name, rig.PROMPTS[i % 5]) for i, name in enumerate([None, *names])]
    requests = [rig.ask(engine, name, prompt) for name, prompt in cases]
    # int8 looks for outliers in all rows at once: there a row is held to itself alone
    answers = [rig.run(engine, [r])[0] for r in requests] if kind == "int8" else rig.run(engine, requests)
    for (name, prompt), answer in zip(cases, answers, strict=True):
        assert answer.end is not None
        assert answer.end.error is None, (name, answer.end.error.__cause__)
        assert answer.ids == alone(folder, kind, name, prompt), (kind, name)
    assert engine.model.digest() == digest
    engine.close()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_a_snapshot_of_four_bits_is_the_unmerged_adapter(folder: Path, kind: str, name: str) -> None:
    engine = Engine(base(folder, kind), EngineConfig(kv_bytes=16 << 20), Store(rig.registry("llama"), settle_s=0))
    merged, unmerged = rig.run(engine, [rig.ask(engine, name, rig.PROMPTS[1], mode=m) for m in ("merged", "unmerged")])
    assert merged.ids == unmerged.ids
    assert (merged.matrix() - unmerged.matrix()).abs().max() < 1e-4
    engine.close()
