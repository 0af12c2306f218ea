"""The `peft` lane: rows that a real PeftModel computes, one token at a time, beside the packed rows.

    base's modules ── copied once, bare ──> a tree an adapter, on the very same weights ── PEFT's layers ──> its rows

A tree is a second set of modules whose parameters share the base's memory, so that an adapter costs what PEFT adds and
no more. Each adapter has a tree of its own: there is nothing to switch, and no adapter's state reaches another's rows.
A row's tokens come out of transformers' own `generate`, which is paused after each one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from adapter_server.engine.placed import Placed
from adapter_server.errors import AdapterRefused, AdapterServerError, InvalidRequest
from adapter_server.families import fallback, unipelt
from adapter_server.families.base import Adapter, Graft

ROOM = 256 << 20  # bytes that PEFT may allocate while it loads, beside what base and file hold
Tokens = Generator[Tensor, int, None]  # yields logits [1, vocab], is sent the token that was chosen


class Trees:
    """Copies of the base's modules on the base's own weights. Made before any module of the base becomes a site."""

    def __init__(self, module: PreTrainedModel) -> None:
        self._base = module
        self._bare: PreTrainedModel | None = None
        self._fault: Exception | None = None
        try:
            self._bare = copy.deepcopy(module, _kept(module))
        except Exception as error:  # a module that cannot be copied takes nothing from the other lanes
            self._fault = error

    def fresh(self) -> PreTrainedModel:
        """A tree: parameters of its own objects, so that replacing one replaces it here alone, and shared memory.

        Raises AdapterRefused where the base's modules are such that they cannot be copied.
        """
        if self._bare is None:
            raise AdapterRefused(f"the base's modules cannot be copied, so it has no peft lane ({self._fault!r})")
        memo = _kept(self._base)
        for param in self._base.parameters():
            if type(param) is nn.Parameter:
                memo[id(param)] = nn.Parameter(param.detach(), requires_grad=False)
        return copy.deepcopy(self._bare, memo)

    def place(self, adapter: Adapter) -> Placed:
        """PEFT's model over a fresh tree. Raises AdapterRefused, NotMergeable. Called on a loader's thread."""
        graft, name = adapter.graft, adapter.spec.name
        if graft is None:
            raise RuntimeError(f"{name} is no graft")
        storages = {_storage(t) for t in _tensors(self._base)}
        with refusing(name), Sentry(storages, self._room(graft)), torch.no_grad():
            model = (unipelt if graft.hooked else fallback).attach(self.fresh(), graft)
            model = fallback.merged(model, name) if graft.merged else model
        bare = replace(graft, tensors={}, experts=())
        tree = Tree(model, bare, sum(storages_of(model, storages).values()))
        with refusing(name), Sentry(storages, math.inf), torch.inference_mode():
            Decode(tree, [0, 0], 0 if graft.tasks else None).logits([0, 0])
        return Placed(replace(adapter, graft=bare), {}, {}, tree=tree)

    def _room(self, graft: Graft) -> float:
        own = sum(t.nbytes for g in (graft, *graft.experts) for t in g.tensors.values())
        return sum(t.nbytes for t in _tensors(self._base)) + 16 * own + ROOM


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A PeftModel, a merged or hooked model or the plain base, ready to run rows."""

    model: Any
    graft: Graft | None = None  # None: the base
    bytes: int = 0  # beyond the base's own

    @property
    def peft(self) -> bool:
        return self.graft is not None and not self.graft.merged and not self.graft.hooked

    @property
    def caches(self) -> bool:
        """Whether keys and values of before are still right when a token is added."""
        return self.graft is None or not self.graft.hooked

    @property
    def inner(self) -> Any:
        """transformers' own model, PEFT's layers inside."""
        return self.model.get_base_model() if self.peft else self.model

    def check(self, weight: float, task_id: int | None) -> None:
        """Raises InvalidRequest where a weight has no meaning, or a task is needed."""
        if (tasks := self.graft.tasks if self.graft else 0) and (task_id is None or task_id >= tasks):
            raise InvalidRequest(f"task_id must be 0 to {tasks - 1} for this adapter", param="task_id")
        if weight != 1 and not (self.graft is not None and self.graft.scalable):
            kind = self.graft.kind if self.graft else "the base"
            raise InvalidRequest(f"scale has no meaning for {kind} in the peft lane: leave it out", param="scale")

    def release(self) -> None:
        """Let go of all tensors now: PEFT's modules refer to each other, and would wait for the garbage collector."""
        for module in self.model.modules():
            module._parameters.clear()
            module._buffers.clear()
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    @contextmanager
    def running(self, options: Mapping[str, Any], weight: float) -> Iterator[None]:
        """What PEFT sets up around a forward, and a row's own scale."""
        with ExitStack() as stack:
            if self.peft and self.graft is not None and not self.graft.before_the_prompt:
                stack.enter_context(fallback.hooks(self.model, options))
            if weight != 1:
                stack.enter_context(_scaled(self.model, weight))
            yield


