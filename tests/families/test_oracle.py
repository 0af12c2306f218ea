"""Every kind and option on every architecture: the compiled adapter equals PEFT's own layers, module by module."""

import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import zoo
from adapter_server.families import find
from adapter_server.families.facts import ModelBase, describe

AT_MODULES = [(arch, case) for arch, case in zoo.PAIRS if case not in zoo.UNFOLDABLE]


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices are tiny: threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def made(arch: str, case: str) -> Path:
    """A folder with the adapter, made once a test run."""
    folder = Path(tempfile.mkdtemp(prefix="adapter-"))
    zoo.save_adapter(lambda: zoo.tiny_base(arch), zoo.ADAPTERS[case](zoo.tiny_base(arch)), folder)
    return folder


def saved(arch: str, case: str, folder: Path):
    shutil.copytree(made(arch, case), folder, dirs_exist_ok=True)
    return zoo.tiny_base(arch), *zoo.read(folder)


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
    assert adapter.patches
    assert zoo.differences(base, adapter, zoo.load_peft(zoo.tiny_base(arch), tmp_path)) == {}
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
        assert zoo.same(embeds, oracle.get_prompt(batch_size=1, task_ids=torch.tensor([task]))[0])
