"""Which modules an adapter names: PEFT's own rules (`tuners/tuners_utils.py`), with patterns in linear time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import re2

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Shapes
from adapter_server.families.options import Config, as_integer, name_list, names

Match = Callable[[str], bool]
Resolved = TypeVar("Resolved")
Resolve = Callable[[Config, Shapes, frozenset[str]], Resolved]
REMEMBERED = 8  # configs

_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")  # ours, on the base's own names: Python's engine is safe here
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False


def remembered(resolve: Resolve[Resolved]) -> Resolve[Resolved]:
    """Resolves a config against a base and a file's names once: adapters of one making differ in their numbers alone,
    and each is asked about twice, for what it must hold and when it is read. What it gives must not be written to.
    """
    known: dict[tuple[str, frozenset[str]], tuple[Shapes, Resolved]] = {}

    @functools.wraps(resolve)
    def once(config: Config, shapes: Shapes, names: frozenset[str]) -> Resolved:
        key = repr(config), names
        over, found = known.get(key, (None, None))
        if over is shapes and found is not None:
            return found
        made = resolve(config, shapes, names)
        if len(known) >= REMEMBERED:
            known.clear()
        known[key] = shapes, made
        return made

    return once


def pattern(text: str, key: str) -> Any:
    """A regular expression of a config, compiled by RE2: matching takes linear time whatever it says."""
    try:
        return re2.compile(text, _OPTIONS)
    except (re2.error, UnicodeEncodeError) as error:
        raise AdapterRefused(
            f"adapter_config.json: the pattern {text[:80]!r} in '{key}' does not compile in RE2 ({error}); "
            "write the modules' names as a list"
        ) from None


def targeted(config: Config, shapes: Shapes) -> list[str]:
    """Paths of the modules that the adapter wraps, in the model's order. Refuses what matches nothing."""
    wanted, excluded, saved = _wanted(config, shapes), _named(config, "exclude_modules"), _inside_saved(config)
    paths = [path for path in shapes.modules if wanted(path) and not excluded(path) and not saved(path)]
    if not paths:
        raise AdapterRefused("adapter_config.json: 'target_modules' matches no module of this base")
    return paths


def saved_modules(config: Config, shapes: Shapes) -> list[str]:
    """Paths of all parameter-owning modules in `modules_to_save` (PEFT `utils/other.py`, `_set_trainable`)."""
    ends = tuple(name_list(config, "modules_to_save"))
    if not ends:
        return []
    return [path for path in shapes.modules if any(root.endswith(ends) for root in _roots(path))]


def suffix_or_pattern(config: Config, key: str) -> Match:
    """A pattern that matches the whole path, or names that a path ends with, dot or no dot (PEFT `ia3/model.py`)."""
    value = names(config, key)
    if isinstance(value, str):
        return _whole(value, key)
    return lambda path: path.endswith(tuple(value or ()))


def by_pattern(config: Config, key: str, entries: Mapping[str, Any], default: Any) -> Callable[[str], Any]:
    """path → the value of the first pattern that matches its end, or the default (PEFT `get_pattern_key`)."""
    compiled = [(pattern(rf"(?:.*\.)?(?:{text})", key), value) for text, value in entries.items()]

    def lookup(path: str) -> Any:
        return next((value for regex, value in compiled if regex.fullmatch(path)), default)

    return lookup


def _wanted(config: Config, shapes: Shapes) -> Match:
    targets = names(config, "target_modules")
    if targets is None:
        raise AdapterRefused("adapter_config.json: 'target_modules' is missing: list the modules that were trained")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return lambda path: shapes.modules[path].kind in ("linear", "conv1d") and path != shapes.head
    chosen, layer = _named(config, "target_modules"), _in_layers(config)
    if isinstance(targets, str):
        if config.get("layers_to_transform") is not None:
            raise AdapterRefused("adapter_config.json: 'layers_to_transform' needs 'target_modules' to be a list")
        return chosen
    return lambda path: path in targets or (chosen(path) and layer(path))


def _named(config: Config, key: str) -> Match:
    """path == name, or ends with '.' + name; a string is a pattern for the whole path."""
    value = names(config, key)
    if isinstance(value, str):
        return _whole(value, key)
    ends = tuple(f".{name}" for name in value or ())
    return lambda path: f".{path}".endswith(ends)


def _whole(text: str, key: str) -> Match:
    compiled = pattern(text, key)
    return lambda path: compiled.fullmatch(path) is not None


def _inside_saved(config: Config) -> Match:
    """Modules in or under a module that is saved whole are never wrapped."""
    found = [
        pattern(rf"(?:^|.*\.)(?:{name})(?:$|\..*)", "modules_to_save") for name in name_list(config, "modules_to_save")
    ]
    return lambda path: any(regex.match(path) for regex in found)


def _in_layers(config: Config) -> Match:
    """Whether a path's layer index is in `layers_to_transform`; any is, where that is not set."""
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return lambda path: True
    wanted = {as_integer(i, "layers_to_transform", 0) for i in (value if isinstance(value, list) else [value])}
    prefixes = names(config, "layers_pattern") or []
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    found = [pattern(rf"(?:^|.*?\.)(?:{p})\.(\d+)\.", "layers_pattern") for p in prefixes] or [_FIRST_INDEX]

    def inside(path: str) -> bool:
        match = next((m for regex in found if (m := regex.match(path))), None)
        return match is not None and int(match.groups()[-1]) in wanted

    return inside


def _roots(path: str) -> list[str]:
    """a.b.c → a, a.b, a.b.c."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
