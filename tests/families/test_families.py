"""Families are found by being there."""

import contextlib
import dataclasses

import peft
import pytest

import zoo
from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families import find, known, slow
from adapter_server.families.facts import describe

SHAPES = describe(zoo.tiny_base("gemma2"))
SOUND = {"target_modules": ["q_proj"], "num_virtual_tokens": 4}
STRANGE = [
    *(None, True, -1, 0, 1 << 70, 1.5, float("nan"), float("inf")),
    *("", "(", "\\", "\ud800", "\0", ".*", "all-linear", "a" * 10_000, "((((a{100}){100}){100}){100})"),
    *([], [""], ["("], [None], [[1]], [1], ["embed_tokens"], ["\ud800"]),
    *({}, {"": 2}, {"(": 1}, {"q_proj": {}}, {"\ud800": 1}),
]


def test_every_known_kind_is_found_under_its_own_name():
    assert {"LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"} <= set(known())
    assert known() == sorted(known())
    assert [find(kind).name for kind in known()] == known()


@pytest.mark.parametrize("kind", ["LORAX", "lora", "", "../lora", "adapter_server.families.lora"])
def test_an_unknown_kind_is_refused_with_those_that_are_known(kind):
    with pytest.raises(AdapterRefused, match=r"are not served.*Known: .*IA3.*LORA"):
        find(kind)


def test_what_reads_base_weights_queues_apart():
    def spec(**config):
        return Spec("a", "0" * 12, "", "LORA", config, 0)

    assert slow(spec(use_dora=True))
    assert slow(spec(init_lora_weights="pissa"))
    assert slow(spec(trainable_token_indices=[1]))
    assert not slow(spec(use_dora=False, init_lora_weights="gaussian"))
    assert not slow(spec())


@pytest.mark.parametrize("kind", known())
def test_no_value_of_any_key_does_worse_than_a_refusal(kind):
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind, peft.PeftConfig)  # a kind that is not PEFT's has the common keys
    fields = {field.name: None for field in dataclasses.fields(cls)}
    for key in [*fields, "new", "\ud800"]:
        for value in STRANGE:
            config = {name: SOUND[name] for name in SOUND.keys() & fields.keys()} | {key: value}
            with contextlib.suppress(AdapterRefused):
                expected = find(kind).expected(config, SHAPES, frozenset())
                assert all(min(shape) > 0 for shape in (expected or {}).values())
