from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from adapter_server.bench import cells, command, latency, plots, report, workloads
from adapter_server.bench.drive import Ask, Checker, drive, first_difference, gap, ready
from adapter_server.bench.workloads import Shape, Workload, choose, prompts
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine, build
from adapter_server.errors import InvalidRequest
from adapter_server.registry.store import Store

NEW = 5


@pytest.fixture(scope="module")
def workload() -> Iterator[Workload]:
    with workloads.one_of_each("tiny") as made:
        yield made


@pytest.fixture(scope="module")
def engine(workload: Workload) -> Iterator[Engine]:
    config = EngineConfig(kv_bytes=16 << 20, max_model_len=64, device="cpu")
    engine = build(workload.model, config, Store(workload.adapters, settle_s=0))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object], Path]:
    """(last line of stdout, the file of the result, the folder with it and the plot)."""
    folder = tmp_path_factory.mktemp("latency")
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as left:
        command.main("latency", ["--size", "tiny", "--quick", "--http", "--out", str(folder)])
    assert left.value.code == 0
    (file,) = folder.glob("????-??-??-latency-tiny.json")
    return stdout.getvalue().splitlines()[-1], json.loads(file.read_text()), folder


def test_the_last_line_is_the_result(result):
    line, written, folder = result
    assert json.loads(line) == written
    (plot,) = folder.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_every_cell_has_its_figures(result):
    _, found, _ = result
    for over in ("results", "http"):
        cells = Counter((line["kind"], line["mode"]) for line in found[over])
        assert cells == dict.fromkeys(latency.LINES, 2)
        for line in found[over]:
            assert line["ttft_ms"] > 0
            assert line["ms_per_token"] > 0
            assert len(line["rounds"]["ms_per_token"]) == found["workload"]["rounds"]
            assert line["mode"] != "base" or line["overhead_percent"] == 0


def test_a_result_says_where_it_comes_from(result):
    _, found, _ = result
    assert found["versions"].keys() == {"python", "adapter-server", "torch", "transformers", "peft"}
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["measured"]["bytes_per_s"] > 0
    assert [each["batch"] for each in found["floor"]] == found["workload"]["batches"]
    assert {"commit", "dirty", "date"} <= found.keys()


def test_a_result_names_no_path(result, workload):
    line, _, _ = result
    assert str(workload.model.parents[1]) not in line
    assert "/tmp" not in line


def test_answers_are_right_and_were_all_checked(result):
    _, found, _ = result
    answers = found["answers"]
    assert answers["checked"] == 2 * len(latency.LINES) * sum(found["workload"]["batches"])
    assert (answers["wrong"], answers["differing"]) == (0, [])


def test_a_wrong_answer_is_counted(engine, workload):
    asks = [Ask(prompt, "lora-r8") for prompt in prompts(2, 8, 256)]
    for ask in asks:
        ready(engine, ask)
    checker, run = Checker(partial(gap, engine)), drive(engine, asks, NEW)
    checker.check(asks, run.answers)
    spoilt = (*run.answers[1][:3], run.answers[1][3] ^ 1, *run.answers[1][4:])
    checker.check(asks, [run.answers[0], spoilt])
    checker.check(asks, [run.answers[0], run.answers[1][:-1]])
    assert (checker.checked, checker.wrong) == (6, 2)
    assert [each["at"] for each in checker.differing] == [3, NEW - 1]
    assert checker.summary["near_ties"] == 0


def test_the_other_mode_is_held_to_the_same_answers(engine, workload):
    asks = {mode: [Ask(prompt, "lora-r8", mode) for prompt in prompts(2, 8, 256)] for mode in ("unmerged", "merged")}
    checker = Checker(partial(gap, engine))
    for each in asks.values():
        ready(engine, each[0])
        checker.check(each, drive(engine, each, NEW).answers)
    assert (checker.checked, checker.wrong, len(checker.first)) == (4, 0, 2)


def test_a_near_tie_is_not_a_wrong_answer():
    checker = Checker(lambda ask, known: 0.0)
    checker.checked = 3
    checker.differing = [{"gap": 1e-7}, {"gap": 0.2}, {"gap": None}]
    assert checker.wrong == 2
    assert checker.summary["near_ties"] == 1


def test_the_gap_is_that_of_the_two_likeliest_tokens(engine):
    prompt = prompts(1, 8, 256)[0]
    known = drive(engine, [Ask(prompt)], 2).answers[0][:1]
    assert gap(engine, Ask(prompt), known) == pytest.approx(gap(engine, Ask(prompt + known), ()), abs=1e-5)


def test_first_difference():
    assert first_difference((1, 2), (1, 2)) is None
    assert first_difference((1, 2, 3), (1, 9, 3)) == 1
    assert first_difference((1, 2), (1, 2, 3)) == 2


def test_every_adapter_changes_the_answers(engine, workload):
    """Or else a benchmark that lost the adapter would see nothing."""
    asked = prompts(4, 8, 256)
    plain = drive(engine, [Ask(prompt) for prompt in asked], NEW).answers
    for name in workload.kinds.values():
        ready(engine, Ask((), name))
        assert drive(engine, [Ask(prompt, name) for prompt in asked], NEW).answers != plain, name


