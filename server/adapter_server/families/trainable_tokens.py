"""Trained rows of the embedding (PEFT `tuners/trainable_tokens/layer.py`); a tied head changes with them.

E' = E, but E'[indices] = rows      rows [n, hidden], the new ones and not what is added
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, AnyPatch, Base, Family, Patch, Shapes, TokensPatch
from adapter_server.families.deltas import Rows
from adapter_server.families.options import Config, as_integer, check_known
from adapter_server.families.parts import ROOT, Expected, Taker
from adapter_server.families.targets import targeted

KNOWN = frozenset({"init_weights", "target_modules", "token_indices"})
ROWS = "trainable_tokens_delta"


class TrainableTokens:
    name = "TRAINABLE_TOKENS"
    slow = True

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        tokens = _resolve(config, shapes)
        return {f"{ROOT}{path}.{ROWS}": (len(indices), shapes.hidden) for path, indices in tokens.items()}

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        tokens, take = _resolve(spec.config, base.shapes), Taker(tensors)
        rows = {path: take(f"{ROOT}{path}.{ROWS}") for path in tokens}
        take.done()
        first = next(iter(rows.values()))
        if len(rows) > 1 and not all(torch.equal(first, other) for other in rows.values()):
            raise AdapterRefused("the file gives the tied embedding and head different rows")
        return Adapter(spec, {path: with_rows(rows[path], path, tokens[path], base) for path in tokens})


def with_rows(rows: Tensor, path: str, indices: list[int], base: Base) -> AnyPatch:
    """The rows alone: an embedding, or its tied head, is never copied for a few tokens."""
    index, order = torch.tensor(indices).sort()
    rows, shape = rows[order], base.shapes.modules[path]
    if shape.kind == "embedding":
        return TokensPatch(index, rows, base.shapes.scaled_embeddings.get(path, 1.0))
    return Patch(delta=Rows(index, rows - base.weight(path)[index], shape.out))


def token_indices(value: Any, key: str, path: str, shapes: Shapes) -> list[int]:
    """Distinct tokens of the module's vocabulary."""
    shape = shapes.modules[path]
    rows = shape.inp if shape.kind == "embedding" else shape.out if shape.kind == "linear" else 0
    if not rows:
        raise AdapterRefused(f"adapter_config.json: '{key}' names {path}, which has no rows of tokens")
    if not isinstance(value, list) or not value:
        raise AdapterRefused(f"adapter_config.json: '{key}' must list the tokens that were trained")
    indices = [as_integer(i, key, 0, rows - 1) for i in value]
    if len(set(indices)) != len(indices):
        raise AdapterRefused(f"adapter_config.json: '{key}' names a token twice")
    return indices


def _resolve(config: Config, shapes: Shapes) -> dict[str, list[int]]:
    """{module: its trained tokens}, the head among them where it is tied to the embedding."""
    check_known(config, KNOWN)
    paths = targeted(config, shapes)
    if shapes.tied and shapes.embed in paths:
        paths = list(dict.fromkeys([*paths, shapes.head]))
    return {path: token_indices(config.get("token_indices"), "token_indices", path, shapes) for path in paths}


FAMILY: Family = TrainableTokens()
