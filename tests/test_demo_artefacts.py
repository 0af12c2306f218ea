"""The demo that ships: its base and its adapters are complete, name no machine, and do what their cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "server" / "adapter_server" / "demo" / "base"
ADAPTERS = sorted(path for path in (ROOT / "adapters").iterdir() if path.is_dir())
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "eval.jsonl"}
FAMILIES = {"LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
MACHINE_PATH = re.compile(r"(?:^|[\"'\s=])(?:/[a-z]+/|~/|[A-Za-z]:\\)|file://")

adapters = pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
folders = pytest.mark.parametrize("folder", [BASE, *ADAPTERS], ids=lambda folder: folder.name)


def config_of(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "adapter_config.json").read_text())
    return config


def eval_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


@adapters
def test_an_adapter_has_these_files_and_no_other(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES


def test_no_python_ships_among_the_adapters() -> None:
    assert not list((ROOT / "adapters").rglob("*.py"))


def test_every_promised_family_ships() -> None:
    configs = [config_of(folder) for folder in ADAPTERS]
    assert {config["peft_type"] for config in configs} >= FAMILIES
    for option in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        assert any(config.get(option) for config in configs), option


@folders
def test_eval_holds_a_hundred_different_prompts(folder: Path) -> None:
    lines = eval_of(folder)
    assert len({line["prompt"] for line in lines}) == len(lines) == 100
    assert all(line["prompt"].endswith(">") and line["expected"] for line in lines)


@adapters
def test_copying_answers_no_prompt_of_an_adapter(folder: Path) -> None:
    assert all(line["prompt"] != line["expected"] + ">" for line in eval_of(folder))


@folders
def test_a_card_states_an_accuracy_above_the_bar(folder: Path) -> None:
    match = re.search(r"exact match \| \*\*([01]\.\d\d)\*\*", (folder / "README.md").read_text())
    assert match, "the card states no accuracy"
    low_rank = folder == BASE or config_of(folder)["peft_type"] == "LORA"
    assert float(match[1]) >= (0.95 if low_rank else 0.90)


@adapters
def test_a_card_says_how_to_call_the_adapter(folder: Path) -> None:
    assert f'"adapter": "{folder.name}"' in (folder / "README.md").read_text()


@folders
def test_no_text_names_a_path_of_a_machine(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in {".json", ".md"} and path.name != "tokenizer.json":
            text = path.read_text().replace("localhost:8000/generate", "")
            assert not MACHINE_PATH.search(text), path.name


@adapters
def test_an_adapter_names_the_base_and_no_place(folder: Path) -> None:
    assert config_of(folder)["base_model_name_or_path"] == "adapter-server-demo"


def test_the_base_is_small() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 6_000_000


def test_the_tokenizer_turns_any_text_into_its_bytes_and_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = 'red cat>\n\té ß λ → 日本 😀 "'
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_ends_a_turn_where_the_answer_begins() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    turns = [("user", "red cat"), ("assistant", "red cat"), ("user", "blue dog")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "red cat>red cat<eos>blue dog>"


def test_the_base_copies() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    for line in eval_of(BASE)[:5]:
        batch = tokenizer(line["prompt"], return_tensors="pt")
        made = model.generate(**batch, max_new_tokens=48, do_sample=False)[0, batch.input_ids.shape[1] :]
        assert made[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(made, skip_special_tokens=True) == line["expected"]
