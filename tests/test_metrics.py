"""What Prometheus reads, and what never becomes a label."""

from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from adapter_server.core import Finished, Folded, Loaded, Member, Request, Resident, Spec, Stats, Token
from adapter_server.errors import RequestFailed
from adapter_server.metrics import NAMESPACE, Metrics

SPEC = Spec("shout", "1f2e3d4c5b6a", "/adapters/shout", "LORA", {}, 4096)


def ask(metrics: Metrics, id: str = "r", *members: Member, mode: str = "unmerged", tokens: int = 2) -> None:
    metrics.admitted(Request(id, (1, 2, 3), members=members, mode=mode if members else "base"))  # type: ignore[arg-type]
    metrics.observe([Token(id, index, 5) for index in range(tokens)])


def samples(metrics: Metrics, stats: Stats | None = None) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(
        metrics.render(stats or Stats(), {"shout": SPEC, "pirate": None}).decode()
    )
    return {(s.name, tuple(sorted(s.labels.values()))): s.value for family in families for s in family.samples}


def test_a_request_is_counted_under_its_adapter_and_mode() -> None:
    metrics = Metrics()
    ask(metrics, "a", Member(SPEC), mode="merged")
    metrics.observe([Finished("a", "length", completion_tokens=2, queue_s=0.003, total_s=0.02)])
    found = samples(metrics)
    assert found["adapter_server_requests_total", ("length", "merged", "shout")] == 1
    assert found["adapter_server_tokens_total", ("prompt", "shout")] == 3
    assert found["adapter_server_tokens_total", ("generated", "shout")] == 2
    assert found["adapter_server_ttft_seconds_count", ("merged",)] == 1
    assert found["adapter_server_inter_token_seconds_count", ("merged",)] == 1
    assert found["adapter_server_queue_seconds_sum", ("merged",)] == 0.003
    assert found["adapter_server_request_seconds_sum", ("merged",)] == 0.02


def test_a_request_of_mode_auto_is_counted_under_what_became_of_it() -> None:
    metrics = Metrics()
    metrics.admitted(Request("a", (1, 2, 3), members=(Member(SPEC),), mode="auto"))
    metrics.observe([Token("a", 0, 5, mode="merged"), Token("a", 1, 5), Finished("a", "length", mode="merged")])
    found = samples(metrics, Stats(decisions={"merged": 3, "unmerged": 1}))
    for name in ("ttft_seconds_count", "inter_token_seconds_count", "request_seconds_count", "queue_seconds_count"):
        assert found[f"adapter_server_{name}", ("merged",)] == 1
    assert found["adapter_server_requests_total", ("length", "merged", "shout")] == 1
    assert found["adapter_server_auto_decisions_total", ("merged",)] == 3
    assert found["adapter_server_auto_decisions_total", ("unmerged",)] == 1
    assert not [labels for _, labels in found if "auto" in labels]


def test_the_base_model_has_a_label_of_its_own() -> None:
    metrics = Metrics()
    ask(metrics)
    metrics.observe([Finished("r", "error", RequestFailed("no"))])
    assert samples(metrics)["adapter_server_requests_total", ("base", "base", "request_failed")] == 1


def test_a_composition_counts_for_each_member() -> None:
    metrics = Metrics()
    other = Spec("pirate", "000000000000", "", "LORA", {}, 0)
    ask(metrics, "r", Member(SPEC, 0.5), Member(other, 0.5))
    found = samples(metrics)
    assert found["adapter_server_tokens_total", ("prompt", "shout")] == 3
    assert found["adapter_server_tokens_total", ("generated", "pirate")] == 2


def test_a_removed_adapter_leaves_no_series_and_late_events_bring_none_back() -> None:
    metrics = Metrics()
    ask(metrics, "a", Member(SPEC))
    metrics.observe([Finished("a", "eos")])
    ask(metrics, "late", Member(SPEC))
    metrics.forget("shout")
    metrics.observe([Token("late", 2, 5), Finished("late", "eos")])
    assert not [labels for _, labels in samples(metrics) if "shout" in labels]
    ask(metrics, "again", Member(SPEC))
    assert samples(metrics)["adapter_server_tokens_total", ("prompt", "shout")] == 3


