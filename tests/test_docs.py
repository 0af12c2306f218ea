"""The words are true: blocks of code run, and nothing that a user can name is undocumented.

Run as a script, it writes the parts of the pages that are made from the code: python tests/test_docs.py
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from fastapi import FastAPI
from prometheus_client.metrics import MetricWrapperBase

from adapter_server import cli, config
from adapter_server.api import openai_bodies, refusals, schemas
from adapter_server.api.app import create_app
from adapter_server.api.bridge import Operation
from adapter_server.config import ServerConfig
from adapter_server.errors import AdapterServerError
from adapter_server.families import (
    adapterhub,
    adaption_prompt,
    fallback,
    find,
    known,
    lora,
    options,
    poly,
    prefix,
    prompt,
    unipelt,
)
from adapter_server.metrics import NAMESPACE, Metrics
from adapter_server.registry import guard
from adapter_server.registry.store import Store
from adapter_server.text import Text
from fakes import INFO, FakeWorker, save_byte_tokenizer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "127.0.0.1:8000"
START_S = 60.0
SHOWN_ONLY = ("docker",)  # programs that a test cannot run
CURL = """import argparse, httpx
p = argparse.ArgumentParser()
p.add_argument("-s", "-N", action="store_true"), p.add_argument("--fail-with-body", action="store_true")
p.add_argument("-X"), p.add_argument("-H"), p.add_argument("-d"), p.add_argument("url")
a = p.parse_args()
answer = httpx.request(a.X or ("GET" if a.d is None else "POST"), a.url, content=a.d, timeout=20)
print(answer.text)
raise SystemExit(answer.is_error)"""

# Reading Markdown


@dataclass(frozen=True)
class Block:
    """A fenced block, and what the page shows as its outcome: the JSON or text block that follows it at once."""

    page: Path
    line: int
    language: str
    code: str
    shown: Block | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[Block]:
    text, found, after = page.read_text(), [], None
    for match in reversed(list(FENCE.finditer(text))):
        follows = after if after and not text[match.end() : after[0]].strip() else None
        block = Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2], follows and follows[1])
        after = match.start(), block
        found.append(block)
    return [block for block in reversed(found) if block.language == language]


def all_blocks(language: str, pages: Iterable[Path] = PAGES) -> list[Any]:
    return [pytest.param(block, id=str(block)) for page in pages for block in blocks(page, language)]


def tables(text: str) -> Iterator[tuple[str, list[str]]]:
    """(heading above, cells) of every row of every table."""
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        elif line.startswith("| ") and not line.startswith("|--"):
            yield heading, [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| "))]


def names(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def row(page: str, name: str, heading: str | None = None) -> list[str]:
    """The row whose first cell names this."""
    rows = [cells for under, cells in tables(DOCS[page]) if heading in (None, under) and name in names(cells[0])]
    assert rows, f"docs/{page}.md has no row for {name}" + (f" under {heading}" if heading else "")
    return rows[0]


# The demo


@dataclass
class Demo:
    """The server that `make serve` starts."""

    address: str
    welcome: str
    shell: dict[str, str]

    def localised(self, code: str) -> str:
        return code.replace(ADDRESS, self.address)

    def bash(self, code: str) -> str:
        """What the lines print. A refusal fails them."""
        script = 'set -euo pipefail; curl() { command curl --fail-with-body "$@"; }\n' + self.localised(code)
        done = subprocess.run(["bash", "-c", script], env=self.shell, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def json(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = "" if body is None else f" -d {shlex.quote(json.dumps(body))}"
        return json.loads(self.bash(f"curl -s http://{ADDRESS}{path}{data}"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "server"), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "adapter_server.cli", "demo", "--port", "0", "--log-level", "error"]
    shell = dict(os.environ)
    if shutil.which("curl") is None:
        (stand_in := tmp_path_factory.mktemp("bin") / "curl").write_text(f"#!{sys.executable}\n{CURL}\n")
        stand_in.chmod(0o755)
        shell["PATH"] = f"{stand_in.parent}:{shell['PATH']}"
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout
        try:
            welcome = next(process.stdout) + next(process.stdout) + next(process.stdout)
            found = re.search(r"http://(\S+),", welcome)
            assert found, welcome
            yield Demo(found[1], welcome, shell)
        finally:
            process.terminate()
            process.wait(START_S)


def same_shape(shown: Any, got: Any, at: str = "") -> None:
    """The same fields all the way down, and the same values where they do not change from run to run."""
    assert type(shown) is type(got) or {type(shown), type(got)} <= {int, float}, at
    if isinstance(shown, dict):
        assert shown.keys() == got.keys(), at
        for name, value in shown.items():
            same_shape(value, got[name], f"{at}.{name}")
            if name in ("text", "finish_reason", "adapter", "mode", "usage", "token_id"):
                assert value == got[name], f"{at}.{name}"
    elif isinstance(shown, list):
        assert len(shown) == len(got), at
        for i, pair in enumerate(zip(shown, got, strict=True)):
            same_shape(*pair, f"{at}[{i}]")


def shape(line: str) -> Any:
    """A line of text without what changes from run to run: the keys of an event, the series of a sample."""
    if line.startswith("data: "):
        return sorted(json.loads(line.removeprefix("data: ")))
    return line.rpartition(" ")[0]


# Blocks


@pytest.mark.parametrize("block", [p for p in all_blocks("bash") if "curl" in p.values[0].code])
def test_curl_lines_work_and_answer_as_shown(block: Block, demo: Demo) -> None:
    printed = demo.bash(block.code)
    if block.shown and block.shown.language == "json":
        same_shape(json.loads(block.shown.code), json.loads(printed))
    elif block.shown and block.shown.language == "text":
        shapes = [shape(line) for line in printed.splitlines()]
        assert all(shape(line) in shapes for line in block.shown.code.splitlines()), printed


@pytest.mark.parametrize("block", [p for p in all_blocks("bash") if "curl" not in p.values[0].code])
def test_other_lines_name_what_there_is(block: Block) -> None:
    for line in block.code.replace("\\\n", " ").splitlines():
        check_line(shlex.split(line, comments=True))


def check_line(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        assert set(rest) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)), rest
    elif program == "adapter-server":
        parse(typer.main.get_command(cli.app), rest)
    elif program == "python":
        script = (ROOT / rest[0]).read_text()
        assert all(f'"{flag}"' in script for flag in rest if flag.startswith("--")), rest
    else:
        assert program in SHOWN_ONLY, f"no test can say whether this works: {shlex.join(words)}"


def parse(command: Any, args: list[str]) -> None:
    """As the command line reads them, without running anything. Raises what a user would see."""
    context = command.make_context(command.name, args)
    left = [*getattr(context, "_protected_args", []), *context.args]
    if left and hasattr(command, "commands"):
        parse(command.commands[left[0]], left[1:])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("block", all_blocks("python"))
def test_python_blocks_run(
    block: Block, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server").symlink_to(ROOT / "server")
    monkeypatch.chdir(tmp_path)
    exec(compile(demo.localised(block.code), str(block), "exec"), {"__name__": "readme"})
    made = [path.parent.name for path in tmp_path.glob(f"adapters/*/{guard.CONFIG}")]
    assert made or capsys.readouterr().out
    assert made == [name for name in Store(tmp_path / "adapters", settle_s=0).names() if name in made]


def test_make_serve_prints_what_the_readme_says(demo: Demo) -> None:
    block = next(block for block in blocks(README, "bash") if block.code == "make serve\n")
    assert block.shown
    assert demo.localised(block.shown.code).strip() == demo.welcome.strip()


def test_the_demo_prints_a_curl_line_that_works(demo: Demo) -> None:
    line = next(line for line in demo.welcome.splitlines() if line.strip().startswith("curl"))
    words, answer = shlex.split(line), json.loads(demo.bash(line))
    assert answer["adapter"] == json.loads(words[words.index("-d") + 1])["adapter"]
    assert answer["finish_reason"] in ("eos", "stop", "length")
    assert answer["text"]


@pytest.mark.parametrize("block", all_blocks("json"))
def test_json_is_json(block: Block) -> None:
    json.loads(block.code)


# Links and files


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            assert (page.parent / file).exists(), target
            assert not anchor, f"{target}: no test looks at anchors"


def file_tree() -> dict[Path, str]:
    """{path: comment} of the README's tree, which shows depth by two spaces."""
    tree = next(block for block in blocks(README, "text") if "pyproject.toml" in block.code)
    found: dict[Path, str] = {}
    above: list[str] = []
    for line in tree.code.splitlines():
        name, comment = re.fullmatch(r"\s*(\S+)\s+(\S.*)", line).groups()  # type: ignore[union-attr]
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], name]
        found[ROOT / "/".join(above)] = comment
    return found


