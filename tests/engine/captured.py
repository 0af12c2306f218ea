"""What the tests of captured steps share: an engine on the CPU that runs as on CUDA.

Kernels are their lines of torch here, which read what the tables name by its address; `test_kernels.py` and
`test_parts.py` hold the kernels to the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rig
from adapter_server.core import Request
from adapter_server.engine import forms, kernels, proofs
from adapter_server.engine.engine import Engine
from adapter_server.engine.routing import Step

ACTIVATIONS = {0: F.silu, 1: F.gelu, 2: lambda x: F.gelu(x, approximate="tanh"), 3: F.relu, 4: torch.tanh}


def seen(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, page: int, length: int, form: object) -> Tensor:
    """q [heads, dim] over the first `length` positions of a row's pages → [heads, dim_v]."""
    at = torch.arange(length)
    places = pages[at // page].long() * page + at % page
    k, v = (t[places].repeat_interleave(q.shape[0] // t.shape[1], 1) for t in (keys, values))
    return proofs._attention(q, k, v, form)  # type: ignore[arg-type]


def paged_decode(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, rows: Any, form: object) -> None:
    for i, token in enumerate(rows.tokens.tolist()):
        out[token] = seen(q[:, token], keys, values, rows.table[i], rows.page, int(rows.lengths[i]), form)


def paged_prefill(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, chunks: Any, form: object) -> None:
    for row, first, count, past in chunks.tiles.tolist():
        for i in range(count):
            pages = chunks.table[row]
            out[first + i] = seen(q[:, first + i], keys, values, pages, chunks.page, past + i + 1, form)


def pick(logits: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = logits.float().max(-1)
    return ids, best


def named(address: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a table names."""
    size = max(1, torch.Size(shape).numel()) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel()).view(shape)


def held(tiles: Any, table: Tensor) -> Iterator[tuple[int, int, float, Tensor, int]]:
    """Each pair: (its number, token, weight, its adapter's row of the table, whether its vectors are added)."""
    for run in tiles.runs:
        for slot, first, count, sole in tiles.places[run.start : run.stop].tolist():
            for i in range(first, first + count):
                yield i, int(tiles.tokens[i]), float(tiles.weights[i]), table[slot], sole


def added(x: Tensor, y: Tensor | None, row: list[int], outs: list[tuple[int, int]], sole: int, weight: float) -> Tensor:
    """w · (mul · y + add + B (A x)) of one token."""
    total = torch.zeros(sum(out for out, _ in outs))
    if row[0]:
        small = named(row[0], row[1], len(x)) @ x * weight
        for m, (out, to) in enumerate(outs):
            Bt, above, rank = row[4 + 3 * m : 7 + 3 * m]
            if rank:
                total[to : to + out] += small[above : above + rank] @ named(Bt, rank, out)
    for vector, times in ((row[2], y), (row[3], torch.ones(()))):
        if vector and sole and times is not None:
            total += weight * times * named(vector, len(total))
    return total


def outs_of(outputs: Any) -> list[tuple[int, int]]:
    """(width, place) of each member."""
    each = {(member, out, to - begin) for member, begin, out, to in outputs.blocks.tolist()}
    return [(out, to) for _, out, to in sorted(each)]


def add_low_rank(y: Tensor, x: Tensor, tiles: Any, table: Tensor, outputs: Any, _: torch.dtype) -> None:
    for _, token, weight, row, sole in held(tiles, table):
        entry = row[outputs.at :].tolist()
        y[token] += added(x[token], y[token], entry, outs_of(outputs), sole, weight)


def low_rank(more: Tensor, x: Tensor, tiles: Any, table: Tensor, outputs: Any, _: torch.dtype) -> None:
    for _, token, weight, row, sole in held(tiles, table):
        more[token] = added(x[token], None, row[outputs.at :].tolist(), outs_of(outputs), sole, weight)


def fields(owners: Any, at: int) -> Iterator[tuple[int, float, list[int]]]:
    """(token, weight, the table from a column on) of each token that is somebody's."""
    for token, owner in enumerate(owners.rows.tolist()):
        if owner >= 0:
            yield token, float(owners.weights[token]), owners.table[owner, at:].tolist()


def own_rows(base: Tensor, owners: Any, at: int, _: torch.dtype) -> Tensor:
    out = base.repeat(len(owners.rows), 1)
    for token, weight, [own, *_] in fields(owners, at):
        out[token] += weight * (named(own, len(base)) - base) if own else 0
    return out


def inputs(x: Tensor, owners: Any, scale_at: int, turn_at: int, held: torch.dtype) -> Tensor:
    out, turns = x.clone(), {token: entry for token, _, entry in fields(owners, turn_at)}
    for token, weight, [shift, *_] in fields(owners, scale_at):
        R, size, step = turns[token][:3]
        if R:
            blocks = named(R, len(x[token]) // size if step else 1, size, size)
            out[token] += weight * ((x[token].view(-1, 1, size) @ blocks).flatten() - x[token])
        elif shift:
            out[token] += weight * x[token] * named(shift, len(x[token]))
    return out


def mirrored(y: Tensor, owners: Any, blocks: Tensor, at: int, *_: object) -> Tensor:
    more, outs = torch.zeros(y.shape), outs_of(SimpleNamespace(blocks=blocks))
    for token, weight, entry in fields(owners, at):
        for m, (out, to) in enumerate(outs):
            index, factor = entry[kernels.EACH * m : kernels.EACH * m + 2]
            if index:
                own = y[token, to : to + out][named(index, out, dtype=torch.int64)]
                more[token, to : to + out] = weight * named(factor, out) * own
    return more


def add_sparse(y: Tensor, x: Tensor, owners: Any, at: int, _: torch.dtype) -> None:
    for token, weight, [first, columns, values, *_] in fields(owners, at):
        if first:
            starts = named(first, y.shape[1] + 1, dtype=torch.int32)
            n = int(starts[-1])
            rows = torch.arange(y.shape[1]).repeat_interleave(starts.diff().long())
            parts = named(values, n) * x[token, named(columns, n, dtype=torch.int32).long()]
            y[token].index_add_(0, rows, weight * parts)


def own_product(y: Tensor, x: Tensor, tiles: Any, table: Tensor, at: int, _: torch.dtype) -> None:
    for _, token, weight, row, _ in held(tiles, table):
        W, b = row[at : at + 2].tolist()
        if W:
            bias = named(b, y.shape[1]) if b else None
            y[token] += weight * (F.linear(x[token], named(W, y.shape[1], x.shape[1]), bias) - y[token])


def hidden(y: Tensor, r: Tensor, tiles: Any, table: Tensor, at: int, width: int, _: torch.dtype) -> Tensor:
    h = torch.full((len(tiles.tokens), width), torch.nan)
    for i, token, _, row, _ in held(tiles, table):
        down, bias, _, _, d, act, of_y, of_r, _ = row[at : at + 9].tolist()
        if down:
            z = of_y * y[token] + of_r * r[token]
            h[i, :d] = ACTIVATIONS[act](F.linear(z, named(down, d, len(z)), named(bias, d)))
    return h


def add_hidden(y: Tensor, r: Tensor, h: Tensor, tiles: Any, table: Tensor, at: int, _: torch.dtype) -> None:
    for i, token, weight, row, _ in held(tiles, table):
        _, _, up, bias, d, _, _, _, again = row[at : at + 9].tolist()
        if up:
            n = y.shape[1]
            y[token] += weight * (F.linear(h[i, :d], named(up, n, d), named(bias, n)) + again * r[token])


LINES = (
    *(add_low_rank, low_rank, own_rows, inputs, mirrored, add_sparse, own_product, hidden, add_hidden),
    *(paged_decode, paged_prefill, pick),
)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace(**vars(kernels) | {line.__name__: line for line in LINES})
    monkeypatch.setattr(forms, "kernels", lambda: said)
    monkeypatch.setattr(forms, "usable", lambda device: True)
    for agrees in ("_low_rank_agrees", "_parts_agree"):
        monkeypatch.setattr(forms, agrees, lambda *_: True)
    monkeypatch.setattr(forms, "attending", lambda *_, **__: said)
    monkeypatch.setattr(forms, "drawing", lambda *_: proofs.drawn)


def served(names: tuple[str, ...] = (), **settings: object) -> Engine:
    return rig.engine(
        "llama", names, **{"kv_layout": "pages", "page_tokens": 4, "fuse": False, "max_rows": 8, **settings}
    )


def ask(engine: Engine, name: str | None, i: int = 0, new: int = rig.NEW, **sampling: object) -> Request:
    return rig.ask(engine, name, rig.PROMPTS[i], max_new_tokens=new, **{"logprobs": 0, **sampling})


def right(name: str | None, i: int = 0, new: int = rig.NEW) -> list[int]:
    return list(rig.peft_alone("llama", name, rig.PROMPTS[i], new)[0])


def uncaptured(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Whose steps ran without a graph from now on, step by step: a graph's forward names nobody."""
    forward, found = engine.model.forward, []

    def seen(step: Step, *args: Tensor) -> Tensor:
        if step.routing.segments:
            found.append({segment.placed.adapter.spec.name for segment in step.routing.segments})
        return forward(step, *args)

    monkeypatch.setattr(engine.model, "forward", seen)
    return found
