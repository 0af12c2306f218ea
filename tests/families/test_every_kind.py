"""Every kind that PEFT has is served, or refused with its reason; every option of a kind is known to it."""

import dataclasses

import peft
import pytest

import beyond
import zoo
from adapter_server.errors import AdapterRefused
from adapter_server.families import REFUSED, find, known
from adapter_server.families.options import IGNORED
from adapter_server.families.wrapping import Wrapping

KINDS = {str(kind.value) for kind in peft.PeftType}
WRAPPING = [kind for kind in known() if isinstance(find(kind), Wrapping)]
FOREIGN = {"enable_lora", "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights"}  # not PEFT's: see lora.py


def fields(kind: str) -> set[str]:
    return {field.name for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind])}


def test_every_kind_of_peft_is_served_or_refused_with_a_reason():
    assert KINDS - set(known()) == set(REFUSED)
    assert set(known()) - KINDS == set(beyond.KINDS)
    assert not set(known()) & set(REFUSED)


def test_every_served_kind_has_a_case():
    served = {case(zoo.tiny_base(case.archs[0])).peft_type for case in zoo.ADAPTERS.values()}
    assert {str(kind.value) for kind in served} == set(known()) - set(beyond.KINDS)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_kind_says_why(kind):
    with pytest.raises(AdapterRefused, match=f"'{kind}' are not served: ") as caught:
        find(kind)
    assert REFUSED[kind] in caught.value.message


@pytest.mark.parametrize("kind", WRAPPING)
def test_a_kind_knows_the_options_that_peft_has_and_no_others(kind):
    assert fields(kind) <= find(kind).known | IGNORED
    assert find(kind).known - fields(kind) <= FOREIGN
