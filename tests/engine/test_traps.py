"""Where PEFT answers wrongly without a word: its own batches of several adapters, its merges, its padding.

What is right is PEFT with one adapter, batch 1 and no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.registry.store import Store
from test_oracle import check

PROMPT = (5, 9, 13, 40)
LONG = tuple(range(20, 41))
Asked = Sequence[tuple[str | None, tuple[int, ...]]]


def hold(arch: str, asked: Asked, mode: str = "unmerged") -> None:
    """All in one batch from the first step on, each as PEFT alone."""
    names = tuple(dict.fromkeys(name for name, _ in asked if name))
    engine = rig.engine(arch, names)
    answers = rig.run(engine, [rig.ask(engine, name, prompt, mode=mode) for name, prompt in asked])
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check(arch, name, prompt, answer)
    engine.close()


def differ(arch: str, one: str | None, other: str | None, prompt: tuple[int, ...]) -> bool:
    """Whether PEFT's answers differ, so that a test which takes one for the other fails."""
    left, right = (rig.peft_alone(arch, name, prompt)[1][0] for name in (one, other))
    return bool((left - right).abs().max() > 1e-2)


@pytest.mark.parametrize("arch", zoo.BIASED)
def test_base_rows_beside_an_adapter_that_trained_all_biases(arch: str) -> None:
    """PEFT writes `bias="all"` into the base's own biases: its base rows are not the base's."""
    assert differ(arch, "lora_bias_all", None, PROMPT)
    hold(arch, [("lora_bias_all", PROMPT), (None, PROMPT), ("lora", PROMPT), (None, LONG)])


def test_rows_beside_an_adapter_whose_initialisation_changed_the_base() -> None:
    """PEFT takes PiSSA's first directions from the base's weights, which every other row reads too."""
    assert differ("llama", "pissa", "lora", PROMPT)
    hold("llama", [("pissa", PROMPT), ("lora", PROMPT), (None, PROMPT), ("olora", PROMPT), ("kasa", PROMPT)])


def test_a_dora_row_in_a_mixed_batch() -> None:
    """PEFT refuses DoRA with `adapter_names`, and leaves hooks behind which fail every later call."""
    assert differ("llama", "dora", "lora", PROMPT)
    hold("llama", [("dora", PROMPT), ("lora", PROMPT), (None, PROMPT), ("ia3", PROMPT), ("dora", LONG)])


def test_an_ia3_row_beside_a_lora_row() -> None:
    """PEFT ignores `adapter_names` for all kinds but three, and gives (IA)³ to every row, the base's among them."""
    assert differ("qwen2", "ia3", None, PROMPT)
    hold("qwen2", [("ia3", PROMPT), ("lora", PROMPT), (None, PROMPT), ("ia3", LONG), (None, LONG)])


@pytest.mark.parametrize("arch", ["gemma2", "gpt2"])
def test_tied_embeddings_come_apart_when_one_of_them_is_merged(arch: str) -> None:
    """PEFT merges into the one tensor that embedding and head share, so that merged is not unmerged."""
    names = ("lora_embed", "lora_tokens_apart" if arch == "gpt2" else "lora_head", "lora_tied_saved")
    asked = [(name, PROMPT) for name in names]
    hold(arch, [*asked, (None, PROMPT)])
    hold(arch, asked, mode="merged")


@pytest.mark.parametrize("name", ["prompt", "ptuning", "cpt", "multitask", "prefix", "cartridge"])
def test_virtual_tokens_of_rows_of_different_lengths(name: str) -> None:
    """PEFT puts virtual tokens before the padding of short rows: their answers are not those of a row alone."""
    hold("llama", [(name, LONG), (name, (50,)), (name, PROMPT), (None, PROMPT), (None, LONG)])


def test_adapters_with_only_some_layers() -> None:
    """The layers that one lacks are the base's for its rows, whatever the others have there."""
    asked = [("lora_layers", PROMPT), ("lora", PROMPT), (None, PROMPT), ("lora_regex", PROMPT), ("lora_patterns", LONG)]
    assert differ("llama", "lora_layers", "lora", PROMPT)
    hold("llama", asked)
    hold("llama", [(name, prompt) for name, prompt in asked if name], mode="merged")


@pytest.mark.parametrize("native", [True, False])
def test_ranks_of_all_sizes_in_one_batch(native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank is padded into another's numbers, nor cut to it: 1, 3, 8, 24 and 64, a prompt and a decode of each."""
    if not native:
        monkeypatch.setattr("adapter_server.engine.native.library", lambda: None)
    ranks, base = (1, 3, 8, 24, 64), lambda: zoo.tiny_base("llama")
    for rank in ranks:
        config = zoo.Case(zoo.lora(r=rank, lora_alpha=rank))(base())
        zoo.save_adapter(base, config, tmp_path / str(rank), seed=rank)
    engine = Engine(base(), EngineConfig(kv_bytes=16 << 20, max_rows=64), Store(tmp_path, settle_s=0))
    asked = [(str(rank), prompt) for prompt in (PROMPT, LONG, (50,)) for rank in ranks]
    answers = rig.run(engine, [rig.ask(engine, name, prompt) for name, prompt in asked], stagger=1)
    oracles = {str(rank): zoo.load_peft(base(), tmp_path / str(rank)) for rank in ranks}
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert answer.end is not None
        assert answer.end.error is None
        whole = torch.tensor([[*prompt, *answer.ids]])
        with torch.inference_mode():
            logits = oracles[name](input_ids=whole).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.ids, (name, prompt)
        assert (answer.matrix() - logits.log_softmax(-1)).abs().max() < 1e-4, (name, prompt)
    engine.close()
