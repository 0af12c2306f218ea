"""What steps cost, in numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_server.engine.costs import FORGET_S, HOPED, IDLE, SETTLED, WORTH, Costs, Kind, Ledger, bucket

rows = st.integers(1, 64)
seconds = st.floats(1e-4, 10)


def told(**each: dict[int, float]) -> Costs:
    """Costs that have seen so many seconds for so many rows of each kind, often enough."""
    costs = Costs()
    for kind, curve in each.items():
        for count, took in curve.items():
            for _ in range(SETTLED):
                costs.note(kind, count, took, 0.0)  # type: ignore[arg-type]
    return costs


@given(st.integers(1, 4096))
def test_a_bucket_is_within_a_quarter(count: int) -> None:
    assert bucket(count) <= count < 1.25 * bucket(count) + 1
    assert bucket(bucket(count)) == bucket(count)


@given(st.dictionaries(rows, seconds, min_size=1), rows)
def test_a_figure_is_between_those_seen(curve: dict[int, float], asked: int) -> None:
    found = told(unmerged=curve).step("unmerged", asked, 0.0)
    assert found is None or min(curve.values()) * 0.999 <= found <= max(curve.values()) * 1.001


@given(rows, seconds)
def test_what_was_seen_often_is_known_and_in_time_forgotten(count: int, took: float) -> None:
    costs = told(alone={count: took})
    assert costs.step("alone", count, FORGET_S) == pytest.approx(took)
    assert costs.step("alone", count, FORGET_S + 1) is None
    assert costs.step("beside", count, 0.0) is None


def test_few_steps_say_nothing_and_an_outlier_little() -> None:
    costs = Costs()
    for _ in range(SETTLED - 1):
        costs.note("alone", 4, 1.0, 0.0)
    assert costs.step("alone", 4, 0.0) is None
    costs = told(alone={4: 1.0})
    costs.note("alone", 4, 1000.0, 0.0)
    assert costs.step("alone", 4, 0.0) < 1.3


def test_a_line_between_two_figures_and_none_far_from_all() -> None:
    costs = told(unmerged={4: 1.0, 8: 2.0})
    assert costs.step("unmerged", 6, 0.0) == pytest.approx(1.5)
    assert costs.step("unmerged", 16, 0.0) == pytest.approx(2.0)
    assert costs.step("unmerged", 17, 0.0) is None
    assert costs.step("unmerged", 0, 0.0) == 0.0


def test_a_snapshot_alone_costs_what_the_base_does_until_it_is_known() -> None:
    costs = told(plain={8: 1.0}, unmerged={8: 1.25})
    assert costs.gain(8, 0, 0.0) == pytest.approx(0.2)
    for _ in range(SETTLED):
        costs.note("alone", 8, 1.5, 0.0)
    assert costs.gain(8, 0, 0.0) == pytest.approx(-0.2)


@given(st.integers(1, 32), st.integers(1, 32), st.tuples(seconds, seconds, seconds, seconds))
def test_a_gain_is_of_the_cheaper_way(own: int, rest: int, took: tuple[float, ...]) -> None:
    unmerged, part, alone, beside = took
    costs = told(alone={own: alone}, beside={own + rest: beside})
    curve = {rest: part, own + rest: unmerged}
    for count, each in curve.items():
        for _ in range(SETTLED):
            costs.note("unmerged", count, each, 0.0)
    gain, apart = costs.gain(own, rest, 0.0), costs.apart([own], rest, 0.0)
    whole = costs.step("unmerged", own + rest, 0.0)
    assert gain is not None
    assert apart is not None
    assert whole is not None
    assert gain == pytest.approx(1 - min(apart, beside) / whole)
    assert costs.splits([own], rest, 0.0) == (apart < beside)


def test_what_is_not_known_is_tried_together_first_and_then_apart() -> None:
    costs = told(unmerged={4: 1.0})
    assert costs.splits([4], 4, 0.0) is False
    for _ in range(SETTLED):
        costs.note("beside", 8, 1.5, 0.0)
    assert costs.splits([4], 4, 0.0) is None
    for _ in range(SETTLED):
        costs.note("alone", 4, 0.4, 0.0)
    assert costs.splits([4], 4, 0.0) is True


def test_several_snapshots_are_added_up() -> None:
    costs = told(alone={2: 1.0}, unmerged={3: 2.0})
    assert costs.apart([2, 2, 2], 3, 0.0) == pytest.approx(5.0)
    assert costs.apart([2], 40, 0.0) is None


booked = st.lists(st.tuples(st.none() | st.floats(-2, 1), st.integers(0, 8), st.integers(0, 8), st.floats(0, 5)))


@given(booked, st.booleans())
def test_credit_stays_between_nothing_and_the_price(
    bookings: list[tuple[float | None, int, int, float]], b: bool
) -> None:
    ledger = Ledger(3.0, bought=b)
    for booking in bookings:
        ledger.add(*booking)
        assert 0 <= ledger.credit <= 3.0


@given(st.lists(st.tuples(st.floats(-2, 0.999 * WORTH), st.integers(1, 8), st.integers(0, 8), st.floats(0, 5))))
def test_a_small_gain_buys_nothing(bookings: list[tuple[float, int, int, float]]) -> None:
    ledger = Ledger(3.0)
    for booking in bookings:
        ledger.add(*booking)
        assert not ledger.wanted


@given(st.floats(WORTH, 1), st.floats(0.1, 10))
def test_it_is_bought_once_it_would_have_paid_for_itself(gain: float, price: float) -> None:
    ledger = Ledger(price)
    ledger.add(gain, 4, 2, 0.9 * price / gain)
    assert not ledger.wanted
    ledger.add(gain, 4, 2, 0.2 * price / gain)
    assert ledger.wanted


@given(st.floats(-1, -0.01), st.floats(0.1, 10))
def test_it_is_kept_until_it_lost_its_price(loss: float, price: float) -> None:
    ledger = Ledger(price, credit=price, bought=True)
    ledger.add(loss, 4, 2, 0.9 * price / -loss)
    assert ledger.wanted
    ledger.add(loss, 4, 2, 0.2 * price / -loss)
    assert not ledger.wanted


def test_a_small_gain_keeps_what_is_there_and_idleness_does_not() -> None:
    ledger = Ledger(1.0, credit=1.0, bought=True)
    ledger.add(0.001, 4, 0, 1e6)
    assert ledger.wanted
    ledger.add(None, 0, 4, 1.01 / IDLE)
    assert not ledger.wanted


def test_what_nobody_knows_is_hoped_for_where_one_adapter_is_alone() -> None:
    mixed, alone = Ledger(1.0), Ledger(1.0)
    mixed.add(None, 7, 1, 1e6)
    alone.add(None, 8, 0, 1.01 / HOPED)
    assert not mixed.wanted
    assert alone.wanted


def test_kinds_have_curves_of_their_own() -> None:
    kinds: tuple[Kind, ...] = ("plain", "unmerged", "alone", "beside")
    costs = told(**{kind: {4: 1.0 + i} for i, kind in enumerate(kinds)})
    assert [costs.step(kind, 4, 0.0) for kind in kinds] == pytest.approx([1.0, 2.0, 3.0, 4.0])
