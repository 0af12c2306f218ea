"""The measured tables of README.md and docs/performance.md, from the newest committed results.

Each stands between a marker such as <!-- bench:latency --> and <!-- /bench -->. With --check nothing is written, and
the exit status is 1 if a page is not what the results say.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
Result = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Result]]
Figure = Callable[[Results, str], str | None]  # of these results at a size; None: not measured


def newest(results: Path, device: str = "cpu") -> Results:
    """By benchmark and size, the result with the latest date on this kind of device. Where adapters are not filed in
    the base's format, the benchmark has theirs in its name.
    """
    read = [json.loads(path.read_text()) for path in results.glob("*.json")]
    parts = [part for result in read for part in result.get("parts", [result])]
    found: dict[str, dict[str, Result]] = {}
    for result in sorted(parts, key=lambda result: str(result["date"])):
        if str(result["model"].get("device", "cpu")).startswith(device):
            work = result["workload"]
            benchmark = " ".join([result["benchmark"], *filter(None, [work.get("filed")])])
            found.setdefault(benchmark, {})[work["size"]] = result
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
    new = " and ".join(dict.fromkeys(f"{result['workload']['new']}" for result in results))
    about = (
        f"{work['rows']} rows, {work['adapters']} LoRA adapters r={work['rank']} on all linears ({work['rows']} where "
        f"they are distinct), prompt {work['prompt']}, {new} new tokens, {work['dtype']}; in brackets: how "
        "many times faster `ours, uniform` is. " + " ".join(dict.fromkeys(_source(result) for result in results))
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


# What was aimed at


def ratio(benchmark: str, name: str, form: str = "{:.2f}", under: str = "ratios") -> Figure:
    """One of the ratios that a result states."""

    def figure(results: Results, size: str) -> str | None:
        value = results.get(benchmark, {}).get(size, {}).get(under, {}).get(name)
        return None if value is None else form.format(value)

    return figure


def unmerged_over_merged(results: Results, size: str) -> str | None:
    """LoRA's ms per token at batch 1, 8 and 32, the medians of the rounds' own ratios."""
    if (result := results.get("latency", {}).get(size)) is None:
        return None
    lines = {(line["cell"], line["batch"]): line["rounds"]["ms_per_token"] for line in result["results"]}
    pairs = [(lines.get(("lora-r8 unmerged", b)), lines.get(("lora-r8 merged", b))) for b in (1, 8, 32)]
    return " / ".join("–" if own is None or base is None else f"{_median(own, base):.2f}" for own, base in pairs)


def _median(own: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def decode_of_floor(results: Results, size: str) -> str | None:
    """The floor's ms over the base's at batch 1, 8 and 32."""
    if (result := results.get("latency", {}).get(size)) is None:
        return None
    base = {line["batch"]: line["ms_per_token"] for line in result["results"] if line["mode"] == "base"}
    floor = {each["batch"]: each["ms"] for each in result["floor"]}
    return " / ".join("–" if b not in base else f"{floor[b] / base[b]:.2f}" for b in (1, 8, 32))


def field(benchmark: str, *path: str, form: str = "{:.2f}") -> Figure:
    """A figure of a result by its path."""

    def figure(results: Results, size: str) -> str | None:
        value: Any = results.get(benchmark, {}).get(size)
        for name in path:
            value = None if value is None else value.get(name)
        return None if value is None else form.format(value)

    return figure


def cold_load(results: Results, size: str) -> str | None:
    """By the size of the file, the smallest first."""
    found = [results.get("hotload", {}).get(size, {}).get("cold")]
    found += results.get("coldload", {}).get(size, {}).get("results", ())
    loads = sorted((each for each in found if each is not None), key=lambda each: int(each["file_bytes"]))
    return ", ".join(f"{each['load_ms']:.0f} ms for {each['file_bytes'] / 1e6:.1f} MB" for each in loads) or None


POPULARITIES = ("identical", "uniform", "distinct")  # 1, 16 and 32 adapters


def _popularity(results: Results, size: str, benchmark: str = "popularity") -> Mapping[str, Result]:
    lines = results.get(benchmark, {}).get(size, {}).get("results", ())
    return {line["popularity"]: line for line in lines}


def decode(results: Results, size: str, benchmark: str = "popularity") -> str | None:
    """The base's ms per step over that of 32 rows on 1, 16 and 32 adapters."""
    if not (lines := _popularity(results, size, benchmark)):
        return None
    steps = {name: line["rounds"]["ms_per_token"] for name, line in lines.items()}
    return " / ".join(f"{_median(steps['base'], steps[name]):.2f}" for name in POPULARITIES)


def added(results: Results, size: str, benchmark: str = "popularity") -> str | None:
    """What 1, 16 and 32 adapters add to a step, each beside its aim."""
    found = _popularity(results, size, benchmark).items()
    lines = [line for name, line in found if name in POPULARITIES and "added_ms" in line]
    lines.sort(key=lambda line: int(line["adapters"]))
    return " / ".join(f"{line['added_ms']:.2f} of {line['added_aim_ms']:.2f} ms" for line in lines) or None


