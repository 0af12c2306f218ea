"""One adapter's flood does not starve another's trickle."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import rig
from adapter_server.core import Member, Request, Spec
from adapter_server.engine.scheduler import Row
from adapter_server.engine.turns import Turns


def row(name: str, i: int = 0, prompt: int = 4) -> Row:
    return Row.of(Request(f"{name}{i}", (1,) * prompt, members=(Member(Spec(name, "v", "", "LORA", {}, 0)),)))


def waiting(*rows: Row) -> Turns:
    turns = Turns()
    for each in rows:
        turns.append(each)
    return turns


def taken(turns: Turns, count: int) -> list[str]:
    names = []
    for each in turns.next():
        turns.began(each)
        names.append(each.request.id)
        if len(names) == count:
            break
    return names


def test_adapters_take_turns_and_keep_their_own_order() -> None:
    turns = waiting(*(row("flood", i) for i in range(4)), row("drip", 0), row("drip", 1))
    assert taken(turns, 6) == ["flood0", "drip0", "flood1", "drip1", "flood2", "flood3"]
    assert len(turns) == 0


def test_who_was_served_much_waits() -> None:
    turns = waiting(row("flood"), row("drip", prompt=100))
    first = next(turns.next())
    turns.began(first)
    turns.charge(first, 50)
    turns.append(row("flood", 1))
    assert taken(turns, 2) == ["drip0", "flood1"]


def test_idleness_saves_nothing_up() -> None:
    turns = waiting(row("busy"))
    busy = next(turns.next())
    turns.began(busy)
    turns.charge(busy, 1000)
    for i in range(1, 4):
        turns.append(row("busy", i))
        turns.append(row("late", i))
    assert taken(turns, 4) == ["busy1", "late1", "busy2", "late2"]


def test_a_row_that_is_not_admitted_holds_up_its_adapter_alone() -> None:
    turns = waiting(row("loading", 0), row("ready", 0), row("loading", 1), row("ready", 1))
    seen = []
    for each in turns.next():
        seen.append(each.request.id)
        if each.request.members[0].spec.name == "ready":
            turns.began(each)
    assert seen == ["loading0", "ready0", "ready1"]
    assert [r.request.id for r in turns] == ["loading0", "loading1"]


@given(st.lists(st.tuples(st.sampled_from(["in", "take", "end", "drop", "back"]), st.sampled_from("abc")), max_size=60))
def test_the_books_balance(moves: list[tuple[str, str]]) -> None:
    turns, running = Turns(), []
    for i, (move, name) in enumerate(moves):
        if move == "in":
            turns.append(row(name, i))
        elif move == "take" and len(turns):
            running.append(next(turns.next()))
            turns.began(running[-1])
        elif move == "end" and running:
            turns.ended(running.pop())
        elif move == "back" and running:
            turns.ended(running[-1])
            turns.appendleft(running.pop())
        elif move == "drop" and len(turns):
            turns.remove(next(iter(turns)))
    assert len(turns) == len(list(turns))
    for each in running:
        turns.ended(each)
    for each in list(turns):
        turns.remove(each)
    assert not turns._served
    assert not turns._rows
    assert not turns._running


def test_a_flood_does_not_starve_a_trickle() -> None:
    """200 requests of one adapter wait for two places; another's, come last, is among the next to run."""
    engine = rig.engine("llama", max_rows=2)
    rig.run(engine, [rig.ask(engine, "ia3", rig.PROMPTS[0])])  # so that the trickle waits for no load
    flood = [rig.ask(engine, "lora", rig.PROMPTS[0], id=f"flood{i}") for i in range(200)]
    for request in flood:
        engine.submit(request)
    while len(engine.scheduler.running) < 2:
        engine.step()
    engine.submit(rig.ask(engine, "ia3", rig.PROMPTS[0], id="drip"))
    ended: list[str] = []
    while "drip" not in ended:
        ended += [e.request_id for e in engine.step() if hasattr(e, "reason")]
    assert len(ended) <= 5
    for request in flood:
        engine.cancel(request.id)
    assert not engine.busy
    engine.close()