def test_the_file_tree_is_the_tree() -> None:
    tree = file_tree()
    assert [path for path in tree if not path.exists()] == []
    package = {path for path in config.PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    scripts = {path for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    kinds = {Path(module.__file__) for module in modules()}  # these are in the table of kinds
    assert (package | scripts) - kinds - tree.keys() == set()


def test_pages_say_nothing_of_the_machine_they_were_written_on() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        assert not re.search(r"/(home|root|Users|work|tmp)/", page.read_text()), page.name


# Routes and fields


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    folder = tmp_path_factory.mktemp("app")
    text = Text(save_byte_tokenizer(folder / "base"))
    return create_app(FakeWorker, Store(folder), text, INFO, ServerConfig())  # type: ignore[arg-type]


def routes(app: FastAPI) -> set[str]:
    """ "METHOD path" of every route; the adapters' operations are one parameter to FastAPI."""
    described = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    own = {("GET", path) for route in app.routes if (path := getattr(route, "path", None))}
    found = {f"{method} {path}" for method, path in described | own}
    return {
        path.replace("{operation}", operation)
        for path in found
        for operation in (get_args(Operation) if "{operation}" in path else ("",))
    }


def test_every_route_is_documented_and_no_other(app: FastAPI) -> None:
    documented = {name for name in names(DOCS["api"]) if re.match(r"(GET|POST|PUT|DELETE|PATCH) /[^…]*$", name)}
    assert documented == routes(app)


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("POST /generate", schemas.GenerateBody),
        ("POST /generate", schemas.MemberBody),
        ("POST /tokenize", schemas.TokenizeBody),
        ("POST /detokenize", schemas.DetokenizeBody),
    ],
)
def test_every_field_is_documented_with_its_default_and_bounds(heading: str, model: type[schemas.Strict]) -> None:
    for name, about in model.model_json_schema()["properties"].items():
        _, text, default = row("api", name, heading)
        needed = model.model_fields[name].is_required()
        assert default == ("required" if needed else f"`{json.dumps(about['default'])}`"), name
        stated = text.replace(",", "")
        for bound in bounds(about):
            assert re.search(rf"(?<![\d.]){re.escape(f'{bound:g}' if bound < 1e5 else str(int(bound)))}\b", stated), (
                name,
                bound,
            )


