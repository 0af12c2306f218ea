"""The frame of the kinds that wrap Linears: a kind's own file says which tensors a module has, and what patch they are.

Targets, trained biases, modules saved whole, copies of embeddings and strictness are the same for all and stand here.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, AnyPatch, Base, ModuleShape, Patch, Shapes, Skills
from adapter_server.families.deltas import sparse
from adapter_server.families.options import Config, check_known, integer, refuse_set, table
from adapter_server.families.parts import (
    LINEAR,
    ROOT,
    Expected,
    Taker,
    base_bias,
    bias_patch,
    biases_expected,
    copies_expected,
    override,
    refuse_overlap,
    saved_expected,
    saved_patch,
    take_copies,
    trained_biases,
)
from adapter_server.families.targets import by_pattern, saved_modules, targeted

NARROW = frozenset({"modules_to_save", "target_modules"})
TARGETS = NARROW | {"exclude_modules", "layers_pattern", "layers_to_transform"}  # which modules, for most kinds


@dataclass(frozen=True, slots=True)
class Wrapped:
    """One wrapped module: its place among all of them, its shape, and the config with what patterns say of it."""

    path: str
    index: int
    shape: ModuleShape
    config: Config

    @property
    def inp(self) -> int:
        return self.shape.inp

    @property
    def out(self) -> int:
        return self.shape.out

    def rank(self, key: str = "r", default: int = 8) -> int:
        """A rank no larger than what the module can use: small files must not unfold into large matrices."""
        return integer(self.config, key, default, most=max(1024, self.inp, self.out))

    def parts(self, width: int, by: int, key: str) -> int:
        """width / by, which must be whole."""
        if width % by:
            raise AdapterRefused(f"adapter_config.json: '{key}' is {by}, which does not divide {width} at {self.path}")
        return width // by


@dataclass(frozen=True, slots=True)
class Reader:
    """One wrapped module's tensors in the file, and the base's beneath them, in float32."""

    path: str
    take: Taker
    base: Base
    copy: Tensor | None  # the weight, where the file holds a copy that differs from the base's
    trained: Tensor | None  # the bias, where it was trained

    def __call__(self, name: str) -> Tensor:
        return self.take(f"{ROOT}{self.path}.{name}")

    def integers(self, name: str, below: int) -> Tensor:
        return self.take.integers(f"{ROOT}{self.path}.{name}", below)

    def weight(self) -> Tensor:
        """[out, in]"""
        return self.base.weight(self.path) if self.copy is None else self.copy

    def bias(self) -> Tensor | None:
        return self.base.bias(self.path) if self.trained is None else self.trained


class Wrapping:
    """A kind that wraps Linears. A kind whose `slow` is true reads base weights, or decomposes them."""

    name: str
    known: frozenset[str]  # the config's keys
    slow = False
    conv1d = False  # whether PEFT applies it to GPT-2's Conv1D as well
    patterns: Mapping[str, str] = {}  # config key of a table of patterns: the key that it sets at a module
    refused: Mapping[str, str] = {}  # config key that must not be set: what to do instead

    @abstractmethod
    def tensors(self, at: Wrapped) -> Expected:
        """The module's own tensors, by the end of their name."""

    @abstractmethod
    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch | Skills:
        """The module's patch, or what each task mixes its own from. `common` is what `common` returned."""

    def shared(self, config: Config, wrapped: list[Wrapped]) -> Expected:
        """Tensors that belong to no single module, by their whole name."""
        return {}

    def common(self, config: Config, wrapped: list[Wrapped], take: Taker) -> Any:
        """What all modules' patches are made from."""

    def per_module(self, config: Config, shapes: Shapes, paths: list[str]) -> list[Config]:
        """Each module's config: PEFT's pattern tables applied (`utils/other.py`, `get_pattern_key`)."""
        lookups = {
            key: by_pattern(config, name, table(config, name), config.get(key)) for name, key in self.patterns.items()
        }
        found = [{key: value for key, look in lookups.items() if (value := look(path)) is not None} for path in paths]
        return [{**config, **own} for own in found]

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        wrapped, saved, biases = self._resolve(config, shapes)
        keys = {f"{ROOT}{at.path}.{name}": shape for at in wrapped for name, shape in self.tensors(at).items()}
        copies = copies_expected((at.path for at in wrapped), shapes, names)
        whole = saved_expected(saved, shapes) | biases_expected(biases, shapes)
        return keys | self.shared(config, wrapped) | copies | whole

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        wrapped, saved, biases = self._resolve(spec.config, base.shapes)
        take, paths = Taker(tensors), [at.path for at in wrapped]
        copies = take_copies(take, paths, base)
        patches: dict[str, AnyPatch] = {
            path: override(w, base.shapes.modules[path]) for path, w in copies.items() if path not in paths
        }
        common, skills = self.common(spec.config, wrapped, take), {}
        for at in wrapped:
            read = Reader(at.path, take, base, copies.get(at.path), _trained(take, at.path, biases))
            made = self.patch(at, read, common)
            if isinstance(made, Skills):
                skills[at.path] = made
            else:
                patches[at.path] = _complete(made, read)
        for path in saved:
            patches[path] = saved_patch(take, path, base)
        for path in biases.keys() - set(paths):
            patches[path] = bias_patch(take(biases[path]), path, base)
        take.done()
        return Adapter(spec, patches, skills=skills)

    def _resolve(self, config: Config, shapes: Shapes) -> tuple[list[Wrapped], list[str], dict[str, str]]:
        """The modules that are wrapped, those saved whole, and {module: key} of the biases that were trained."""
        check_known(config, self.known)
        refuse_set(config, self.refused)
        paths, saved = targeted(config, shapes), saved_modules(config, shapes)
        refuse_overlap(paths, saved)
        kinds = LINEAR if self.conv1d else ("linear",)
        wrong = next((path for path in paths if shapes.modules[path].kind not in kinds), None)
        if wrong is not None:
            raise AdapterRefused(
                f"adapter_config.json: 'target_modules' names {wrong}, which {self.name} does not apply to"
            )
        own = self.per_module(config, shapes, paths)
        wrapped = [Wrapped(p, i, shapes.modules[p], c) for i, (p, c) in enumerate(zip(paths, own, strict=True))]
        mode = config.get("bias", "none") if "bias" in self.known else "none"
        return wrapped, saved, trained_biases(mode, shapes, paths, saved)


