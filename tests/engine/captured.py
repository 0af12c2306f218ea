"""What the tests of captured steps share: an engine on the CPU that runs as on CUDA.

Attention and the choice of a token are their kernels' lines of torch here; the low rank is interpreted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rig
from adapter_server.core import Request
from adapter_server.engine import Engine, forms, kernels, proofs


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


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    nouns = {name: getattr(kernels, name) for name in ("Rows", "Form", "Chunks", "QUERIES")}
    said = SimpleNamespace(paged_decode=paged_decode, paged_prefill=paged_prefill, pick=pick, **nouns)
    monkeypatch.setattr(forms, "usable", lambda device: True)
    monkeypatch.setattr(forms, "_low_rank_agrees", lambda *_: True)  # test_kernels.py holds it
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
