"""The table of kinds in docs/adapters.md, made from what each kind's file compiles to."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import beyond
import rig
import zoo
from adapter_server.families import fallback, find, known, unipelt
from adapter_server.families.base import SCALABLE, Adapter, Patch
from adapter_server.families.facts import ModelBase

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
PLACE = re.compile(r"<!-- kinds -->\n.*?<!-- /kinds -->", re.DOTALL)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
HEAD = ("kind", "form", "lane", "mixed", "merged", "composed", "scale", "bytes", "cost")
WORDS = {  # what a patch's field is called
    "A": "low rank",
    "gain": "vectors",
    "in_scale": "vectors",
    "out_scale": "vectors",
    "bias": "biases",
    "weight": "whole weights",
    "turn": "rotation",
    "mirror": "pairs turned",
}
DELTAS = {
    "Sparse": "sparse ΔW",
    "Spectral": "coefficients of ΔW",
    "Kronecker": "Kronecker product",
    "Circulant": "circulant blocks",
    "Rows": "rows of tokens",
    "Scaled": "vectors around shared matrices",
}
PLACES = {  # the same of an adapter's
    "prefix": "keys and values",
    "embeds": "soft prompt",
    "tasks": "soft prompt per task",
    "skills": "low rank per task",
    "blocks": "network behind a block",
    "gated": "attention of its own",
}


@functools.cache
def cases() -> dict[str, tuple[str, str]]:
    """{kind of PEFT's: (architecture, its first case)}."""
    bases = {arch: zoo.tiny_base(arch) for arch in zoo.ARCHS}
    found: dict[str, tuple[str, str]] = {}
    for name, made in zoo.ADAPTERS.items():
        arch = "llama" if "llama" in made.archs else made.archs[0]
        found.setdefault(made(bases[arch]).peft_type.value, (arch, name))
    return found


def folder(kind: str) -> tuple[str, Path]:
    """(architecture, folder) of one adapter of a kind."""
    if kind in beyond.KINDS:
        case, root = beyond.KINDS[kind], Path(tempfile.mkdtemp())
        return case.archs[0], case.save(case.archs[0], root / kind)
    arch, name = cases()[kind]
    return arch, rig.saved(arch, name)


def compiled(kind: str) -> Adapter:
    arch, saved = folder(kind)
    spec, tensors = zoo.read(saved)
    return find(kind).load(spec, tensors, ModelBase(zoo.tiny_base(arch)))


def form(adapter: Adapter) -> str:
    """In a few words, what the engine runs."""
    places = {name: getattr(adapter, name, None) for name in PLACES}
    words = [PLACES[name] for name, value in places.items() if value is not None and len(value)]
    for patch in adapter.patches.values():
        words += _words(patch) if isinstance(patch, Patch) else [_other(patch)]
    return ", ".join(dict.fromkeys(words))


def _words(patch: Patch) -> Iterator[str]:
    for field in dataclasses.fields(patch):
        value = getattr(patch, field.name)
        if value is not None and field.name != "B":
            yield WORDS.get(field.name) or DELTAS[type(value).__name__]


def _other(patch: Any) -> str:
    named = {"A": "low rank", "rows": "rows of tokens"}
    return next((word for name, word in named.items() if hasattr(patch, name)), "parameters")


def measured() -> dict[str, Any]:
    """{kind: {overhead, bytes, …}} of the newest measurement of kinds; empty where there is none."""
    files = sorted(RESULTS.glob("*kinds*.json"))
    return dict(json.loads(files[-1].read_text())["kinds"]) if files else {}


def table() -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    found = measured()
    lines += [f"| {' | '.join(row(kind, found.get(kind, {})))} |" for kind in known()]
    return "\n".join(lines)


def page() -> str:
    """The page as it should be."""
    return PLACE.sub(lambda _: f"<!-- kinds -->\n{table()}\n<!-- /kinds -->", PAGE.read_text())


def row(kind: str, cost: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"`{kind}`",
        *(grafted(kind) if kind in (*fallback.KINDS, unipelt.NAME) else patched(compiled(kind))),
        f"{cost['bytes']:,}" if "bytes" in cost else "–",
        f"{cost['overhead']:+.0f} %" if "overhead" in cost else "–",
    )


def patched(adapter: Adapter) -> tuple[str, ...]:
    """Of a kind that compiles: from form to scale."""
    before = bool(adapter.prefix or adapter.embeds is not None or adapter.tasks)
    return (
        form(adapter),
        "packed" if adapter.blocks or adapter.gated or "ADAPTERHUB" in adapter.spec.family else "packed, dense",
        "yes",
        "no" if adapter.unfoldable else "yes",
        "one" if before else "yes",
        "1" if before else "any",
    )


def grafted(kind: str) -> tuple[str, ...]:
    """The same of a kind that has a tree of modules of its own."""
    return (
        "gates over all tokens" if kind == unipelt.NAME else "PEFT's own modules",
        "peft",
        "no",
        "no" if kind in fallback.UNMERGEABLE | {unipelt.NAME} else "yes",
        "no",
        "any" if kind in SCALABLE else "1",
    )


if __name__ == "__main__":
    PAGE.write_text(page())