def test_a_failed_request_is_an_error(engine):
    with pytest.raises(InvalidRequest):
        drive(engine, [Ask(())], NEW)


def test_overhead_is_the_median_of_the_rounds_ratios():
    assert cells.overhead([11.0, 24.0, 50.0], [10.0, 20.0, 100.0]) == pytest.approx(10)


def test_the_order_turns():
    assert sorted(cells.turned("abcdefghij", 1)) == list("abcdefghij")
    assert cells.turned("abc", 0) != cells.turned("abc", 1)


def test_the_floor_by_hand():
    # hidden 8, 2 layers, 2 heads of 4, 1 kv head, mlp 16, vocab 10
    shape = Shape(8, 2, 2, 1, 16, 10, 4)
    layer = 8 * 8 + 2 * (8 * 4) + 8 * 8 + 3 * (8 * 16)  # q, k and v, o, gate and up and down
    weights = 2 * layer + 8 * 10
    found = report.floor(shape, rows=3, context=5)
    assert found.weight_bytes == 4 * weights
    assert found.kv_bytes == 3 * 5 * 2 * (4 + 4) * 4
    assert found.flops == 3 * 2 * weights + 3 * 2 * (2 * 5 * 8 + 2 * 5 * 8)  # scores, and weighted values
    assert found.ms(1000.0, 1e12) == found.weight_bytes + found.kv_bytes
    assert found.ms(1e12, 1000.0) == found.flops


def test_the_floor_of_prompts_by_hand():
    # hidden 8, 2 layers, 2 heads of 4, 1 kv head, mlp 16, vocab 10; three prompts of six tokens
    shape = Shape(8, 2, 2, 1, 16, 10, 4)
    body = 2 * (8 * 8 + 2 * (8 * 4) + 8 * 8 + 3 * (8 * 16))
    found = report.prefill_floor(shape, rows=3, prompt=6)
    assert found.weight_bytes == 4 * (body + 8 * 10)
    assert found.kv_bytes == 3 * 6 * 2 * (4 + 4) * 4
    scores_and_values = 2 * (2 * 2 * 8 * 18)  # 6·6/2 pairs of a query and a key that it sees, both products, 2 layers
    assert found.flops == 3 * (6 * 2 * body + 2 * 8 * 10 + scores_and_values)


def test_the_floor_of_adapters_by_hand():
    shape = Shape(8, 1, 2, 1, 16, 10, 4)
    sides = (8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16)
    plain, three = report.floor(shape, rows=4, context=5), report.floor(shape, rows=4, context=5, adapters=3, rank=2)
    assert three.adapter_bytes == 3 * 2 * sides * 4
    assert three.flops - plain.flops == 4 * 2 * 2 * sides
    assert (plain.adapter_bytes, three.kv_bytes) == (0, plain.kv_bytes)
    assert report.floor(shape, rows=4, context=5, adapters=3, rank=2, held=2).adapter_bytes == three.adapter_bytes / 2


def test_the_floor_counts_the_weights_of_the_model(engine, workload):
    embedding = workload.shape.vocab * workload.shape.hidden
    norms = (2 * workload.shape.layers + 1) * workload.shape.hidden
    assert report.floor(workload.shape, 1, 1).weight_bytes == 4 * (engine.info.parameters - embedding - norms)
    assert Shape.read(workload.model) == workload.shape


def test_rates_are_those_of_the_better_moment():
    assert report.faster({"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 3.0}) == {"a": 2.0, "b": 4.0}


def test_popularity():
    assert choose("identical", 5, 3) == [0] * 5
    assert sorted(choose("distinct", 5, 9)) == [0, 1, 2, 3, 4]
    assert set(Counter(choose("uniform", 32, 16)).values()) == {2}
    with pytest.raises(InvalidRequest, match="need 5"):
        choose("distinct", 5, 4)


def test_skew_follows_zipf():
    rows, adapters = 20_000, 8
    counts = Counter(choose("skewed", rows, adapters))
    total = sum((k + 1) ** -1.5 for k in range(adapters))
    for k in range(adapters):
        expected = (k + 1) ** -1.5 / total
        assert counts[k] / rows == pytest.approx(expected, abs=4 * (expected / rows) ** 0.5)


def test_prompts_repeat_and_extend():
    assert prompts(2, 4, 100) == prompts(5, 4, 100)[:2]
    assert len(set(prompts(5, 4, 100))) == 5


def test_the_demos_adapters_are_found_by_kind(tmp_path):
    configs = {
        "a": {"peft_type": "LORA", "r": 8, "use_rslora": True},
        "b": {"peft_type": "LORA", "r": 8},
        "c": {"peft_type": "LORA", "r": 8, "use_dora": True},
        "d": {"peft_type": "P_TUNING"},
        "e": {"peft_type": "PREFIX_TUNING"},
        "f": {"peft_type": "LORA", "r": 8},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    assert workloads.demo_kinds(tmp_path) == {"lora-r8": "b", "dora-r8": "c", "prefix": "e"}


def test_an_unknown_size_is_refused():
    with pytest.raises(InvalidRequest, match="35m"), workloads.random_base("36m", 0):
        pass


def test_a_missing_matplotlib_is_said_before_the_run(monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=r"adapter-server\[bench\]"):
        latency.latency(size="tiny")