def low_rank(A: Tensor, B: Tensor, read: Reader) -> Patch:
    """B A as it is, or as a replaced weight where its rank is so high that this is cheaper.  [r,in] [out,r]"""
    rank, (inp, out) = A.shape[0], (A.shape[1], B.shape[0])
    return Patch(A=A, B=B) if 2 * rank <= min(inp, out) else Patch(weight=read.weight() + B @ A)


def added(dense: Tensor, read: Reader) -> Patch:
    """ΔW [out, in] by its numbers that are not zero, or as a replaced weight where they are many."""
    few = sparse(dense)
    return Patch(weight=read.weight() + dense) if few is None else Patch(delta=few)


def _trained(take: Taker, path: str, biases: Mapping[str, str]) -> Tensor | None:
    """The module's own bias as the file has it, trained or copied along."""
    key = biases.get(path, f"{ROOT}{path}.base_layer.bias")
    return take(key) if path in biases or key in take else None


def _complete(patch: Patch, read: Reader) -> Patch:
    """With the trained bias and the copied weight, and certainly finite."""
    if read.trained is not None:
        more = read.trained - base_bias(read.base, read.path)
        patch = dataclasses.replace(patch, bias=more if patch.bias is None else patch.bias + more)
    if patch.weight is None and read.copy is not None:
        patch = dataclasses.replace(patch, weight=read.copy)
    if not all(bool(torch.isfinite(t).all()) for t in patch.tensors()):
        raise AdapterRefused(f"{read.path}: the adapter's numbers give weights that are not finite; save a sound step")
    return patch
