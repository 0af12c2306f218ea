from __future__ import annotations

import json

import pytest
import typer

README = "# A\n<!-- bench:latency -->\nold\n<!-- /bench -->\ntext\n<!-- bench:rivals --><!-- /bench -->\nend\n"


def common(benchmark: str, date: str, **workload: object) -> dict[str, object]:
    return {
        "benchmark": benchmark,
        "workload": {"size": "35m", "prompt": 64, "new": 8, **workload},
        "model": {"parameters": 34_000_000},
        "machine": {"cpu": "A cpu", "cores": 2, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "date": date,
        "answers": {"checked": 7, "wrong": 0},
    }


def latency(date: str, ms: float) -> dict[str, object]:
    lines = [
        {"cell": "base", "mode": "base", "ms_per_token": ms, "overhead_percent": 0.0},
        {"cell": "ia3 merged", "mode": "merged", "ms_per_token": 2 * ms, "overhead_percent": 100.0},
    ]
    lines = [line | {"batch": 1, "rounds": {"ms_per_token": [line["ms_per_token"]]}} for line in lines]
    return common("latency", date, batches=[1]) | {"results": lines, "floor": [{"batch": 1, "ms": 1.0}]}


def rivals(date: str) -> dict[str, object]:
    lines = [
        {"rival": "ours, uniform", "tokens_per_s": 400.0},
        {"rival": "PEFT, mixed batch", "tokens_per_s": 100.0},
    ]
    ratios = {"ours, uniform / PEFT, mixed batch": 4.0}
    return common("rivals", date, rows=32, adapters=16, rank=16, dtype="float32") | {"results": lines, "ratios": ratios}


@pytest.fixture
def files(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for name, result in {"a": latency("2026-01-02", 3.0), "b": latency("2026-01-01", 9.0), "c": rivals("2026")}.items():
        (results / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "README.md", results


def test_fills_both_places_from_the_newest(table, files):
    readme, results = files
    table.main(check=False, page=[readme], results=results)
    text = readme.read_text()
    assert "| base | 3 |" in text
    assert "| ia3 merged | 6 (+100 %) |" in text
    assert "| PEFT, mixed batch | 100 (4.00 ×) |" in text
    assert "7 answers checked, 0 wrong" in text
    assert "old" not in text
    assert text.startswith("# A\n")
    assert text.endswith("\nend\n")


def test_check_fails_until_it_is_written(table, files):
    readme, results = files
    with pytest.raises(typer.Exit) as left:
        table.main(check=True, page=[readme], results=results)
    assert left.value.exit_code == 1
    assert readme.read_text() == README
    table.main(check=False, page=[readme], results=results)
    table.main(check=True, page=[readme], results=results)


def test_a_place_without_results_is_left_alone(table, files):
    readme, results = files
    (results / "c.json").unlink()
    table.main(check=False, page=[readme], results=results)
    assert "<!-- bench:rivals --><!-- /bench -->" in readme.read_text()


def test_one_size_may_lack_a_rival(table, files):
    readme, results = files
    small = rivals("2026")
    small["workload"]["size"], small["model"] = "1m", {"parameters": 1_000_000}
    small["results"] = small["results"][:1]
    (results / "d.json").write_text(json.dumps(small))
    table.main(check=False, page=[readme], results=results)
    assert "| PEFT, mixed batch | – | 100 (4.00 ×) |" in readme.read_text()


def test_every_aim_has_its_figure_or_says_that_it_has_none(table, files):
    readme, results = files
    trace = common("trace", "2026") | {"warm_ratios": {"2000 / 5": 0.981}, "results": []}
    gpu = common("trace", "2026") | {"warm_ratios": {"2000 / 5": 0.99}}
    gpu["workload"]["size"], gpu["model"] = "8b", {"parameters": 8e9, "device": "cuda:0"}
    gpu["machine"]["gpu"] = "A card"
    for name, result in {"t": trace, "g": {"benchmark": "gpu", "parts": [gpu]}}.items():
        (results / f"{name}.json").write_text(json.dumps(result))
    readme.write_text("<!-- bench:targets --><!-- /bench -->")
    table.main(check=False, page=[readme], results=results)
    text = readme.read_text()
    assert "| ≥ 0.97 | 0.98 at 35m | ≥ 0.97 | 0.99 at 8b |" in text
    assert "| ≥ 3.5 at 35m, ≥ 2 at 200m | 4.00 at 35m | ≥ 10 | not measured |" in text
    assert "| aim, one H200 | measured, A card |" in text
    assert "| wrong answers, of those checked | 0 | 0 of 21 at 35m | 0 | 0 of 7 at 8b |" in text
    assert len(text.splitlines()) == len(table.TARGETS) + 4


CELLS = {  # of the table in which the aims were set, each by a word of its row
    "16 adapters, over the base": 1, "decode, 1 / 16 / 32": 1, "add to such a step": 1, "prefill": 1,
    "unmerged over merged": 1, "of the floor": 1, "`generate`": 1, "llama-server": 3, "PEFT": 2, "one stream": 1,
    "trace": 1, "p99": 1, "HTTP": 1, "ready": 1, "cold load": 1, "Punica": 1, "auto": 1, "wrong": 1, "trickle": 1,
}  # fmt: skip


def test_every_aim_has_a_row(table):
    for words, rows in CELLS.items():
        assert sum(words in what for what, *_ in table.TARGETS) == rows, words


def test_kinds_are_told_by_the_middle_and_the_dearest(table, files):
    readme, results = files
    costs = {"A": 2.0, "B": -1.0, "C": 31.0}
    made = common("kinds", "2026") | {
        "kinds": {kind: {"overhead": percent} for kind, percent in costs.items()},
        "all": {"overhead": 150.0},
    }
    (results / "k.json").write_text(json.dumps(made))
    readme.write_text("<!-- bench:targets --><!-- /bench -->")
    table.main(check=False, page=[readme], results=results)
    assert "one row of each kind, ms per token over the base | – | 1.02 / 1.31 / 2.50 at 35m |" in readme.read_text()


def popularities() -> dict[str, object]:
    """32 rows: 1 and 16 adapters, and the base."""
    steps = {"identical": [2.0, 4.0], "uniform": [4.0, 4.0], "distinct": [8.0, 8.0], "base": [2.0, 2.0]}
    aims = {"identical": (1, 0.2), "uniform": (16, 0.5), "distinct": (32, 0.8)}
    lines = [
        {"popularity": n, "tokens_per_s_over_base": 2 / ms[0], "rounds": {"ms_per_token": ms}}
        | ({"adapters": aims[n][0], "added_ms": ms[0] - 2, "added_aim_ms": aims[n][1]} if n in aims else {})
        for n, ms in steps.items()
    ]
    return {"popularity": {"8b": {"results": lines}}}


def test_what_adapters_cost_by_their_number(table):
    assert table.decode(popularities(), "8b") == "0.75 / 0.50 / 0.25"
    assert table.added(popularities(), "8b") == "0.00 of 0.20 ms / 2.00 of 0.50 ms / 6.00 of 0.80 ms"
    assert table.levelness(popularities(), "8b") == "0.25"
    assert [f(popularities(), "1b") for f in (table.decode, table.added, table.levelness)] == [None] * 3


def test_adapters_filed_in_16_bits_have_figures_of_their_own(table, files):
    _, results = files
    for name, more in {"p": {}, "q": {"filed": "bfloat16"}, "r": {"filed": None}}.items():
        made = common("popularity", f"2026-{name}", **more) | popularities()["popularity"]["8b"]
        (results / f"{name}.json").write_text(json.dumps(made))
    found = table.newest(results)
    assert {name: found[name]["35m"]["date"] for name in found if "popularity" in name} == {
        "popularity": "2026-r",
        "popularity bfloat16": "2026-q",
    }
    assert table.filed_in_16(table.decode)(found, "35m") == "0.75 / 0.50 / 0.25"
    assert table.filed_in_16(table.decode)({}, "35m") is None


def test_cold_loads_of_both_benchmarks_by_size(table):
    loads = [{"load_ms": 50.4, "file_bytes": 168e6}, {"load_ms": 15.0, "file_bytes": 42e6}]
    found = {"coldload": {"8b": {"results": loads}}, "hotload": {"8b": {"cold": {"load_ms": 9, "file_bytes": 2e7}}}}
    assert table.cold_load(found, "8b") == "9 ms for 20.0 MB, 15 ms for 42.0 MB, 50 ms for 168.0 MB"
    assert table.cold_load({}, "8b") is None


def test_prefill_and_fairness(table):
    lines = [{"over_base": 1.0}, {"over_base": 0.98}, {"over_base": 0.954}]
    ways = [{"way": "beside the flood", "ttft_over_alone": 1.5, "latency_over_alone": 2.25}, {"way": "alone"}]
    found = {"prefill": {"8b": {"results": lines}}, "fairness": {"8b": {"results": ways}}}
    assert (table.prefill(found, "8b"), table.trickle(found, "8b")) == ("0.98 / 0.95", "1.50 / 2.25")
    assert (table.prefill({}, "8b"), table.trickle({}, "8b")) == (None, None)


def test_unmerged_over_merged_is_of_the_rounds(table):
    lines = [
        {"cell": f"lora-r8 {mode}", "batch": 8, "rounds": {"ms_per_token": ms}}
        for mode, ms in (("unmerged", [2.0, 3.0, 9.0]), ("merged", [1.0, 2.0, 9.0]))
    ]
    assert table.unmerged_over_merged({"latency": {"35m": {"results": lines}}}, "35m") == "– / 1.50 / –"


def test_the_committed_pages_are_what_the_results_say(table):
    table.main(check=True, page=None, results=table.ROOT / "benchmarks" / "results")
