"""A tiny base of random weights that speaks bytes, and LoRA adapters for it: written by hand, without PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import files
from fakes import EOS, save_byte_tokenizer

HIDDEN, RANK = 32, 4
MODULES = {"self_attn.q_proj": HIDDEN, "self_attn.o_proj": HIDDEN, "mlp.up_proj": 48}


def save_base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return save_byte_tokenizer(folder)


def save_lora(folder: Path, seed: int) -> Path:
    rng, arrays = np.random.default_rng(seed), {}
    for layer in range(2):
        for module, out in MODULES.items():
            path = f"base_model.model.model.layers.{layer}.{module}"
            arrays[f"{path}.lora_A.weight"] = rng.standard_normal((RANK, HIDDEN), dtype=np.float32) * 0.5
            arrays[f"{path}.lora_B.weight"] = rng.standard_normal((out, RANK), dtype=np.float32) * 0.5
    targets = [module.rpartition(".")[2] for module in MODULES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    return files.write(folder, config=config, weights=files.safetensors(arrays))
