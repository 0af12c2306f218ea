"""Reading a config: known keys, types, ranges."""

import pytest

from adapter_server.errors import AdapterRefused
from adapter_server.families import options

KNOWN = frozenset({"r", "lora_alpha"})


@pytest.mark.parametrize(("key", "near"), [("rr", "r"), ("lora_alfa", "lora_alpha"), ("peft_typ", "peft_type")])
def test_an_unknown_key_is_refused_with_the_nearest_known_name(key, near):
    with pytest.raises(AdapterRefused, match=f"'{key}' is not a key of this kind; did you mean '{near}'"):
        options.check_known({key: 1}, KNOWN)


def test_known_ignored_and_switched_off_keys_pass():
    options.check_known({"r": 1, "auto_mapping": {"parent_library": "os"}, "new": None, "newer": False}, KNOWN)


@pytest.mark.parametrize("value", [0, "", [], {}])
def test_an_unknown_key_with_a_value_is_refused_however_empty(value):
    with pytest.raises(AdapterRefused, match="'new' is not a key"):
        options.check_known({"new": value}, KNOWN)


@pytest.mark.parametrize("config", [{"x" * 10_000: 1}, {"r": "9" * 10_000}], ids=["key", "value"])
def test_a_message_quotes_no_more_than_a_line_of_a_hostile_config(config):
    with pytest.raises(AdapterRefused) as caught:
        options.check_known(config, KNOWN) or options.integer(config, "r", None)
    assert len(caught.value.message) < 300


def test_absent_and_null():
    assert options.integer({}, "r", 8) == 8
    assert options.flag({"use": None}, "use") is False
    assert options.table({"t": None}, "t") == {}
    assert options.names({"n": None}, "n") is None
    assert options.name_list({}, "n") == []
    assert options.choice({}, "bias", "none", ("none",)) == "none"


@pytest.mark.parametrize("value", [True, 10**400, -(10**13), float("inf"), None, "1", []])
def test_what_is_no_number(value):
    with pytest.raises(AdapterRefused, match="must be a finite number"):
        options.as_number(value, "lora_alpha")