def bounds(schema: Any) -> Iterator[float]:
    if isinstance(schema, dict):
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "maxItems", "maxLength"):
            if key in schema:
                yield schema[key]
        schema = [value for key, value in schema.items() if key != "$defs"]
    if isinstance(schema, list):
        for part in schema:
            yield from bounds(part)


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("POST /v1/completions", openai_bodies.CompletionBody),
        ("POST /v1/chat/completions", openai_bodies.ChatBody),
        ("Both", openai_bodies.CommonBody),
    ],
)
def test_every_field_of_openais_dialect_is_documented(heading: str, model: type[schemas.Strict]) -> None:
    common = openai_bodies.CommonBody.model_fields
    own = {
        name: info
        for name, info in model.model_fields.items()
        if model is openai_bodies.CommonBody or name not in common
    }
    rows = [cells for under, cells in tables(DOCS["api"]) if under == heading][1:]
    assert {name for cells in rows for name in names(cells[0])} == own.keys()
    assert [cells[2] for cells in rows] == [
        "required" if own[cells[0].strip("`")].is_required() else "`null`" for cells in rows
    ]


def test_no_field_is_documented_that_there_is_not() -> None:
    known = {*schemas.GenerateBody.model_fields, *schemas.MemberBody.model_fields}
    rows = [cells for heading, cells in tables(DOCS["api"]) if heading == "POST /generate" and len(cells) == 3]
    assert {name for cells in rows for name in names(cells[0])} == known


def test_every_field_of_an_answer_is_documented(demo: Demo) -> None:
    ask = {"prompt": "red cat>", "adapter": "shout", "logprobs": 1, "return_token_ids": True}
    answer = demo.json("/generate", ask)
    for name in answer:
        row("api", name, "POST /generate")
    for name in ("usage", "timing"):
        assert answer[name].keys() <= names(row("api", name, "POST /generate")[1])
    listed = demo.json("/adapters")
    assert listed.keys() == {"base", "adapters"}
    for name in listed["adapters"][0]:
        row("api", name, "GET /adapters")
    more = demo.json("/adapters/shout")
    assert more.keys() - listed["adapters"][0].keys() == {"versions"}
    assert set(json.loads(json.dumps(more["versions"][0]))) == {"version", "current", "state"}
    assert demo.json("/info").keys() <= names(row("api", "GET /info")[1])


# Flags


def commands() -> Iterator[tuple[str, Any]]:
    yield from walk(typer.main.get_command(cli.app), "adapter-server")
    for name in cli.BENCHES:
        bench = typer.Typer()
        bench.command()(getattr(importlib.import_module(f"adapter_server.bench.{name}"), name))
        yield f"adapter-server bench {name}", typer.main.get_command(bench)


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, f"{path} {name}")


