"""The walls of the house: which way imports run, and which door each library comes through."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "server" / "adapter_server"
LAYERS = {  # a layer imports itself and what stands before it
    "__init__": 0, "errors": 0, "core": 0, "config": 0,
    "registry": 1, "families": 2, "engine": 3,
    "text": 4, "metrics": 4,
    "api": 5, "bench": 5,
    "cli": 6, "__main__": 6,
}  # fmt: skip
DOORS = {  # library: the files (or folders) that may import it
    "fastapi": ("api/",),
    "starlette": ("api/",),
    "uvicorn": ("api/", "cli.py", "bench/"),
    "prometheus_client": ("metrics.py",),
    "peft": (
        "families/compose.py",
        "families/fallback.py",
        "bench/workloads.py",
        "bench/peft_kinds.py",
    ),  # the latter make adapters
    "triton": ("engine/kernels/",),
    "typer": ("cli.py", "bench/"),
    "rich": ("cli.py", "bench/"),
    "structlog": ("api/", "cli.py"),
    "pydantic": ("api/", "cli.py"),
    "pydantic_settings": ("api/", "cli.py"),
    "matplotlib": ("bench/plots.py",),
    "httpx": ("bench/",),
    "watchfiles": ("registry/watch.py",),
    "fsspec": ("registry/sources.py",),
    "bitsandbytes": ("families/quantised.py",),
    "llguidance": ("engine/guide.py",),
    "re2": ("families/targets.py",),
    "threading": (
        *("engine/worker.py", "engine/pool.py", "engine/routing.py", "registry/store.py"),
        *("engine/link.py", "engine/process.py", "engine/child.py", "engine/ring.py", "engine/pauses.py"),
    ),
    "multiprocessing": ("engine/link.py",),
    "concurrent": ("engine/", "api/", "registry/versions.py"),
}
NO_TORCH = ("errors.py", "core.py", "config.py", "registry/")
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


def imports(file: Path) -> Iterator[str]:
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield str(node.module)


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=place)
def test_imports_run_one_way(file: Path) -> None:
    own = LAYERS[place(file).split("/")[0].removesuffix(".py")]
    for name in imports(file):
        if name.startswith("adapter_server."):
            layer = name.split(".")[1]
            assert LAYERS[layer] <= own, f"{place(file)} imports {name}, which stands above it"


@pytest.mark.parametrize("file", FILES, ids=place)
def test_each_library_comes_through_its_door(file: Path) -> None:
    for name in imports(file):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or place(file).startswith(doors), f"{place(file)} imports {name}"


@pytest.mark.parametrize("file", [f for f in FILES if place(f).startswith(NO_TORCH)], ids=place)
def test_nouns_and_registry_know_no_torch(file: Path) -> None:
    assert not {"torch", "transformers", "safetensors"} & {name.split(".")[0] for name in imports(file)}


def test_only_the_command_line_fetches() -> None:
    users = [f for f in FILES if any(n.startswith("adapter_server.registry.sources") for n in imports(f))]
    named = [f for f in FILES if "sources" in f.read_text() and "registry import sources" in f.read_text()]
    assert {place(f) for f in (*users, *named)} == {"cli.py"}


def test_no_folder_is_unknown_to_the_order() -> None:
    names = {place(f).split("/")[0].removesuffix(".py") for f in FILES}
    assert names <= set(LAYERS)


def test_adapters_hold_no_python() -> None:
    assert not list((PACKAGE.parents[1] / "adapters").rglob("*.py"))


def test_no_error_is_swallowed() -> None:
    for file in FILES:
        for node in nodes(file):
            if isinstance(node, ast.ExceptHandler):
                assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), place(file)


def test_nothing_depends_on_asserts() -> None:
    """`python -O` drops them: what guards anything is an `if` and a typed error."""
    for file in FILES:
        assert not [node.lineno for node in nodes(file) if isinstance(node, ast.Assert)], file
