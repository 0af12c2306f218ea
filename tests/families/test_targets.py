"""Which modules a config names: the same as PEFT chooses, on names that try to confuse it."""

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import zoo
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import ModuleShape, Shapes
from adapter_server.families.facts import describe
from adapter_server.families.targets import by_pattern, saved_modules, targeted

LLAMA = describe(zoo.tiny_base("llama"))
PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.q_proj",
    "model.layers.1.mlp.my_q_proj",
    "model.blocks.1.q_proj",
    "q_proj",
    "lm_head",
]
ODD = Shapes({path: ModuleShape("linear", 2, 2) for path in PATHS}, 2, 1, 2, 2, 2, head="lm_head")

CHOICES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["experts", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
    {"target_modules": r".*layers\.\d\..*q_proj"},
    {"target_modules": r"q_proj"},
    {"target_modules": r"model\.(layers|blocks)\.1\..*", "exclude_modules": ["my_q_proj"]},
]


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_the_same_modules_as_peft(options):
    config = peft.LoraConfig(**options)
    want = [path for path in PATHS if check_target_module_exists(config, path)]
    assert targeted(options, ODD) == want


def test_all_linear_leaves_the_head():
    everything = targeted({"target_modules": "all-linear"}, LLAMA)
    assert len(everything) == 14
    assert "lm_head" not in everything
    assert targeted({"target_modules": "All-Linear", "exclude_modules": ["mlp"]}, LLAMA) == everything


PATTERNS = {"q_proj": 1, r"layers\.1\..*": 2, "^model.blocks.1.q_proj": 3, "self_attn.q_proj|lm_head": 4, "proj": 5}


@pytest.mark.parametrize("order", [list(PATTERNS), list(reversed(PATTERNS)), sorted(PATTERNS)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_same_pattern_as_peft(path, order):
    entries = {key: PATTERNS[key] for key in order}
    want = entries.get(get_pattern_key(list(entries), path), 9)
    assert by_pattern({}, "rank_pattern", entries, 9)(path) == want


def test_saved_modules_are_found_by_the_end_of_their_name_and_bring_what_is_inside():
    assert saved_modules({"modules_to_save": ["model.norm"]}, LLAMA) == ["model.norm"]
    assert len(saved_modules({"modules_to_save": ["norm"]}, LLAMA)) == 5
    assert len(saved_modules({"modules_to_save": ["layers.1.self_attn"]}, LLAMA)) == 4
    assert saved_modules({"modules_to_save": None}, LLAMA) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": None}, "'target_modules' is missing"),
        ({}, "'target_modules' is missing"),
        ({"target_modules": []}, "matches no module"),
        ({"target_modules": ["w1"]}, "matches no module"),
        ({"target_modules": 5}, "'target_modules' must be a list of names"),
        ({"target_modules": [5]}, "'target_modules' must be a list of names"),
        ({"target_modules": "(?!lm_head).*"}, "does not compile in RE2"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "needs 'target_modules' to be a list"),
        ({"target_modules": ["q_proj"], "exclude_modules": "["}, "does not compile in RE2"),
        ({"target_modules": ["q_proj"], "layers_to_transform": ["1"]}, "'layers_to_transform' must be an integer"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["("]}, "does not compile in RE2"),
    ],
    ids=str,
)
def test_refusals(options, reason):
    with pytest.raises(AdapterRefused, match=reason):
        targeted(options, ODD)


def test_a_pattern_that_makes_pythons_engine_hang_is_linear():
    long = "a" * 5000
    shapes = Shapes({long: ModuleShape("linear", 2, 2)}, 1, 1, 1, 1, 1)
    with pytest.raises(AdapterRefused, match="matches no module"):
        targeted({"target_modules": "(a|a)*b|(a+)+c"}, shapes)