PARAMS = [
    pytest.param(path, param, id=f"{path} {param.opts[0]}")
    for path, command in commands()
    for param in command.params
    if not {"--install-completion", "--show-completion"} & set(param.opts)
]


def label(param: Any) -> str:
    first: str = param.opts[0]
    return first if first.startswith("-") else first.upper()


def stated(path: str, name: str) -> list[str]:
    """The row of a command's own table, or of the settings that commands share."""
    for heading in (path, path.rpartition(" ")[0], "The engine", "The service"):
        for under, cells in tables(DOCS["configuration"]):
            if under == heading and name in names(cells[0]):
                return cells
    raise AssertionError(f"docs/configuration.md has no row for {name} under {path}")


@pytest.mark.parametrize(("path", "param"), PARAMS)
def test_every_flag_is_documented_with_its_variable_and_default(path: str, param: Any) -> None:
    flags, variable, default, meaning = stated(path, label(param))
    assert {label(param), *param.secondary_opts} == names(flags)
    assert variable == (f"`{param.envvar}`" if param.envvar else "–")
    assert matches(default, param), (default, param.default)
    assert meaning


def matches(cell: str, param: Any) -> bool:
    """Whether a cell says this default."""
    if isinstance(param.show_default, str):
        return cell == param.show_default
    if param.required or param.default is None:
        return cell == ("required" if param.required else "–")
    value = cell.strip("`")
    if isinstance(param.default, bool):
        return value == ("on" if param.default else "off")
    if param.name.endswith("_bytes"):
        return cli.parse_bytes(value) == param.default
    return type(param.default)(value) == param.default


def test_no_flag_or_variable_is_documented_that_there_is_not() -> None:
    flags = {name for p in PARAMS for name in (label(p.values[1]), *p.values[1].secondary_opts)}
    variables = {p.values[1].envvar for p in PARAMS} - {None}
    rows = [cells for _, cells in tables(DOCS["configuration"]) if len(cells) == 4]
    assert {name for cells in rows for name in names(cells[0])} == flags
    assert {name for cells in rows for name in names(cells[1])} == variables
    named = {word for page in PAGES for word in re.findall(rf"\b{cli.ENV}\w+", page.read_text())}
    assert named <= variables


def test_every_variable_of_make_is_documented_with_its_default() -> None:
    found = re.findall(r"^(?:export )?(\w+) \?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    for name, default in found:
        assert row("configuration", name, "Make")[1] == f"`{default}`"


# Metrics, errors, families


def series() -> dict[str, tuple[str, set[str]]]:
    """{name as scraped: (type, labels)}."""
    metrics = Metrics()
    own = {value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)}
    labels = {f"{NAMESPACE}_{value._name}".replace(f"{NAMESPACE}_{NAMESPACE}", NAMESPACE): value for value in own}
    ends = {"counter": "_total", "info": "_info"}
    found = {}
    for family in metrics.registry.collect():
        wrapper = labels.get(family.name)
        found[family.name + ends.get(family.type, "")] = (family.type, set(wrapper._labelnames) if wrapper else set())
    return found


def test_every_metric_is_documented_and_no_other() -> None:
    found = series()
    build = {"version", "model", "device", "dtype"}  # an Info's labels are its values
    for name, (kind, labels) in found.items():
        _, shown_kind, shown_labels, meaning = row("metrics", name)
        assert (shown_kind, names(shown_labels)) == (kind, build if kind == "info" else labels), name
        assert meaning
    documented = set(re.findall(rf"\b{NAMESPACE}_\w+", DOCS["metrics"]))
    parts = {f"{name}{end}" for name in found for end in ("_bucket", "_sum", "_count")}
    assert documented - parts == found.keys()


