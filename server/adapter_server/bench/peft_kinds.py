"""An adapter of every kind that PEFT has, made by PEFT over a Llama with its defaults as far as they go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import torch

from adapter_server.bench.workloads import LINEARS, VIRTUAL_TOKENS, Workload, any_base, kinds, quiet, save_adapters
from adapter_server.families import known

TASK = "CAUSAL_LM"
WRAPPING: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # kind: (PEFT's config, what has no default that fits)
    "ADALORA": ("AdaLoraConfig", {"total_step": 10}),
    "BEFT": ("BeftConfig", {}),
    "BOFT": ("BOFTConfig", {}),
    "C3A": ("C3AConfig", {"block_size": 32}),
    "DEFT": ("DeftConfig", {}),
    "DELORA": ("DeloraConfig", {}),
    "FOURIERFT": ("FourierFTConfig", {}),
    "FROD": ("FrodConfig", {"progressbar": False}),
    "GLORA": ("GloraConfig", {}),
    "GRALORA": ("GraloraConfig", {}),
    "HIRA": ("HiraConfig", {}),
    "HRA": ("HRAConfig", {}),
    "LOHA": ("LoHaConfig", {}),
    "LOKR": ("LoKrConfig", {}),
    "LORA": ("LoraConfig", {}),
    "MISS": ("MissConfig", {"r": 16}),
    "OFT": ("OFTConfig", {}),
    "OSF": ("OSFConfig", {}),
    "PEANUT": ("PeanutConfig", {"depth": 2}),
    "PSOFT": ("PsoftConfig", {}),
    "PVERA": ("PveraConfig", {}),
    "RANDLORA": ("RandLoraConfig", {}),
    "ROAD": ("RoadConfig", {"group_size": 32}),
    "SHIRA": ("ShiraConfig", {"r": 8}),
    "SUPERTUNING": ("SupertuningConfig", {}),
    "TINYLORA": ("TinyLoraConfig", {}),
    "UNILORA": ("UniLoraConfig", {}),
    "VBLORA": ("VBLoRAConfig", {"vector_length": 32}),
    "VERA": ("VeraConfig", {}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 512}),
}


def config(kind: str) -> Any:
    """PEFT's config of a kind, on all linears of a Llama where the kind wraps them; None: PEFT does not make it."""
    if kind in WRAPPING:
        name, more = WRAPPING[kind]
        return getattr(peft, name)(target_modules=list(LINEARS), task_type=TASK, **more)
    virtual: dict[str, Any] = {"num_virtual_tokens": VIRTUAL_TOKENS, "task_type": TASK}
    others: Mapping[str, Any] = {
        "IA3": lambda: kinds()["ia3"],
        "PREFIX_TUNING": lambda: kinds()["prefix"],
        "PROMPT_TUNING": lambda: kinds()["prompt"],
        "CARTRIDGE": lambda: peft.CartridgeConfig(**virtual),
        "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(num_tasks=3, **virtual),
        "P_TUNING": lambda: peft.PromptEncoderConfig(encoder_hidden_size=64, **virtual),
        "CPT": lambda: peft.CPTConfig(
            cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4], task_type=TASK
        ),
        "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type=TASK),
        "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[5, 9, 13, 40], task_type=TASK),
    }
    return others[kind]() if kind in others else None


@contextmanager
def one_of_every_kind(size: str, left_out: dict[str, str], seed: int = 0) -> Iterator[Workload]:
    """A base with an adapter of every kind that is served; what PEFT could not make over it goes to `left_out`."""
    with any_base(size, seed) as (model, adapters, shape):
        made = {}
        for i, kind in enumerate(known()):
            try:
                with quiet():
                    chosen = config(kind)
                if chosen is None:
                    left_out[kind] = "this benchmark makes its adapters with PEFT, and it has no config for this kind"
                    continue
                save_adapters(model, chosen, [adapters / kind.lower()], seed + i, _moved)
                made[kind] = kind.lower()
            except Exception as error:  # a kind that does not fit these shapes leaves the others to be measured
                left_out[kind] = f"PEFT could not make it over this base: {type(error).__name__}: {error}"[:200]
        yield Workload(size, model, adapters, made, shape, seed)


def _moved(name: str, fresh: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A little away from where training begins."""
    return fresh + 0.02 * torch.randn(fresh.shape, generator=generator, dtype=fresh.dtype)
