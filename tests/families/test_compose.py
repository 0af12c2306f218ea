"""A stored composition answers as PEFT's own weighted adapter does, token by token; what PEFT gets wrong is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import beyond
import files
import rig
import zoo
from adapter_server.cli import app
from adapter_server.families.compose import SEED
from adapter_server.registry import versions

WAYS = {
    "linear": {},
    "cat": {},
    "svd": {"rank": 3},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.7},
    "ties_svd": {"density": 0.5},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's folder, and adapters: two LoRAs on different modules, one of another rank, two (IA)³s, a DoRA."""
    root = tmp_path_factory.mktemp("compose")
    zoo.tiny_base("llama").save_pretrained(root / "base")
    shutil.copytree(rig.saved("llama", "lora"), root / "adapters" / "a")
    shutil.copytree(rig.saved("llama", "dora"), root / "adapters" / "dora")
    shutil.copytree(rig.saved("llama", "ia3"), root / "adapters" / "scales")
    make = {"b": (zoo.lora(target_modules=["q_proj", "lm_head"]), 7), "more": (zoo.ia3, 8), "high": (zoo.lora(r=6), 9)}
    for name, (config, seed) in make.items():
        base = zoo.tiny_base("llama")
        zoo.save_adapter(lambda: zoo.tiny_base("llama"), config(base), root / "adapters" / name, seed)
    for folder in (root / "adapters").iterdir():
        files.age(folder)
    return root


def compose(place: Path, *args: str) -> tuple[int, str]:
    flags = ["--adapters", str(place / "adapters"), "--model", str(place / "base")]
    with zoo.quiet():
        done = CliRunner().invoke(app, ["adapters", "compose", *args, *flags])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def of_peft(place: Path, members: dict[str, float], **options: object) -> torch.nn.Module:
    """PEFT alone, with its own weighted adapter."""
    first, *others = members
    model = zoo.load_peft(zoo.tiny_base("llama"), place / "adapters" / first)
    with zoo.quiet():
        for name in others:
            model.load_adapter(place / "adapters" / name, name)
        torch.manual_seed(SEED)
        model.base_model.add_weighted_adapter(["default", *others], list(members.values()), "sum", **options)
        model.set_adapter("sum")
    return model.eval()


def check(place: Path, name: str, model: torch.nn.Module) -> None:
    engine = beyond.engine("llama", place / "adapters")
    (answer,) = rig.run(engine, [beyond.ask(engine, {name: 1.0}, rig.PROMPTS[0])])
    beyond.hold(answer, beyond.alone(model, rig.PROMPTS[0]))
    engine.close()


@pytest.mark.parametrize("by", WAYS)
def test_it_answers_as_pefts_own(by: str, place: Path) -> None:
    more = [part for key, value in WAYS[by].items() for part in (f"--{key}", str(value))]
    code, said = compose(place, "a=0.7", "b=0.4", "--by", by, "--out", f"by-{by}", *more)
    assert code == 0, said
    options = {"svd_rank" if key == "rank" else key: value for key, value in WAYS[by].items()}
    check(place, f"by-{by}", of_peft(place, {"a": 0.7, "b": 0.4}, combination_type=by, **options))


def test_ia3_composes_linearly(place: Path) -> None:
    assert compose(place, "scales=0.5", "more=0.6", "--out", "scaled")[0] == 0
    check(place, "scaled", of_peft(place, {"scales": 0.5, "more": 0.6}))


def test_the_manifest_says_what_it_was_made_of(place: Path) -> None:
    assert compose(place, "a", "high=-0.25", "--by", "cat", "--out", "told")[0] == 0
    (version,) = versions.listed(place / "adapters", "told")
    ids = [json.loads((place / "adapters" / n / "adapter_config.json").read_text())["r"] for n in ("a", "high")]
    assert sum(ids) == 10
    assert version.source.startswith("composition: cat of a@")
    assert "high@" in version.source
    assert version.source.endswith("=-0.25")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["a=1", "scales=1"], "PEFT composes LoRAs, or (IA)³s, not IA3, LORA"),
        (["a=1", "dora=1"], "'dora' has 'use_dora', which PEFT leaves out"),
        (["a=1", "high=1"], "PEFT cannot compose these: All adapters must have the same r"),
        (["a=1", "b=1", "--by", "ties"], "a density goes with ties"),
        (["a=1", "b=1", "--density", "0.5"], "and with no other"),
        (["a=1", "b=1", "--by", "ties", "--density", "2"], "density is the share that is kept"),
        (["a=1", "b=1", "--by", "mean"], "by must be one of linear, ties"),
        (["scales=1", "more=1", "--by", "cat"], "(IA)³ composes linearly alone"),
        (["a=one", "b=1"], "'a=one' is no NAME=WEIGHT"),
        (["a=nan", "b=1"], "'a=nan' is no NAME=WEIGHT"),
        (["a=1", "nobody=1"], "nobody"),
        (["a=1", "a=2"], "named twice"),
    ],
)
def test_what_is_refused(args: list[str], reason: str, place: Path) -> None:
    code, said = compose(place, *args, "--out", "never")
    assert code == 1
    assert reason in said
    assert not (place / "adapters" / "never").exists()