def tree(root: type[AdapterServerError]) -> Iterator[type[AdapterServerError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == root.__module__:
            yield from tree(child)


def codes() -> dict[str, int]:
    typed = {error.code: error.status for error in tree(AdapterServerError)}
    return typed | {code: status for status, code in refusals.CODES.items()}


def test_every_error_is_documented_with_its_status_and_no_other() -> None:
    found = {code: row("errors", code, "Codes") for code in codes()}
    assert {code: int(cells[1]) for code, cells in found.items()} == codes()
    assert all(cells[2] and cells[3] for cells in found.values())
    rows = [cells for heading, cells in tables(DOCS["errors"]) if heading == "Codes"][1:]
    assert {name for cells in rows for name in names(cells[0])} == codes().keys()


def test_every_type_of_error_is_documented_with_its_statuses() -> None:
    for status in {*codes().values(), 409}:
        kind = refusals.TYPES.get(status, "invalid_request_error")
        assert str(status) in row("errors", kind, "Types")[1].split(", ")


FAMILIES = re.compile(r"<!-- families -->\n.*?<!-- /families -->", re.DOTALL)
UNSCALED = (prefix, prompt, unipelt)
UNMERGED = (adapterhub, adaption_prompt, poly)


def modules() -> dict[Any, list[Any]]:
    """{module: the families it declares}, by name."""
    found: dict[Any, list[Any]] = {}
    for family in map(find, known()):
        found.setdefault(sys.modules[type(family).__module__], []).append(family)
    return found


def about(module: Any) -> tuple[str, str]:
    """A module's first sentence, without where PEFT has it, and the formulas below."""
    first, _, rest = module.__doc__.strip().partition("\n\n")
    return re.sub(r" \(PEFT [^)]*\)", "", first).rstrip("."), textwrap.dedent(rest).rstrip()


def ticked(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def readme_table() -> str:
    lines = ["| PEFT type | what it is | merged | `scale`, weights |", "|---|---|---|---|"]
    for module, families in modules().items():
        merged, scale = ("no", "1 only") if module in UNSCALED else ("no" if module in UNMERGED else "yes", "any")
        if module is fallback:  # PEFT's own: see docs/adapters.md
            merged, scale = "AdaMSS", "LILY"
        lines.append(f"| {ticked(f.name for f in families)} | {about(module)[0]} | {merged} | {scale} |")
    return "\n".join(lines)


def options_of(family: Any) -> tuple[set[str], dict[str, str]]:
    """The keys of its config that are known beside those known everywhere, and those refused with the reasons."""
    module = sys.modules[type(family).__module__]
    keys = getattr(family, "known", None) or getattr(module, "KNOWN", None) or OPTIONS[family.name]
    refused = dict(getattr(family, "refused", None) or getattr(module, "REFUSED", {}))
    return set(keys) - refused.keys(), refused


OPTIONS = {
    "LORA": lora.SERVED | lora.HARMLESS,
    "MULTITASK_PROMPT_TUNING": prompt.VIRTUAL | prompt.MULTITASK,
}


def reference() -> str:
    return "\n\n".join(part for module, families in modules().items() for part in entry(module, families))


def entry(module: Any, families: list[Any]) -> Iterator[str]:
    title, formulas = about(module)
    yield f"### {ticked(family.name for family in families)}"
    yield f"{title}."
    if formulas:
        yield f"```text\n{formulas}\n```"
    for family in families:
        yield from options_entry(family, len(families) > 1)


def options_entry(family: Any, named: bool) -> Iterator[str]:
    keys, refused = options_of(family)
    of = f" of `{family.name}`" if named else ""
    yield "\n".join(textwrap.wrap(f"Options{of}: {ticked(sorted(keys))}.", 120, break_on_hyphens=False))
    if refused:
        lines = [f"| `{key}` | {reason} |" for key, reason in sorted(refused.items())]
        yield "\n".join(["| refused | why, and what to do |", "|---|---|", *lines])


GENERATED = {README: readme_table, ROOT / "docs" / "adapters.md": reference}


def generated(page: Path) -> str:
    """The page as it should be."""
    return FAMILIES.sub(lambda _: f"<!-- families -->\n{GENERATED[page]()}\n<!-- /families -->", page.read_text())


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_every_family_and_option_is_documented(page: Path) -> None:
    assert page.read_text() == generated(page), "run python tests/test_docs.py"
    assert set(known()) <= names(page.read_text())


def section(page: str, heading: str) -> str:
    return re.split(r"^#+ ", DOCS[page].partition(f"## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_keys_that_are_ignored_everywhere_are_documented() -> None:
    assert names(section("adapters", "Strictness")) >= options.IGNORED


def test_the_limits_of_files_are_as_documented() -> None:
    text = section("adapters", "What a file may be")
    for limit in (guard.MAX_CONFIG_BYTES, guard.MAX_BYTES, guard.MAX_HEADER_BYTES, guard.MAX_TENSORS):
        assert f"{limit:,} " in text
    for limit in (guard.MAX_CONFIG_DEPTH, guard.MAX_TENSOR_NAME, guard.MAX_DIMENSIONS):
        assert f"at most {limit} " in text
    assert all(name in text for name in (*guard.DTYPES, *guard.PICKLES))


if __name__ == "__main__":
    for page in GENERATED:
        page.write_text(generated(page))
