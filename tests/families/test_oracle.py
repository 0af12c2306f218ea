"""Every kind and option on every architecture: the compiled adapter equals PEFT's own layers, module by module."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import zoo
from adapter_server.families import find
from adapter_server.families.base import ModuleShape, linear_params
from adapter_server.families.facts import ModelBase, describe

TOLERANCE = 1e-5  # float32, relative to the largest output
VIRTUAL = ("prefix", "prefix_projected", "cartridge", "prompt", "ptuning", "cpt", "multitask")
AT_MODULES = [(arch, case) for arch, case in zoo.PAIRS if case not in VIRTUAL]


def saved(arch: str, case: str, folder: Path):
    base = zoo.tiny_base(arch)
    zoo.save_adapter(lambda: zoo.tiny_base(arch), zoo.ADAPTERS[case](base), folder)
    return base, *zoo.read(folder)


def inputs(shape: ModuleShape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if shape.kind == "embedding":
        return torch.randint(shape.inp, (3, 7), generator=generator)
    width = shape.inp if shape.kind != "other" else shape.params["weight"][-1]
    return torch.randn(3, 7, width, generator=generator)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() <= TOLERANCE * right.abs().max())


def folded(patch, x: torch.Tensor, path: str, base) -> torch.Tensor:
    """The output at x with the patch folded into the module's parameters."""
    module, shape = base.get_submodule(path), describe(base).modules[path]
    params = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    if shape.kind in ("linear", "conv1d"):
        params["weight"] = linear_params(module)[0].detach().clone()
        new = patch.fold(params)
        return F.linear(x, new["weight"], new.get("bias"))
    return torch.func.functional_call(module, patch.fold(params), (x,))


@pytest.mark.parametrize(("arch", "case"), zoo.PAIRS)
def test_expects_exactly_what_peft_saves(arch, case, tmp_path):
    base, spec, tensors = saved(arch, case, tmp_path)
    shapes = describe(base.to("meta"))
    expected = find(spec.family).expected(spec.config, shapes, frozenset(tensors))
    assert dict(expected) == {name: tuple(t.shape) for name, t in tensors.items()}


@torch.no_grad()
@pytest.mark.parametrize(("arch", "case"), AT_MODULES)
def test_equals_peft_at_every_module(arch, case, tmp_path):
    base, spec, tensors = saved(arch, case, tmp_path)
    before = {name: p.clone() for name, p in base.named_parameters()}
    adapter = find(spec.family).load(spec, tensors, ModelBase(base))
    oracle = zoo.load_peft(zoo.tiny_base(arch), tmp_path).base_model.model
    changed = 0
    for path, shape in describe(base).modules.items():
        x, module, patch = inputs(shape), base.get_submodule(path), adapter.patches.get(path)
        want = oracle.get_submodule(path)(x)
        assert same(module(x) if patch is None else patch.apply(x, module), want), path
        assert patch is None or same(folded(patch, x, path, base), want), path
        changed += not same(module(x), want)
    assert changed
    assert changed == len(adapter.patches)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("case", ["prefix", "prefix_projected", "cartridge"])
@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_prefix_equals_the_cache_that_peft_makes(arch, case, tmp_path):
    base, spec, tensors = saved(arch, case, tmp_path)
    adapter = find(spec.family).load(spec, tensors, ModelBase(base))
    cache = zoo.load_peft(zoo.tiny_base(arch), tmp_path).get_prompt(batch_size=1)
    assert adapter.prefix is not None
    assert len(adapter.prefix) == len(cache.layers) == base.config.num_hidden_layers
    for (keys, values), layer in zip(adapter.prefix, cache.layers, strict=True):
        assert torch.equal(keys.transpose(0, 1), layer.keys[0])
        assert torch.equal(values.transpose(0, 1), layer.values[0])
    assert not adapter.foldable


@torch.no_grad()
@pytest.mark.parametrize("case", ["prompt", "ptuning", "cpt"])
@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_embeds_equal_the_prompt_that_peft_makes(arch, case, tmp_path):
    base, spec, tensors = saved(arch, case, tmp_path)
    adapter = find(spec.family).load(spec, tensors, ModelBase(base))
    want = zoo.load_peft(zoo.tiny_base(arch), tmp_path).get_prompt(batch_size=1)[0]
    assert torch.equal(adapter.embeds, want)


@torch.no_grad()
@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_tasks_equal_the_prompts_that_peft_makes(arch, tmp_path):
    base, spec, tensors = saved(arch, "multitask", tmp_path)
    adapter = find(spec.family).load(spec, tensors, ModelBase(base))
    oracle = zoo.load_peft(zoo.tiny_base(arch), tmp_path)
    assert len(adapter.tasks) == 3
    for task, embeds in enumerate(adapter.tasks):
        assert same(embeds, oracle.get_prompt(batch_size=1, task_ids=torch.tensor([task]))[0])