class Decode:
    """One row's `generate`, token by token. Keeps its own past, so that a row that made room for others goes on."""

    def __init__(self, tree: Tree, prompt: Sequence[int], task_id: int | None, weight: float = 1.0) -> None:
        self.tree, self.weight = tree, weight
        ids = torch.tensor([prompt], device=tree.inner.device)
        self._options: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if tree.graft is not None and tree.graft.tasks:
            self._options["task_ids"] = torch.tensor([task_id], device=ids.device)
        self._tokens: Tokens | None = None

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[1, vocab] after `tokens`, of which the last is new to it, or which are the prompt."""
        if self._tokens is None:
            self._tokens = self._begin()
            with self.tree.running(self._options, self.weight):
                return next(self._tokens)
        with self.tree.running(self._options, self.weight):
            return self._tokens.send(tokens[-1])

    def _begin(self) -> Tokens:
        """`generate` makes everything ready (encoder, caches, prompts) and hands over to `_tokens`."""
        with _scaled(self.tree.model, self.weight):
            tokens: Tokens = self.tree.model.generate(
                **self._options, custom_generate=_tokens, do_sample=False, num_beams=1,
                use_cache=self.tree.caches, max_new_tokens=1, pad_token_id=0,
            )  # fmt: skip
        if self.tree.peft:  # generate has put back the base's own: a paused one needs PEFT's
            self.tree.model.base_model.prepare_inputs_for_generation = self.tree.model.prepare_inputs_for_generation
        return tokens


def _tokens(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
) -> Tokens:
    """The loop of transformers' greedy search (`generation/utils.py`, `_sample`), the choice left to whoever reads."""
    for mode in ("synced_gpus", "streamer", "assistant_model"):
        kwargs.pop(mode, None)
    out = model._prefill(input_ids, generation_config, kwargs)
    while True:
        kwargs = model._update_model_kwargs_for_generation(
            out, kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        logits = out.logits[:, -1].float().clone()
        del out
        chosen = yield logits
        input_ids = torch.cat([input_ids, torch.tensor([[chosen]], device=input_ids.device)], -1)
        new = 1 if kwargs.get("use_cache") else None
        out = model(
            **model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **kwargs), return_dict=True
        )


class Sentry(TorchDispatchMode):
    """Lets nothing write to the base's memory, and nothing allocate more than a load can need."""

    def __init__(self, protected: set[int], room: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._protected, self._room = protected, room

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check_write(value)
        if args and isinstance(args[0], list | tuple) and all(type(n) is int for n in args[0]):
            self._room -= math.prod(args[0]) * 4
            if self._room < 0:
                raise AdapterRefused("its config asks for far more memory than its file holds")
        return func(*args, **kwargs)

    def _check_write(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.device.type != "meta" and _storage(value) in self._protected:
            raise AdapterRefused("loading it would write to a weight of the base; a sound adapter does not")


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Whatever PEFT says of a file is a refusal of that file."""
    try:
        yield
    except AdapterServerError:
        raise
    except Exception as error:
        raise AdapterRefused(f"{name}: PEFT does not load it over this base ({str(error)[:300]})") from error


def storages_of(model: nn.Module, but: set[int]) -> dict[int, int]:
    """Bytes by storage of a model's tensors, without those of `but`."""
    return {_storage(t): t.untyped_storage().nbytes() for t in _tensors(model) if _storage(t) not in but}


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _kept(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy under which no tensor is copied, nor what bitsandbytes keeps beside its weights."""
    memo: dict[int, Any] = {id(t): t for t in _tensors(module)}
    for owner in [*module.modules(), *module.parameters()]:
        for value in vars(owner).values():
            if type(value).__module__.startswith("bitsandbytes"):
                memo[id(value)] = value
    return memo


@contextmanager
def _scaled(model: Any, weight: float) -> Iterator[None]:
    """Every term of the adapter times `weight`: PEFT's own `scaling`, put back as it was."""
    tables = (
        [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)] if weight != 1 else []
    )
    before = [dict(table) for table in tables]
    for table in tables:
        table.update({name: scale * weight for name, scale in table.items()})
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.update(old)
