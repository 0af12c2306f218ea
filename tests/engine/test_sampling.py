"""Each filter against transformers' own processor, and the random stream against chance."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adapter_server.core import Sampling
from adapter_server.engine import sampling
from adapter_server.engine.sampling import Draw, choose, uniform

LOGITS = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
WARPERS = {
    "temperature": lambda v: [TemperatureLogitsWarper(v)],
    "top_k": lambda v: [TopKLogitsWarper(v)],
    "top_p": lambda v: [TopPLogitsWarper(v)],
    "min_p": lambda v: [MinPLogitsWarper(v)],
}


def draw(seed: int = 0, tokens: tuple[int, ...] = (1,), prompt: int = 1, **settings: object) -> Draw:
    return Draw(Sampling(**{"temperature": 1.0, **settings}), seed, tokens, prompt)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.8, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
        {"top_p": 0.0001},
    ],
)
def test_the_distribution_is_transformers(settings: dict[str, float]) -> None:
    warped = LOGITS.clone()
    for name, make in WARPERS.items():
        for warper in make(settings[name]) if name in settings else []:
            warped = warper(None, warped)
    want = warped.softmax(-1)[0]
    n = 4000
    drawn = choose(LOGITS.expand(n, -1), [draw(seed=i, **settings) for i in range(n)])
    seen = Counter(c.id for c in drawn)
    assert set(seen) <= set(want.nonzero().flatten().tolist())
    for i, p in enumerate(want.tolist()):
        assert abs(seen[i] / n - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-3


SETTINGS = [{}, {"top_k": 5}, {"top_p": 0.5}, {"top_p": 0.999}, {"min_p": 0.3}, {"min_p": 1e-9}, {"temperature": 3.0}]


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0], ids=["flat", "plain", "peaked"])
def test_looking_at_the_likeliest_alone_changes_no_draw(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat logits are sorted whole after all; of the others most are not."""
    logits = torch.randn(210, 3000, generator=torch.Generator().manual_seed(1)) * scale
    rows = [draw(seed=i, **SETTINGS[i % len(SETTINGS)]) for i in range(len(logits))]
    depths: list[int] = []
    inverse = sampling.inverse
    monkeypatch.setattr(sampling, "inverse", lambda *args: (depths.append(len(args[0])), inverse(*args))[1])
    monkeypatch.setattr(sampling, "PEAK", 64)
    some = [c.id for c in choose(logits, rows)]
    assert (len(depths) == 2) == (scale < 8 or depths[1:] != [])
    monkeypatch.setattr(sampling, "PEAK", 3000)
    assert some == [c.id for c in choose(logits, rows)]


def test_rows_of_different_settings_do_not_touch_one_another() -> None:
    rows = [draw(seed=i, top_k=i % 4, top_p=0.5 + 0.1 * (i % 5), temperature=0.5 * (i % 3)) for i in range(24)]
    together = [c.id for c in choose(LOGITS.expand(24, -1), rows)]
    alone = [choose(LOGITS, [row])[0].id for row in rows]
    assert together == alone


def test_repetition_is_transformers_and_counts_the_prompt() -> None:
    tokens = (4, 9, 9, 30)
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), LOGITS.clone())
    row = LOGITS[0].clone()
    sampling._penalise(row, draw(tokens=tokens, prompt=2, repetition_penalty=1.7))
    assert torch.equal(row, want[0])


def test_presence_and_frequency_count_what_was_emitted_alone() -> None:
    row = LOGITS[0].clone()
    sampling._penalise(row, draw(tokens=(4, 9, 9, 30), prompt=1, presence_penalty=0.5, frequency_penalty=0.25))
    moved = (LOGITS[0] - row).nonzero().flatten().tolist()
    assert moved == [9, 30]
    assert (LOGITS[0] - row)[9].item() == pytest.approx(0.5 + 2 * 0.25)
    assert (LOGITS[0] - row)[30].item() == pytest.approx(0.75)


