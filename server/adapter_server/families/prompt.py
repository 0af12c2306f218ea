"""Soft prompts: embeddings fed in front of the prompt's own (PEFT `tuners/prompt_tuning`, `p_tuning`, `multitask_…`).

PROMPT_TUNING, P_TUNING, CPT   embeds = prompt_embeddings [n, hidden], encoders and projections already applied
MULTITASK_PROMPT_TUNING        tasks[t] = prompt_embeddings ∘ (cols[t] rows[t])      [n,k] [k,hidden]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, Base, Family, Shapes
from adapter_server.families.options import Config, check_known, integer, name_list
from adapter_server.families.parts import Expected, Taker

# Keys of every kind with virtual tokens. The base says what layers, heads and width there are, whatever these say.
VIRTUAL = frozenset(
    {
        "modules_to_save",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "token_dim",
    }
)
TEXT_INIT = frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"})
ENCODER = frozenset({"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"})
CPT = frozenset(
    {
        "cpt_mask",
        "cpt_token_ids",
        "cpt_tokens_type_mask",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
        "opt_weighted_loss_type",
        "tokenizer_name_or_path",
    }
)
MULTITASK = TEXT_INIT | {"num_ranks", "num_tasks", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"}


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    name: str
    known: frozenset[str]
    slow: bool = False
    before_the_prompt: ClassVar[bool] = True

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        check_virtual(config, self.known)
        return {"prompt_embeddings": (integer(config, "num_virtual_tokens", None), shapes.hidden)}

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        check_virtual(spec.config, self.known)
        take = Taker(tensors)
        embeds = take("prompt_embeddings")
        take.done()
        return Adapter(spec, embeds=embeds)


class Multitask:
    name = "MULTITASK_PROMPT_TUNING"
    slow = False
    before_the_prompt = True
    tasks_key = "num_tasks"

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        check_virtual(config, VIRTUAL | MULTITASK)
        n, hidden = integer(config, "num_virtual_tokens", None), shapes.hidden
        tasks, rank = integer(config, "num_tasks", 1), integer(config, "num_ranks", 1)
        return {
            "prompt_embeddings": (n, hidden),
            "prefix_task_cols": (tasks, n, rank),
            "prefix_task_rows": (tasks, rank, hidden),
        }

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        check_virtual(spec.config, VIRTUAL | MULTITASK)
        take = Taker(tensors)
        shared, cols, rows = take("prompt_embeddings"), take("prefix_task_cols"), take("prefix_task_rows")
        take.done()
        return Adapter(spec, tasks=tuple(shared * (c @ r) for c, r in zip(cols, rows, strict=True)))


def check_virtual(config: Config, known: frozenset[str]) -> None:
    """What every kind with virtual tokens refuses."""
    check_known(config, known)
    if name_list(config, "modules_to_save"):
        raise AdapterRefused("adapter_config.json: 'modules_to_save' has no effect with virtual tokens; remove it")
    if integer(config, "num_transformer_submodules", 1) != 1:
        raise AdapterRefused("adapter_config.json: 'num_transformer_submodules' must be 1, for a causal language model")


FAMILIES: tuple[Family, ...] = (
    SoftPrompt("PROMPT_TUNING", VIRTUAL | TEXT_INIT),
    SoftPrompt("P_TUNING", VIRTUAL | ENCODER),
    SoftPrompt("CPT", VIRTUAL | CPT),
    Multitask(),
)
