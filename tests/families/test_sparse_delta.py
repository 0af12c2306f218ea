"""Sparse deltas: what the folder must hold, and what is refused."""

import pytest
import torch

import beyond
import zoo
from adapter_server.errors import AdapterRefused
from adapter_server.families import find
from adapter_server.families.facts import ModelBase, describe

FAMILY, Q = find("SPARSE_DELTA"), "model.layers.0.self_attn.q_proj.weight"
SHAPES = {arch: describe(zoo.tiny_base(arch)) for arch in ("llama", "gpt2")}


def test_a_count_says_how_long_the_two_tensors_are():
    found = FAMILY.expected({"parameters": {Q: 7}}, SHAPES["llama"], frozenset())
    assert dict(found) == {f"{beyond.ROOT}{Q}.indices": (7,), f"{beyond.ROOT}{Q}.values": (7,)}


@pytest.mark.parametrize(
    ("parameters", "arch", "reason"),
    [
        ({}, "llama", "must say how many numbers"),
        ({"model.norm.bias": 1}, "llama", "'model.norm.bias', which this base does not have"),
        ({"__class__": 1}, "llama", "which this base does not have"),
        ({Q: 32 * 32 + 1}, "llama", "'parameters' must be an integer in 1..1024"),
        ({Q: True}, "llama", "'parameters' must be an integer"),
        ({"lm_head.weight": 1}, "gpt2", r"is the embedding's own here: name transformer\.wte\.weight"),
        ([Q], "llama", "'parameters' must be an object"),
    ],
)
def test_what_a_config_refuses(parameters, arch, reason):
    with pytest.raises(AdapterRefused, match=reason):
        FAMILY.expected({"parameters": parameters}, SHAPES[arch], frozenset())


@pytest.mark.parametrize(
    ("indices", "values", "reason"),
    [
        ([3, 3], [1.0, 1.0], "names a place twice"),
        ([3, 1024], [1.0, 1.0], r"holds indices outside 0\.\.1023"),
        ([3, -1], [1.0, 1.0], r"holds indices outside 0\.\.1023"),
        ([3, 4], [3e38, 3e38], "not finite"),
    ],
)
def test_what_a_file_refuses(indices, values, reason):
    base = zoo.tiny_base("llama")
    base.get_parameter(Q).data.fill_(3e38)
    tensors = {f"{beyond.ROOT}{Q}.indices": torch.tensor(indices), f"{beyond.ROOT}{Q}.values": torch.tensor(values)}
    spec = beyond.spec({"peft_type": "SPARSE_DELTA", "parameters": {Q: 2}})
    with pytest.raises(AdapterRefused, match=reason):
        FAMILY.load(spec, tensors, ModelBase(base))