def filed_in_16(figure: Callable[..., str | None]) -> Figure:
    """The same of adapters whose files are in bfloat16 over a base in float32."""
    return lambda results, size: figure(results, size, "popularity bfloat16")


def levelness(results: Results, size: str) -> str | None:
    """tokens/s at the worst popularity over the best."""
    speeds = [line["tokens_per_s_over_base"] for n, line in _popularity(results, size).items() if n != "base"]
    return f"{min(speeds) / max(speeds):.2f}" if speeds else None


def by_kind(results: Results, size: str) -> str | None:
    """ms per token over the base's: of the kind in the middle and of the dearest, and of all in one batch."""
    if (found := results.get("kinds", {}).get(size)) is None:
        return None
    each = sorted(1 + line["overhead"] / 100 for line in found["kinds"].values())
    return f"{statistics.median(each):.2f} / {each[-1]:.2f} / {1 + found['all']['overhead'] / 100:.2f}"


def prefill(results: Results, size: str) -> str | None:
    """Prompts on one adapter and on all."""
    lines = results.get("prefill", {}).get(size, {}).get("results", ())
    return " / ".join(f"{line['over_base']:.2f}" for line in lines[1:]) or None


def trickle(results: Results, size: str) -> str | None:
    """Of one adapter's requests beside another's flood, over the same alone: first token / completion."""
    lines = results.get("fairness", {}).get(size, {}).get("results", ())
    found = [line for line in lines if line["way"] == "beside the flood"]
    return "".join(f"{line['ttft_over_alone']:.2f} / {line['latency_over_alone']:.2f}" for line in found) or None


def wrong(results: Results, size: str) -> str | None:
    """Over all benchmarks of the size."""
    found = [sizes[size]["answers"] for sizes in results.values() if size in sizes]
    count, of = (sum(each[name] for each in found) for name in ("wrong", "checked"))
    return f"{count:,} of {of:,}" if found else None


def auto(results: Results, size: str) -> str | None:
    """The worst over the shares of the dominant adapter."""
    lines = results.get("skew", {}).get(size, {}).get("results", ())
    worst = [min(line["over_unmerged"], line["over_merged"]) for line in lines if line["way"] == "auto"]
    return f"{min(worst):.2f}" if worst else None


