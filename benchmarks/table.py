"""The README's measured tables, from the newest committed results.

Each stands between a marker such as <!-- bench:latency --> and <!-- /bench -->. With --check nothing is written, and
the exit status is 1 if README.md is not what the results say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
Result = Mapping[str, Any]


def newest(results: Path) -> dict[str, dict[str, Result]]:
    """By benchmark and size, the result with the latest date."""
    found: dict[str, dict[str, Result]] = {}
    for result in sorted((json.loads(p.read_text()) for p in results.glob("*.json")), key=lambda r: str(r["date"])):
        found.setdefault(result["benchmark"], {})[result["workload"]["size"]] = result
    return found


def latency(sizes: Mapping[str, Result]) -> str:
    """One table per size: kinds down, batch sizes across."""
    return "\n\n".join(_latency(result) for result in _by_parameters(sizes))


def _latency(result: Result) -> str:
    batches = result["workload"]["batches"]
    rows = [["", *(f"batch {batch}" for batch in batches)]]
    labels = dict.fromkeys(line["cell"] for line in result["results"])
    rows += [[label, *(_cell(line) for line in result["results"] if line["cell"] == label)] for label in labels]
    rows.append(["floor", *(f"{each['ms']:.3g}" for each in result["floor"])])
    work = result["workload"]
    about = (
        f"**{_model(result)}**, prompt {work['prompt']}, {work['new']} new tokens: ms per token, and its overhead over "
        f"the base. {_source(result)}"
    )
    return f"{about}\n\n{_markdown(rows)}"


def _cell(line: Result) -> str:
    extra = "" if line["mode"] == "base" else f" ({line['overhead_percent']:+.0f} %)"
    return f"{line['ms_per_token']:.3g}{extra}"


def rivals(sizes: Mapping[str, Result]) -> str:
    """One table: rivals down, sizes across, in tokens per second end to end."""
    results = _by_parameters(sizes)
    labels = dict.fromkeys(line["rival"] for result in results for line in result["results"])
    rows = [["tokens/s", *(_model(result) for result in results)]]
    rows += [[label, *(_speed(result, label) for result in results)] for label in labels]
    work = results[0]["workload"]
    about = (
        f"{work['rows']} rows, {work['adapters']} LoRA adapters r={work['rank']} on all linears ({work['rows']} where "
        f"they are distinct), prompt {work['prompt']}, {work['new']} new tokens, float32; in brackets: how many times "
        "faster `ours, uniform` is. " + " ".join(dict.fromkeys(_source(result) for result in results))
    )
    return f"{about}\n\n{_markdown(rows)}"


def _speed(result: Result, label: str) -> str:
    line = next((line for line in result["results"] if line["rival"] == label), None)
    ratio = result["ratios"].get(f"ours, uniform / {label}")
    if line is None:
        return "–"
    return f"{line['tokens_per_s']:.0f}" + ("" if ratio is None else f" ({ratio:.2f} ×)")


def _by_parameters(sizes: Mapping[str, Result]) -> list[Result]:
    return sorted(sizes.values(), key=lambda result: int(result["model"]["parameters"]))


def _model(result: Result) -> str:
    return f"{result['workload']['size']} ({result['model']['parameters'] / 1e6:.1f}M parameters)"


def _source(result: Result) -> str:
    machine, versions, answers = result["machine"], result["versions"], result["answers"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, commit {result['commit']}, "
        f"{result['date'][:10]}; {answers['checked']} answers checked, {answers['wrong']} wrong."
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


TABLES: Mapping[str, Callable[[Mapping[str, Result]], str]] = {"latency": latency, "rivals": rivals}


def filled(readme: str, results: Mapping[str, Mapping[str, Result]]) -> str:
    """The README with every marked place filled that has results."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in results:
            return match[0]
        return f"<!-- bench:{name} -->\n{TABLES[name](results[name])}\n<!-- /bench -->"

    marked = "|".join(TABLES)
    return re.sub(rf"<!-- bench:({marked}) -->.*?<!-- /bench -->", fill, readme, flags=re.DOTALL)


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit status 1 if README.md is old")] = False,
    readme: Annotated[Path, typer.Option(help="The file with the markers")] = ROOT / "README.md",
    results: Annotated[Path, typer.Option(help="The folder of results")] = ROOT / "benchmarks" / "results",
) -> None:
    """Fill the README's tables from the newest results."""
    old = readme.read_text()
    new = filled(old, newest(results))
    if check and new != old:
        typer.echo(f"{readme.name} is not what the results say: run python benchmarks/table.py", err=True)
        raise typer.Exit(1)
    if new != old:
        readme.write_text(new)


if __name__ == "__main__":
    typer.run(main)