def bits(*ids: int) -> torch.Tensor:
    """The mask that allows these of 50 tokens."""
    words = [sum(1 << (i % 32) for i in ids if i // 32 == word) for word in range(2)]
    return torch.tensor([word - (1 << 32) if word >> 31 else word for word in words], dtype=torch.int32)


def test_biases_are_transformers_and_come_before_penalties() -> None:
    bias = ((3, 2.5), (40, -100.0), (9, 1.0))
    want = SequenceBiasLogitsProcessor({(i,): v for i, v in bias})(torch.tensor([[4, 9]]), LOGITS.clone())
    got = sampling._biased(LOGITS.repeat(3, 1), [draw(), draw(logit_bias=bias), draw(logit_bias=((0, 7.0),))])
    assert torch.equal(got[0], LOGITS[0])
    assert torch.equal(got[1], want[0])
    assert (got[2] - LOGITS[0]).nonzero().flatten().tolist() == [0]
    [chosen] = choose(LOGITS, [draw(temperature=0, logit_bias=((7, 100.0),), repetition_penalty=100.0, tokens=(7,))])
    assert chosen.id != 7


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.9}])
def test_only_what_a_mask_allows_is_chosen_and_only_in_its_row(settings: dict[str, float]) -> None:
    masks = [None, bits(5, 31, 32, 49), None, bits(12)]
    rows = [Draw(Sampling(**{"temperature": 1.0, **settings}), seed, (1,), 1, masks[seed % 4]) for seed in range(200)]
    chosen = [c.id for c in choose(LOGITS.expand(200, -1), rows)]
    assert set(chosen[1::4]) <= {5, 31, 32, 49}
    assert set(chosen[3::4]) == {12}
    plain = [Draw(r.sampling, r.seed, (1,), 1) for r in rows]
    assert [c.id for c in choose(LOGITS.expand(200, -1), plain)][::2] == chosen[::2]


def test_logprobs_are_of_what_no_mask_or_bias_has_touched() -> None:
    settings = Sampling(logprobs=2, logit_bias=((12, 50.0),))
    [chosen] = choose(LOGITS, [Draw(settings, 0, (1,), 1, bits(12))])
    assert chosen.id == 12
    assert chosen.logprob == pytest.approx(LOGITS[0].log_softmax(-1)[12].item())


def test_the_last_token_with_a_chance_is_drawn_where_the_number_rounds_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda seed, index: 1 - 2.0**-53)
    [chosen] = choose(LOGITS, [Draw(Sampling(temperature=1.0), 0, (1,), 1, bits(5, 12))])
    assert chosen.id in (5, 12)


def test_rates_are_log_softmax() -> None:
    ids = [3, 44, 7]
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    want = rows.log_softmax(-1)
    for i, (own, top) in enumerate(sampling.rate(rows, ids, 4)):
        assert own == pytest.approx(want[i, ids[i]].item(), abs=1e-6)
        assert [id for id, _ in top] == want[i].topk(4).indices.tolist()
        assert [value for _, value in top] == pytest.approx(want[i].topk(4).values.tolist(), abs=1e-6)


def test_a_number_is_of_its_seed_and_place_alone() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.01
    assert all(0 <= n < 1 for n in numbers)


def test_logprobs_are_of_the_raw_logits_and_sorted() -> None:
    [chosen] = choose(LOGITS, [draw(temperature=0, logprobs=4, repetition_penalty=3.0)])
    want = LOGITS[0].log_softmax(-1)
    assert chosen.logprob == pytest.approx(want[chosen.id].item())
    assert [i for i, _ in chosen.top] == want.topk(4).indices.tolist()


def test_rows_whose_logits_are_broken_say_so_and_others_do_not() -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 7] = float("nan")
    logits[2, 3] = float("-inf")
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}):
        assert [c.ok for c in choose(logits, [draw(**settings)] * 3)] == [True, False, True]


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-45, 1e-300])
def test_the_coldest_temperature_takes_the_likeliest(temperature: float) -> None:
    [chosen] = choose(LOGITS, [draw(temperature=temperature)])
    assert (chosen.id, chosen.ok) == (int(LOGITS.argmax()), True)
