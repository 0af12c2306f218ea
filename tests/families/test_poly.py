"""Skills that tasks mix: each task's patch equals PEFT's layer for that task."""

from pathlib import Path

import pytest
import torch

import zoo
from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families import find, tasks
from adapter_server.families.facts import ModelBase, describe

POLY = find("POLY")


@torch.no_grad()
@pytest.mark.parametrize(("arch", "case"), [("llama", "poly"), ("qwen2", "poly"), ("llama", "poly_split")])
def test_each_task_equals_pefts_layer(arch: str, case: str, tmp_path: Path) -> None:
    zoo.save_adapter(lambda: zoo.tiny_base(arch), zoo.ADAPTERS[case](zoo.tiny_base(arch)), tmp_path)
    base, (spec, tensors) = zoo.tiny_base(arch), zoo.read(tmp_path)
    adapter = POLY.load(spec, tensors, ModelBase(base))
    oracle = zoo.load_peft(zoo.tiny_base(arch), tmp_path).base_model.model
    assert tasks(spec) == adapter.tasks_known == spec.config["n_tasks"]
    assert adapter.rank == spec.config["r"]
    for task in range(adapter.tasks_known):
        for path, patch in adapter.mixed(task).patches.items():
            x = zoo.inputs(describe(base).modules[path])
            want = oracle.get_submodule(path)(x, task_ids=torch.full((len(x),), task))
            assert zoo.same(patch.apply(x, base.get_submodule(path)), want), (path, task)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n_splits": 5}, "'n_splits' is 5, which does not divide 32"),
        ({"n_tasks": 0}, "'n_tasks' must be an integer"),
        ({"n_skills": "4"}, "'n_skills' must be an integer"),
        ({"poly_type": "mhr"}, "'poly_type' must be one of"),
        ({"r": 4096}, "'r' must be an integer"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, object], reason: str) -> None:
    config = {"peft_type": "POLY", "target_modules": ["q_proj"], "r": 4} | options
    with pytest.raises(AdapterRefused, match=reason):
        POLY.expected(config, describe(zoo.tiny_base("llama")), frozenset())


def test_a_kind_without_tasks_has_none() -> None:
    assert tasks(Spec("a", "0" * 12, "", "LORA", {"n_tasks": 3}, 0)) == 0
    assert tasks(Spec("a", "0" * 12, "", "POLY", {}, 0)) == 1
