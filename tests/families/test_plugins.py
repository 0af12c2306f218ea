"""Families of other packages, found by their entry point; the package that is broken is named at start."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import beyond
import rig
import zoo
from adapter_server import families
from adapter_server.cli import app
from adapter_server.errors import PlugInBroken

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_family.py"
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Installs a package of one module, as pip lays it out: the module and its dist-info with an entry point."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def one(source: str, value: str) -> None:
        (site / "new_family.py").write_text(source)
        info = site / "new_family-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: new-family\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{families.GROUP}]\nmine = {value}\n")
        families._families.cache_clear()

    yield one
    sys.modules.pop("new_family", None)
    shutil.rmtree(site)
    families._families.cache_clear()


def test_the_example_is_served_mixed_and_merged(install: Callable[[str, str], None], tmp_path: Path) -> None:
    install(EXAMPLE.read_text(), "new_family:FAMILY")
    assert "TILT" in families.known()
    base = zoo.tiny_base("llama")
    vectors = {}
    for i, path in enumerate(PATHS):
        module = base.get_submodule(path)
        a, t = beyond.noise((module.in_features,), i), beyond.noise((module.out_features,), i + 9)
        module.weight.data += t[:, None] * a
        vectors[path] = a, t
    shutil.copytree(rig.saved("llama", "lora"), tmp_path / "adapters" / "lora")
    sys.modules["new_family"].save(vectors, tmp_path / "adapters" / "mine")
    engine = beyond.engine("llama", tmp_path / "adapters")
    want = beyond.alone(base, rig.PROMPTS[0])
    asked = [("mine", "unmerged"), ("lora", "unmerged"), ("mine", "merged")]
    requests = [beyond.ask(engine, {name: 1.0}, rig.PROMPTS[0], mode) for name, mode in asked]
    mixed, lora, merged = rig.run(engine, requests)
    beyond.hold(mixed, want)
    beyond.hold(merged, want)
    beyond.hold(lora, rig.peft_alone("llama", "lora", rig.PROMPTS[0]))
    engine.close()


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        ("raise RuntimeError('no')", "new_family:FAMILY", r"of new-family cannot be imported \(RuntimeError\('no'\)"),
        ("X = 1", "new_family:FAMILY", "cannot be imported"),
        ("FAMILY = 5", "new_family:FAMILY", "names no family.*lacks expected, load, slow"),
        (EXAMPLE.read_text().replace("TILT", "tilt"), "new_family:FAMILY", "needs a name in capitals"),
        ("from adapter_server.families.beft import FAMILY", "new_family:FAMILY", "the kind 'BEFT' is served already"),
    ],
)
def test_a_broken_plug_in_is_named(install: Callable[[str, str], None], source: str, value: str, reason: str) -> None:
    install(source, value)
    with pytest.raises(PlugInBroken, match=reason):
        families.known()


def test_a_broken_plug_in_ends_the_start_in_one_line(install: Callable[[str, str], None], tmp_path: Path) -> None:
    install("FAMILY = 5", "new_family:FAMILY")
    done = CliRunner().invoke(app, ["generate", "red cat>"])
    assert done.exit_code == 1
    assert "names no family" in " ".join(done.output.split())