LLAMA = "llama-server f32"
TARGETS: Sequence[tuple[str, str, str, Figure]] = (
    # what, aim on two CPU cores, aim on one GPU, figure
    (
        "32 rows on 16 adapters, over the base alone, end to end",
        "≥ 0.90 at 200m, ≥ 0.85 at 35m",
        "–",
        ratio("rivals", "ours, uniform / ours, base"),
    ),
    (
        "32 rows on 32 adapters, over the base alone, end to end",
        "–",
        "–",
        ratio("rivals", "ours, distinct / ours, base"),
    ),
    ("the same of steps that decode, 1 / 16 / 32 adapters", "–", "≥ 0.95 / 0.88 / 0.82 at 8b", decode),
    (
        "ms that 1 / 16 / 32 adapters add to such a step",
        "–",
        "≤ 1.5 × their bytes / bandwidth + 0.15 ms",
        added,
    ),
    (
        "steps that decode, adapters filed in bfloat16, 1 / 16 / 32, over the base",
        "–",
        "–",
        filed_in_16(decode),
    ),
    ("ms that adapters filed in bfloat16 add, 1 / 16 / 32", "–", "–", filed_in_16(added)),
    ("worst popularity over the best, tokens/s (Punica's four)", "–", "–", levelness),
    (
        "four rows of the middle / the dearest kind, and one row of each kind, ms per token over the base",
        "–",
        "–",
        by_kind,
    ),
    ("prefill on 1 / 16 adapters over the base alone, tokens/s", "–", "≥ 0.95 at 8b", prefill),
    (
        "LoRA unmerged over merged, ms per token, batch 1 / 8 / 32",
        "≤ 1.15 / 1.10 / 1.10",
        "≤ 1.05 at 8b; ≤ 1.20 at 0.6b and batch 1",
        unmerged_over_merged,
    ),
    (
        "base over transformers' `generate`",
        "≥ 1.2",
        "–",
        ratio("rivals", "ours, base / transformers, base"),
    ),
    (
        "base over llama-server in float32",
        "≥ 0.8 at 35m, ≥ 1.1 at 200m",
        "–",
        ratio("rivals", f"ours, base / {LLAMA}, base"),
    ),
    (
        "base decode, of the floor, batch 1 / 8 / 32",
        "–",
        "≥ 0.75 at 8b; ≥ 0.50 at 1b and batch 1; ≥ 0.30 / – / 0.55 at 0.6b",
        decode_of_floor,
    ),
    (
        "16 adapters over PEFT's mixed batch",
        "≥ 3.5 at 35m, ≥ 2 at 200m",
        "≥ 10",
        ratio("rivals", "ours, uniform / PEFT, mixed batch"),
    ),
    (
        "16 adapters over PEFT one at a time",
        "≥ 10 at 35m, ≥ 12 at 200m",
        "≥ 30",
        ratio("rivals", "ours, uniform / PEFT, one at a time"),
    ),
    (
        "16 adapters over llama-server in float32",
        "≥ 3",
        "–",
        ratio("rivals", f"ours, uniform / {LLAMA}, 16 adapters"),
    ),
    (
        "one stream, ms per token over llama-server's in float32",
        "≤ 1.3 at 200m",
        "–",
        ratio("rivals", f"one stream, ms per token, ours / {LLAMA}"),
    ),
    (
        "S-LoRA's trace, 2,000 registered adapters over 5, requests/s",
        "≥ 0.97",
        "≥ 0.97",
        ratio("trace", "2000 / 5", under="warm_ratios"),
    ),
    ("the same, every adapter on disk at first", "–", "–", ratio("trace", "2000 / 5")),
    (
        "S-LoRA's requests/s, 2,000 adapters over 5, filed in bfloat16, from main memory",
        "–",
        "–",
        ratio("trace bfloat16", "2000 / 5", under="warm_ratios"),
    ),
    ("auto over the better fixed mode, at the worst skew", "≥ 0.97", "≥ 0.97", auto),
    (
        "p99 inter-token latency while adapters load, over without",
        "≤ 1.5",
        "≤ 1.1",
        field("hotload", "itl_p99_ratio"),
    ),
    (
        "HTTP, events and metrics: share of a step at 64 streams",
        "≤ 0.10",
        "≤ 0.05",
        field("popularity", "http_share", "share"),
    ),
    ("engine ready after the base is loaded", "< 1 s", "< 1 s + graphs", field("hotload", "ready_s", form="{:.2f} s")),
    (
        "an adapter's cold load, file in the page cache",
        "< 50 ms for 2 MB",
        "< 20 ms for 40 MB, < 60 ms for 168 MB",
        cold_load,
    ),
    ("a trickle beside another adapter's flood, over alone, first token / completion", "–", "–", trickle),
    ("wrong answers, of those checked", "0", "0", wrong),
)
UNMEASURED = "not measured"


def targets(cpu: Results, gpu: Results) -> str:
    """Each aim with the figure beside it, by size."""
    rows = [["", "aim, two CPU cores", "measured", "aim, one H200", ", ".join(["measured", *_devices(gpu)])]]
    rows += [
        [what, aim, _figures(figure, cpu), gpu_aim, _figures(figure, gpu)] for what, aim, gpu_aim, figure in TARGETS
    ]
    return _markdown(rows)


def _devices(results: Results) -> list[str]:
    """The devices' names: an aim of one card may have been tried on another."""
    return sorted({result["machine"]["gpu"] for sizes in results.values() for result in sizes.values()})


def _figures(figure: Figure, results: Results) -> str:
    sizes = {size: r["model"]["parameters"] for found in results.values() for size, r in found.items()}
    names = sorted(sizes.keys() - {"tiny"}, key=lambda size: int(sizes[size]))
    found = [(size, figure(results, size)) for size in names]
    return "; ".join(f"{value} at {size}" for size, value in found if value is not None) or UNMEASURED


TABLES: Mapping[str, Callable[[Mapping[str, Result]], str]] = {"latency": latency, "rivals": rivals}


def filled(page: str, cpu: Results, gpu: Results) -> str:
    """The page with every marked place filled that has results."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name != "targets" and name not in cpu:
            return match[0]
        text = targets(cpu, gpu) if name == "targets" else TABLES[name](cpu[name])
        return f"<!-- bench:{name} -->\n{text}\n<!-- /bench -->"

    marked = "|".join((*TABLES, "targets"))
    return re.sub(rf"<!-- bench:({marked}) -->.*?<!-- /bench -->", fill, page, flags=re.DOTALL)


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit status 1 if a page is old")] = False,
    page: Annotated[
        list[Path] | None, typer.Option(help="A file with markers", show_default="README, performance")
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder of results")] = ROOT / "benchmarks" / "results",
) -> None:
    """Fill the pages' tables from the newest results."""
    cpu, gpu = newest(results), newest(results, "cuda")
    for each in page or PAGES:
        old = each.read_text()
        new = filled(old, cpu, gpu)
        if check and new != old:
            typer.echo(f"{each.name} is not what the results say: run python benchmarks/table.py", err=True)
            raise typer.Exit(1)
        if new != old:
            each.write_text(new)


if __name__ == "__main__":
    typer.run(main)
