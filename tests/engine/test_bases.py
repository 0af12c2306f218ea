"""Every model type of the packed lane, tiny and random: a LoRA on its Linears and the plain base, mixed, as PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.engine.model import _is_linear
from adapter_server.registry.store import Store

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TYPES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**MOE, "head_dim": 16},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {"sliding_window": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": GPT,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_bigcode": GPT,
    "stablelm": {},
    "olmo2": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "granite": {},
    "starcoder2": {"sliding_window": 8},
    "smollm3": {},
    "glm": {"head_dim": 8},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def base(kind: str) -> transformers.PreTrainedModel:
    own = TYPES[kind] if TYPES[kind] is GPT else {**zoo.COMMON, **TYPES[kind]}
    config = transformers.AutoConfig.for_model(kind, **own)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@pytest.mark.parametrize("kind", TYPES)
def test_tokens_are_the_bases_and_pefts(kind: str, tmp_path: Path) -> None:
    modules = dict(base(kind).named_modules())
    experts = any(path.endswith(".experts") for path in modules)  # then PEFT takes an MLP's names for theirs
    linears = [p for p, m in modules.items() if _is_linear(m) and p != "lm_head" and not (experts and ".mlp." in p)]
    transposed = kind == "gpt2"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM", fan_in_fan_out=transposed)
    zoo.save_adapter(lambda: base(kind), config, tmp_path / "a")
    alone = {None: base(kind), "a": zoo.load_peft(base(kind), tmp_path / "a")}
    engine = Engine(base(kind), EngineConfig(kv_bytes=16 << 20, max_step_tokens=40), Store(tmp_path, settle_s=0))
    cases = [(name, prompt) for prompt in rig.PROMPTS for name in (None, "a")]
    answers = rig.run(engine, [rig.ask(engine, name, prompt, logprobs=0) for name, prompt in cases], stagger=1)
    for (name, prompt), answer in zip(cases, answers, strict=True):
        assert answer.end is not None
        assert answer.end.error is None, answer.end.error.__cause__
        with torch.inference_mode(), zoo.quiet():
            want = alone[name].generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=rig.NEW,
                do_sample=False,
            )
        assert answer.ids == want[0, len(prompt) :].tolist(), (kind, name, prompt)
    engine.close()
