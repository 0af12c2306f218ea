"""The scripts of benchmarks/, which is no package, as modules, and what is written of their flags."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import typer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def documented(name: str) -> dict[str, str]:
    """{flag: default} of a script, as docs/configuration.md has them."""
    page = (BENCHMARKS.parent / "docs" / "configuration.md").read_text()
    part = page.partition(f"### `benchmarks/{name}.py`")[2].partition("\n#")[0]
    return dict(re.findall(r"^\| `(--[\w-]+)` \| `?([^|`]+?)`? \|", part, re.MULTILINE))


def flags(module: ModuleType) -> dict[str, str]:
    """{flag: default} of a script."""
    app = typer.Typer()
    app.command()(module.main)
    params = [param for param in typer.main.get_command(app).params if "completion" not in str(param.name)]
    return {max(param.opts, key=len): shown(param.default) for param in params}


def shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else "–" if default is None else str(default)
