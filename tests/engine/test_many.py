"""A step with 64 adapters is 64 steps with one."""

from __future__ import annotations

from pathlib import Path

import pytest

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.registry.store import Store

MANY, NEW = 64, 4


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for i in range(MANY):
        zoo.save_adapter(
            lambda: zoo.tiny_base("llama"), zoo.ADAPTERS["lora"](zoo.tiny_base("llama")), root / f"a{i}", i
        )
    return root


def engine(adapters: Path, layout: str, rows: int) -> Engine:
    config = EngineConfig(kv_bytes=16 << 20, max_rows=rows, kv_layout=layout)  # type: ignore[arg-type]
    return Engine(zoo.tiny_base("llama"), config, Store(adapters, settle_s=0))


@pytest.mark.parametrize("layout", ["slots", "pages"])
def test_together_is_alone(adapters: Path, layout: str) -> None:
    together, alone = engine(adapters, layout, MANY), engine(adapters, layout, 1)
    prompt = rig.PROMPTS[1]

    def asked(served: Engine) -> list[rig.Answer]:
        return rig.run(served, [rig.ask(served, f"a{i}", prompt, max_new_tokens=NEW) for i in range(MANY)])

    answers = list(zip(asked(together), asked(alone), strict=True))
    for ours, theirs in answers:
        assert ours.ids == theirs.ids
        assert (ours.matrix() - theirs.matrix()).abs().max().item() < 1e-4
    assert len({tuple(ours.ids) for ours, _ in answers}) > MANY // 2  # they are not one another
    assert together.steps < alone.steps
    for served in (together, alone):
        served.close()