def test_news_of_adapters_are_timed() -> None:
    metrics = Metrics()
    metrics.observe([Loaded("shout", "1", 0.2), Loaded("shout", "1", 0.1, "no"), Folded("shout", "1", 0.004)])
    found = samples(metrics)
    assert found["adapter_server_adapter_load_seconds_count", ("ok",)] == 1
    assert found["adapter_server_adapter_load_seconds_count", ("failed",)] == 1
    assert found["adapter_server_snapshot_seconds_bucket", ("0.005", "ok")] == 1
    assert found["adapter_server_snapshot_seconds_bucket", ("0.003", "ok")] == 0


def test_gauges_show_the_engine_as_it_is() -> None:
    metrics = Metrics()
    held = (
        Resident("shout", "1", "ready", "LORA", bytes=10, snapshot_bytes=7),
        Resident("b", "1", "loading", "LORA", bytes=5),
    )
    stats = Stats(running=3, waiting=2, kv_used_tokens=9, kv_total_tokens=99, preemptions=4, steps=50, residents=held)
    samples(metrics, stats)
    found = samples(metrics, stats)
    assert found["adapter_server_requests_running", ()] == 3
    assert found["adapter_server_requests_waiting", ()] == 2
    assert found["adapter_server_kv_tokens_used", ()] == 9
    assert found["adapter_server_kv_tokens_capacity", ()] == 99
    assert found["adapter_server_preemptions_total", ()] == 4
    assert found["adapter_server_steps_total", ()] == 50
    assert found["adapter_server_adapters", ("disk", "registered")] == 1
    assert found["adapter_server_adapters", ("disk", "refused")] == 1
    assert found["adapter_server_adapters", ("device", "ready")] == 1
    assert found["adapter_server_adapters", ("device", "loading")] == 1
    assert found["adapter_server_adapter_bytes", ("disk",)] == 4096
    assert found["adapter_server_adapter_bytes", ("device",)] == 15
    assert found["adapter_server_adapter_bytes", ("snapshot",)] == 7


def test_every_name_has_the_prefix() -> None:
    metrics = Metrics()
    metrics.build.info({"version": "1"})
    assert all(name.startswith(f"{NAMESPACE}_") for name, _ in samples(metrics))


def test_events_of_strangers_are_ignored() -> None:
    metrics = Metrics()
    before = samples(metrics)
    metrics.observe([Token("nobody", 0, 1), Finished("nobody", "eos")])
    same = {key: value for key, value in samples(metrics).items() if "process" not in key[0]}
    assert same == {key: value for key, value in before.items() if "process" not in key[0]}


def test_a_late_admission_of_a_removed_adapter_is_forgotten_when_read() -> None:
    metrics = Metrics()
    ask(metrics, "r", Member(Spec("gone", "000000000000", "", "LORA", {}, 0)))
    assert not [labels for _, labels in samples(metrics) if "gone" in labels]


def test_a_gateway_reads_one_sample_of_each_name_it_knows() -> None:
    metrics = Metrics(gateway=True)
    held = (
        Resident("shout", "2", "ready", "LORA"),
        Resident("shout", "1", "loading", "LORA"),
        Resident("a", "1", "ready", "LORA", waiting=1),
        Resident("c", "1", "loading", "LORA"),
    )
    samples(metrics)
    found = samples(metrics, Stats(running=3, waiting=2, kv_used_tokens=5, kv_total_tokens=20, residents=held))
    ours = {name: (labels, value) for (name, labels), value in found.items() if name.startswith("vllm:")}
    assert ours["vllm:num_requests_running"] == ((), 3)
    assert ours["vllm:num_requests_waiting"] == ((), 2)
    assert ours["vllm:kv_cache_usage_perc"] == ((), 0.25)
    labels, when = ours["vllm:lora_requests_info"]
    assert labels == ("3", "a,shout", "c")
    assert abs(when - time.time()) < 60
    assert len(ours) == len([name for name, _ in found if name.startswith("vllm:")]) == 4


def test_a_gateways_names_are_off_unless_asked_for() -> None:
    assert not [name for name, _ in samples(Metrics()) if name.startswith("vllm:")]
