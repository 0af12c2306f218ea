"""Every kind that PEFT has is served; every option of a kind is known to it."""

import dataclasses
import re

import peft
import pytest

import beyond
import kinds
import zoo
from adapter_server.core import Spec
from adapter_server.families import fallback, find, known, lane_of
from adapter_server.families.options import IGNORED
from adapter_server.families.wrapping import Wrapping

KINDS = {str(kind.value) for kind in peft.PeftType}
WRAPPING = [kind for kind in known() if isinstance(find(kind), Wrapping)]
FOREIGN = {"enable_lora", "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights"}  # not PEFT's: see lora.py


def fields(kind: str) -> set[str]:
    return {field.name for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind])}


def test_every_kind_of_peft_is_served():
    assert set(known()) - KINDS == set(beyond.KINDS)
    assert not KINDS - set(known())


def test_every_served_kind_has_a_case():
    cases = [*zoo.ADAPTERS.values(), *zoo.GRAFTS.values()]
    served = {case(zoo.tiny_base(case.archs[0])).peft_type for case in cases}
    assert {str(kind.value) for kind in served} | {"XLORA"} == set(known()) - set(beyond.KINDS)


def test_a_kind_of_a_newer_peft_is_served_by_peft(monkeypatch):
    class Newer(peft.LilyConfig):
        """Known to PEFT and to nothing here."""

    monkeypatch.setattr(fallback, "_kinds", lambda: {"NEWER": Newer})
    assert find("NEWER").name == "NEWER"
    assert lane_of(Spec("a", "0" * 12, "", "NEWER", {}, 0), "packed") == "peft"


def test_the_table_of_kinds_is_made_from_what_they_compile_to():
    assert kinds.PAGE.read_text() == kinds.page(), "run PYTHONPATH=tests/engine python tests/kinds.py"


SURVEYED = (
    "LoRA", "QLoRA", "DoRA", "AdaLoRA", "(IA)³", "Prefix tuning", "Prompt tuning", "P-tuning v1", "P-tuning v2",
    "BitFit", "Bottleneck adapters", "Compacter", "UniPELT", "MAM", "DiffPruning", "SPoT", "Ladder side-tuning",
)  # fmt: skip


def test_every_method_of_the_surveys_has_a_row_and_names_kinds_that_there_are():
    text = kinds.PAGE.read_text().partition("## Methods of the literature\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert {row[0].partition(" (")[0] if row[0][0] != "(" else row[0] for row in rows[1:]} == set(SURVEYED)
    named = {word for row in rows[1:] for word in re.findall(r"`([A-Z][A-Z0-9_]+)`", row[1])}
    assert named <= set(known())


@pytest.mark.parametrize("kind", WRAPPING)
def test_a_kind_knows_the_options_that_peft_has_and_no_others(kind):
    assert fields(kind) <= find(kind).known | IGNORED
    assert find(kind).known - fields(kind) <= FOREIGN
