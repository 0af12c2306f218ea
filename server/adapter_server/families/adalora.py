"""AdaLoRA (PEFT `tuners/adalora/layer.py`): a low rank with singular values, whose ranks training has pruned.

y = W x + b + s·B ((E ∘ A) x)      s = α / (init_r + 1e-5), whatever rank was left;  A [r,in]  B [out,r]  E [r,1]
"""

from __future__ import annotations

from typing import Any

from adapter_server.errors import AdapterRefused
from adapter_server.families import lora
from adapter_server.families.base import Family, Patch
from adapter_server.families.options import Config, as_number, table
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping

_LORA = "it is LoRA's, and AdaLoRA does not define it"
_FOREIGN = (
    *("alora_invocation_tokens", "ensure_weight_tying", "kasa_config", "lora_bias", "monteclora_config"),
    *("target_parameters", "trainable_token_indices"),
    *("use_bdlora", "use_dora", "use_qalora", "velora_config"),
)
TRAINING = frozenset(
    {"beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step", "alpha_pattern"}
)


class AdaLora(Wrapping):
    name = "ADALORA"
    known = lora.SERVED | lora.HARMLESS | lora.REFUSED.keys() | TARGETS | TRAINING | {"init_r"}
    conv1d = True
    refused = {**lora.REFUSED, **dict.fromkeys(_FOREIGN, _LORA)}  # noqa: RUF012

    def tensors(self, at: Wrapped) -> Expected:
        r = _left(at)
        return {"lora_A": (r, at.inp), "lora_B": (at.out, r), "lora_E": (r, 1)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        init, alpha = at.rank("init_r", 12), as_number(at.config.get("lora_alpha", 8), "lora_alpha")
        A, B, E = read("lora_A"), read("lora_B"), read("lora_E")
        scaling = (alpha if alpha > 0 else _left(at)) / (init + 1e-5)
        return Patch(A=A * E, B=B * scaling) if len(A) else Patch()


def _left(at: Wrapped) -> int:
    """How much of the first rank was not pruned: `rank_pattern` maps a tensor's name to a mask."""
    init, mask = at.rank("init_r", 12), _masks(at.config).get(f"{at.path}.lora_E")
    if mask is None:
        return init
    if not isinstance(mask, list) or len(mask) != init or not all(isinstance(kept, bool) for kept in mask):
        raise AdapterRefused(f"adapter_config.json: 'rank_pattern' must give {init} times true or false at {at.path}")
    return sum(mask)


def _masks(config: Config) -> Config:
    return table(config, "rank_pattern")


FAMILY: Family = AdaLora()
