"""Makes adapterhub-*.safetensors: adapters that AdapterHub's own library saved, and what it answers with them.

Run by hand, in an environment of its own (adapters 1.3.0, transformers 4.57, peft), with `server` and `tests` on the
path. Each case's config is in the metadata; CASE/NAME are its tensors, CASE@ids and CASE@logits its greedy answer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import adapters
import torch
import transformers
from adapters import (
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from safetensors.torch import save_file

import zoo

PROMPT, NEW = [5, 9, 13, 40, 7], 6
PREFIX = PrefixTuningConfig(prefix_length=3, bottleneck_size=6)
EVERY = {
    "seq_bn": SeqBnConfig(reduction_factor=8),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=16),
    "par_bn": ParBnConfig(reduction_factor=8),
    "mam": MAMConfig(PREFIX, ParBnConfig(reduction_factor=16)),
    "compacter": CompacterConfig(reduction_factor=4),
}
ONCE = {
    "both_before": SeqBnConfig(reduction_factor={"0": 8, "default": 16}, mh_adapter=True, non_linearity="gelu"),
    "par_attention": ParBnConfig(reduction_factor=16, mh_adapter=True, scaling="learned", leave_out=[0]),
    "norms": DoubleSeqBnConfig(reduction_factor=16, ln_before=True, ln_after=True, non_linearity="leakyrelu"),
    "norms_inside": SeqBnConfig(reduction_factor=16, ln_after=True, adapter_residual_before_ln=True),
    "par_norm": ParBnConfig(reduction_factor=16, ln_after=True, original_ln_after=False),
    "plus": AdapterPlusConfig(reduction_factor=16, stochastic_depth=0.0),
    "residual_after": SeqBnConfig(reduction_factor=16, residual_before_ln=False),
    "compacter_own": CompacterPlusPlusConfig(
        reduction_factor=4, shared_phm_rule=False, factorized_phm_W=False, phm_bias=False
    ),
    "compacter_shared": CompacterConfig(reduction_factor=4, shared_W_phm=True, factorized_phm_rule=True),
    "prefix": PREFIX,
    "prefix_flat": PREFIX.replace(flat=True),
}
EVERY_LORA = {
    "lora": LoRAConfig(r=2, alpha=6),
    "lora_all": LoRAConfig(
        r=2, alpha=3, attn_matrices=["v", "k", "q"], intermediate_lora=True, output_lora=True, leave_out=[1]
    ),
}
GATED = {
    "unipelt": UniPELTConfig(PREFIX, SeqBnConfig(reduction_factor=16), LoRAConfig(r=2, alpha=2)),
    "unipelt_all": UniPELTConfig(
        PREFIX.replace(shared_gating=False, flat=True),
        ParBnConfig(reduction_factor=16, mh_adapter=True, ln_before=True, ln_after=True),
        LoRAConfig(r=2, attn_matrices=["k", "v"], intermediate_lora=True, output_lora=True, leave_out=[0]),
    ),
    "gated_bottleneck": CompacterConfig(reduction_factor=4, use_gating=True),
    "gated_lora": LoRAConfig(r=2, use_gating=True, attn_matrices=["q", "k", "v"]),
    "gated_prefix": PREFIX.replace(use_gating=True),
    "lora_union": ConfigUnion(PREFIX, DoubleSeqBnConfig(reduction_factor=16), LoRAConfig(r=2, output_lora=True)),
}
FILES = {
    "llama": EVERY, "llama-options": ONCE, "gpt2": EVERY, "mistral": EVERY,
    "llama-lora": EVERY_LORA, "gpt2-lora": EVERY_LORA, "mistral-lora": EVERY_LORA,
    "llama-gated": GATED, "gpt2-gated": GATED, "mistral-gated": GATED,
}  # fmt: skip


def base(arch: str) -> transformers.PreTrainedModel:
    model = zoo.tiny_base(arch)
    model.generation_config.eos_token_id = None
    return model


def adapted(arch: str, case: str, config: adapters.AdapterConfig) -> transformers.PreTrainedModel:
    model = base(arch)
    adapters.init(model)
    model.add_adapter(case, config=config)
    model.set_active_adapters(case)
    generator = torch.Generator().manual_seed(len(case))
    for name, param in model.named_parameters():
        if f".{case}." in name:
            param.data.add_(0.3 * torch.randn(param.shape, generator=generator))
    return model.eval()


def saved(model: transformers.PreTrainedModel, case: str) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors and the config as `save_adapter` writes them, its pickle turned into what safetensors can hold."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder, case)
        tensors = torch.load(Path(folder) / "pytorch_adapter.bin", weights_only=True)
        return {k: v.clone().contiguous() for k, v in tensors.items()}, (
            Path(folder) / "adapter_config.json"
        ).read_text()


@torch.no_grad()
def answer(model: transformers.PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and logits, without a cache: the library's Llama and Mistral do not fill the one they are given."""
    ids = torch.tensor([PROMPT])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        use_cache=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[0, len(PROMPT) :], torch.stack(out.logits, 1)[0]


def main() -> None:
    for name in sys.argv[1:] or FILES:
        cases = FILES[name]
        arch = name.partition("-")[0]
        tensors: dict[str, torch.Tensor] = {}
        metadata: dict[str, str] = {}
        for case, config in cases.items():
            model = adapted(arch, case, config)
            own, text = saved(model, case)
            ids, logits = answer(model)
            assert (logits - answer(base(arch))[1]).abs().max() > 0.1, (arch, case)
            tensors |= {f"{case}/{key}": t for key, t in own.items()} | {f"{case}@ids": ids, f"{case}@logits": logits}
            metadata[case] = json.dumps(json.loads(text))
        save_file(tensors, Path(__file__).with_name(f"adapterhub-{name}.safetensors"), metadata)


if __name__ == "__main__":
    main()
