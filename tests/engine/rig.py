"""What the engine's tests share: a registry of every kind for one architecture, an engine over it, PEFT beside it."""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Event, Finished, Member, Request, Sampling, Token
from adapter_server.engine.engine import Engine
from adapter_server.registry.store import Store

PROMPTS = [(5, 9, 13, 40), (11, 12, 60, 61, 62, 7, 33), (50,), tuple(range(20, 41)), (8, 8, 9, 70, 71)]
NEW = 8


COMMON = (
    "lora", "rslora", "velora", "dora", "ia3", "ia3_saved", "lora_saved", "lora_embed", "lora_bias_all",
    "prefix", "prompt",
)  # fmt: skip


@functools.cache
def _workspace() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="adapters-")  # goes when the test run ends


@functools.cache
def saved(arch: str, name: str) -> Path:
    """One adapter, saved by PEFT once a test run."""
    folder = Path(_workspace().name) / arch / name
    seed = zlib.crc32(name.encode())  # its own, whatever other cases there are
    zoo.save_adapter(lambda: zoo.tiny_base(arch), zoo.ADAPTERS[name](zoo.tiny_base(arch)), folder, seed)
    return folder


@functools.cache
def registry(arch: str, names: tuple[str, ...] = COMMON) -> Path:
    """A folder of adapters for the architecture."""
    root = Path(tempfile.mkdtemp(dir=_workspace().name))
    for name in (name for name in names if arch in zoo.ADAPTERS[name].archs):
        shutil.copytree(saved(arch, name), root / name)
    return root


def engine(arch: str, names: tuple[str, ...] = COMMON, **settings: object) -> Engine:
    config = EngineConfig(**{"kv_bytes": 16 << 20, "max_rows": 64, **settings})  # type: ignore[arg-type]
    return Engine(zoo.tiny_base(arch), config, Store(registry(arch, names), settle_s=0))


@dataclass
class Answer:
    """What a request got: its tokens, each step's logprobs over the whole vocabulary, and its end."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    end: Finished | None = None
    prompt: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()

    def matrix(self) -> Tensor:
        return torch.tensor([[row[i] for i in range(zoo.VOCAB)] for row in self.logprobs])


def ask(
    engine: Engine,
    name: str | None,
    prompt: Sequence[int],
    mode: str = "unmerged",
    weight: float = 1.0,
    id: str | None = None,
    task_id: int | None = None,
    **sampling: object,
) -> Request:
    members = () if name is None else (Member(engine.pool.store.resolve(name), weight),)
    settings = {"max_new_tokens": NEW, "logprobs": zoo.VOCAB, "ignore_eos": True, **sampling}
    task = 1 if name in zoo.TASKED and task_id is None else task_id
    return Request(
        id=id or f"{name}-{mode}-{hash(tuple(prompt))}-{time.monotonic_ns()}",
        prompt=tuple(prompt),
        sampling=Sampling(**settings),  # type: ignore[arg-type]
        members=members,
        mode="base" if name is None else mode,  # type: ignore[arg-type]
        task_id=task,
        arrived=time.monotonic(),
    )


def collect(events: Sequence[Event], answers: dict[str, Answer]) -> None:
    for event in events:
        if isinstance(event, Token):
            answers[event.request_id].ids.append(event.id)
            answers[event.request_id].prompt += event.prompt
            answers[event.request_id].logprobs.append(dict(event.top))
        elif isinstance(event, Finished):
            answers[event.request_id].end = event


def run(engine: Engine, requests: Sequence[Request], stagger: int = 0, timeout_s: float = 60) -> list[Answer]:
    """Every request through the engine, all at once or a new one every `stagger` steps."""
    answers = {r.id: Answer() for r in requests}
    queue, ends, steps = list(requests), time.monotonic() + timeout_s, 0
    while queue or engine.busy:
        while queue and (not stagger or steps % stagger == 0):
            engine.submit(queue.pop(0))
            if stagger:
                break
        events = engine.step()
        collect(events, answers)
        steps += 1
        if not events:
            time.sleep(0.001)
        assert time.monotonic() < ends, "the engine does not come to an end"
    return [answers[r.id] for r in requests]


@functools.cache
def peft_alone(
    arch: str, name: str | None, prompt: tuple[int, ...], new: int = NEW, task: int = 1
) -> tuple[tuple[int, ...], Tensor]:
    """PEFT with this one adapter, batch 1, float32, greedy: (tokens, logprobs [new, vocab])."""
    model = peft_model(arch, name)
    options = {"task_ids": torch.tensor([task])} if name in zoo.TASKED else {}
    with torch.inference_mode(), zoo.quiet():
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    logits = torch.stack(out.logits, 1)[0].float()
    return tuple(logits.argmax(-1).tolist()), logits.log_softmax(-1)


@functools.cache
def peft_model(arch: str, name: str | None) -> torch.nn.Module:
    base = zoo.tiny_base(arch)
    base.generation_config.eos_token_id = None
    return base if name is None else zoo.load_peft(base, saved(arch, name))
