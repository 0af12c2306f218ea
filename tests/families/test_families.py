"""Families are found by being there."""

import pytest

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families import find, known, slow


def test_every_known_kind_is_found_under_its_own_name():
    assert {"LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"} <= set(known())
    assert known() == sorted(known())
    assert [find(kind).name for kind in known()] == known()


@pytest.mark.parametrize("kind", ["LORAX", "lora", "", "../lora", "adapter_server.families.lora"])
def test_an_unknown_kind_is_refused_with_those_that_are_known(kind):
    with pytest.raises(AdapterRefused, match=r"are not served.*Known: .*IA3.*LORA"):
        find(kind)


def test_what_reads_base_weights_queues_apart():
    def spec(**config):
        return Spec("a", "0" * 12, "", "LORA", config, 0)

    assert slow(spec(use_dora=True))
    assert not slow(spec(use_dora=False))
    assert not slow(spec())
