"""Soft prompts and prefixes: shapes from the base, and what is refused."""

import dataclasses

import peft
import pytest
import torch

import zoo
from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families import find
from adapter_server.families.facts import ModelBase, describe
from adapter_server.families.options import IGNORED
from adapter_server.families.prompt import MULTITASK, VIRTUAL

SHAPES = describe(zoo.tiny_base("llama"))
CONFIGS = {
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "CPT": peft.CPTConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "CARTRIDGE": peft.CartridgeConfig,
}


def expected(kind, **options):
    return find(kind).expected({"peft_type": kind, "num_virtual_tokens": 5} | options, SHAPES, frozenset())


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_peft_is_known(kind):
    assert {field.name for field in dataclasses.fields(CONFIGS[kind])} <= find(kind).known | IGNORED


def test_every_field_of_the_multitask_config_is_known():
    fields = {field.name for field in dataclasses.fields(peft.MultitaskPromptTuningConfig)}
    assert fields <= VIRTUAL | MULTITASK | IGNORED


def test_shapes_are_the_bases_own_whatever_the_config_says():
    wrong = {"num_layers": 9, "token_dim": 9, "num_attention_heads": 9}
    assert expected("PROMPT_TUNING", **wrong) == {"prompt_embeddings": (5, 32)}
    assert expected("PREFIX_TUNING", **wrong) == {"prompt_embeddings": (5, 2 * 2 * 2 * 8)}
    assert expected("MULTITASK_PROMPT_TUNING", num_tasks=3, num_ranks=2, **wrong) == {
        "prompt_embeddings": (5, 32),
        "prefix_task_cols": (3, 5, 2),
        "prefix_task_rows": (3, 2, 32),
    }


@pytest.mark.parametrize("kind", [*CONFIGS, "MULTITASK_PROMPT_TUNING"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_virtual_tokens": 0}, "'num_virtual_tokens' must be an integer"),
        ({"num_virtual_tokens": None}, "'num_virtual_tokens' must be an integer"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' has no effect"),
        ({"num_transformer_submodules": 2}, "'num_transformer_submodules' must be 1"),
        ({"num_virtual_token": 5}, "did you mean 'num_virtual_tokens'"),
    ],
)
def test_refusals(kind, options, reason):
    with pytest.raises(AdapterRefused, match=reason):
        expected(kind, **options)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_leftovers_are_refused_by_name(kind):
    spec = Spec("a", "0" * 12, "", kind, {"peft_type": kind, "num_virtual_tokens": 5}, 0)
    width = expected(kind)["prompt_embeddings"][1]
    tensors = {"prompt_embeddings": torch.zeros(5, width), "prefix_task_cols": torch.zeros(1)}
    with pytest.raises(AdapterRefused, match="prefix_task_cols"):
        find(kind).load(spec, tensors, ModelBase(zoo.tiny_base("llama")))
