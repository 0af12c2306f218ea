"""Reading an adapter's config: every key is known, typed and in range, or the adapter is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from adapter_server.errors import AdapterRefused

Config = Mapping[str, Any]

# Keys that say nothing about the mathematics. None of them is ever imported, opened or looked up.
IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)


def check_known(config: Config, known: Collection[str]) -> None:
    """Refuses a config key that is neither known to the family nor in `IGNORED`.

    One that is null or false passes: a later PEFT writes its new options into every file, and these are off.
    """
    for key, value in config.items():
        if key not in known and key not in IGNORED and value is not None and value is not False:
            near = difflib.get_close_matches(key, [*known, *IGNORED], 1, 0.0)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise AdapterRefused(f"adapter_config.json: {key[:80]!r} is not a key of this kind{hint}")


def refuse_set(config: Config, advice: Mapping[str, str]) -> None:
    """Refuses each key of `advice` that is set, with what to do instead."""
    for key, what in advice.items():
        if config.get(key):
            raise AdapterRefused(f"adapter_config.json: '{key}' is not served here: {what}")


def integer(config: Config, key: str, default: int | None, least: int = 1, most: int = 1 << 20) -> int:
    return as_integer(config.get(key, default), key, least, most)


def as_integer(value: Any, key: str, least: int = 1, most: int = 1 << 20) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _wrong(key, f"an integer in {least}..{most}", value)
    return value


def as_number(value: Any, key: str) -> float:
    if type(value) not in (int, float) or abs(value) > 1e12 or not math.isfinite(value):
        raise _wrong(key, "a finite number", value)
    return float(value)


def flag(config: Config, key: str) -> bool:
    """A boolean that is off unless set; null counts as off."""
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _wrong(key, "true or false", value)


def choice(config: Config, key: str, default: str, allowed: Collection[str]) -> str:
    value = config.get(key, default)
    if isinstance(value, str) and value in allowed:
        return value
    raise _wrong(key, f"one of {sorted(allowed)}", value)


def names(config: Config, key: str) -> list[str] | str | None:
    """A list of module names, a pattern, or null."""
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
        return value
    raise _wrong(key, "a list of names", value)


def name_list(config: Config, key: str) -> list[str]:
    """A list of names where PEFT takes no pattern; null is empty."""
    value = names(config, key)
    if isinstance(value, str):
        raise _wrong(key, "a list of names", value)
    return value or []


def table(config: Config, key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    raise _wrong(key, "an object", value)


def _wrong(key: str, wanted: str, value: Any) -> AdapterRefused:
    return AdapterRefused(f"adapter_config.json: '{key}' must be {wanted}, not {str(value)[:80]!r}")
