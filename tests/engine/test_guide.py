"""Constraints over the demo's base and adapters: what is said has the form, and nobody else notices."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import rig
import zoo
from adapter_server.config import DEMO_BASE, EngineConfig, demo_adapters
from adapter_server.core import Constraint, Finished, Request
from adapter_server.engine.engine import Engine, build
from adapter_server.engine.guide import Guide, Guides
from adapter_server.engine.kv import bytes_per_token
from adapter_server.errors import AdapterServerError, InvalidRequest, RequestFailed
from adapter_server.registry.store import Store
from adapter_server.text import Text
from fakes import save_byte_tokenizer

TEXT = Text(DEMO_BASE)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}
FORMS = {
    "schema": Constraint("json_schema", json.dumps(PERSON)),
    "regex": Constraint("regex", r"[0-9]{3}-[a-z]{2,4}é"),
    "lark": Constraint("lark", 'start: "yes" | "no" | "(" start ")"'),
    "none": None,
}
ADAPTERS = (None, "shout", "mirror", "title")


def make(**settings: Any) -> Engine:
    config = EngineConfig(**{"kv_bytes": 32 << 20, **settings})
    return build(DEMO_BASE, config, Store(demo_adapters(), settle_s=0))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = make()
    yield engine
    engine.close()


def ask(
    engine: Engine, form: Constraint | None, name: str | None = None, prompt: str = "red cat>", **more: Any
) -> Request:
    settings = {"max_new_tokens": 120, "logprobs": 0, "ignore_eos": False, "constraint": form} | more
    return rig.ask(engine, name, TEXT.encode("red cat>"), **settings)


def said(answer: rig.Answer) -> str:
    assert answer.end is not None
    assert answer.end.error is None, answer.end.error
    return TEXT.decode(answer.ids)


def has_form(form: str, text: str) -> bool:
    if form == "schema":
        value = json.loads(text)
        assert value.keys() == {"name", "age", "colours"}
        return len(value["name"]) <= 8 and 0 <= value["age"] <= 120 and {*value["colours"]} <= {"red", "blue"}
    return re.fullmatch({"regex": r"[0-9]{3}-[a-z]{2,4}é", "lark": r"\(*(yes|no)\)*"}[form], text) is not None


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 5}], ids=["greedy", "sampled"])
def test_forms_and_adapters_mix_and_each_says_what_it_says_alone(engine: Engine, sampling: dict[str, Any]) -> None:
    cases = [(form, name) for form in FORMS for name in ADAPTERS]
    requests = [ask(engine, FORMS[form], name, **sampling) for form, name in cases]
    together = [said(answer) for answer in rig.run(engine, requests, stagger=1)]
    for (form, _), text in zip(cases, together, strict=True):
        assert form == "none" or has_form(form, text), text
    alone = [said(rig.run(engine, [ask(engine, FORMS[form], name, **sampling)])[0]) for form, name in cases]
    assert together == alone


def test_a_complete_answer_stops_and_an_end_token_ends_where_it_may(engine: Engine) -> None:
    stops, ends = rig.run(engine, [ask(engine, FORMS["lark"]), ask(engine, Constraint("regex", "(red cat)?!{0,90}"))])
    assert stops.end is not None
    assert ends.end is not None
    assert (stops.end.reason, ends.end.reason) == ("stop", "eos")
    assert said(ends) == "red cat"
    [also] = rig.run(engine, [ask(engine, Constraint("regex", "(red cat)?!{0,90}"), ignore_eos=True)])
    assert also.ids == ends.ids, "nothing may follow the end of a form"


@pytest.mark.parametrize("name", [None, "shout", "mirror"])
def test_tokens_are_those_of_peft_alone_under_the_same_mask(engine: Engine, name: str | None) -> None:
    form, prompt = FORMS["schema"], TEXT.encode("red cat>")
    assert form is not None
    [answer] = rig.run(engine, [ask(engine, form, name)])
    model = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)
    model = model if name is None else zoo.load_peft(model, demo_adapters() / name)
    guide = settled(engine.guides.want(form))
    for at, id in enumerate(answer.ids):
        with torch.inference_mode(), zoo.quiet():
            logits = model(input_ids=torch.tensor([[*prompt, *answer.ids[:at]]])).logits[0, -1]
        assert allowed(guide, len(logits), logits).argmax() == id
        guide.take(id)
    assert guide.error is None


def allowed(guide: Guide, vocab: int, logits: torch.Tensor | None = None) -> torch.Tensor:
    """The logits that the guide leaves; without any, whether it leaves each."""
    mask = guide.mask.tolist()
    bits = torch.tensor([mask[i // 32] >> (i % 32) & 1 for i in range(vocab)], dtype=torch.bool)
    return bits if logits is None else logits.masked_fill(~bits, -torch.inf)


def settled(guide: Guide) -> Guide:
    ends = time.monotonic() + 20
    while not guide.ready:
        assert time.monotonic() < ends
        time.sleep(0.001)
    return guide


def test_preemption_loses_nothing() -> None:
    roomy = make()
    per_token = bytes_per_token(roomy.model.layers, roomy.model.dtype)
    tight = make(kv_layout="pages", kv_bytes=176 * per_token, max_model_len=160)
    cases = [(form, name) for form in ("schema", "regex") for name in (None, "shout", "mirror")]
    answers = [rig.run(e, [ask(e, FORMS[form], name) for form, name in cases]) for e in (roomy, tight)]
    assert [said(answer) for answer in answers[0]] == [said(answer) for answer in answers[1]]
    assert tight.scheduler.preemptions > 0
    for each in (roomy, tight):
        each.close()


HOSTILE = {
    "no JSON": Constraint("json_schema", "{"),
    "no schema": Constraint("json_schema", "[5]"),
    "no type": Constraint("json_schema", '{"type": "foo"}'),
    "unknown format": Constraint("json_schema", '{"type": "string", "format": "zzz"}'),
    "not served": Constraint("json_schema", '{"not": {"type": "string"}}'),
    "elsewhere": Constraint("json_schema", '{"$ref": "http://example.com/x.json"}'),
    "a file": Constraint("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "itself": Constraint("json_schema", '{"$ref": "#"}'),
    "nothing": Constraint("json_schema", "false"),
    "too deep": Constraint("json_schema", '{"items":' * 4000 + "{}" + "}" * 4000),
    "many alternatives": Constraint(
        "json_schema",
        json.dumps(
            {"allOf": [{"anyOf": [{"properties": {n + str(i): {"const": 1}}} for n in "ab"]} for i in range(14)]}
        ),
    ),
    "too long": Constraint("regex", "a" * 70_000),
    "a bad regex": Constraint("regex", "(["),
    "look-ahead": Constraint("regex", "(?=a)b"),
    "a regex of nothing": Constraint("regex", r"[^\s\S]"),
    "a grammar of many rules": Constraint("lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(1000))),
    "a bad grammar": Constraint("lark", "start: foo"),
    "an empty grammar": Constraint("lark", ""),
    "a grammar of nothing": Constraint("lark", "start: start"),
}
HEAVY = {
    "repeats": Constraint("regex", "(((a?){1000}){1000}){1000}"),
    "backtracking": Constraint("regex", "(a+)+(b+)*" * 500 + "$"),
    "letters": Constraint("regex", r"(\p{L}{1,500}\w{1,500})+x" * 50),
    "states": Constraint("regex", r"(.*a.{20}){5}" * 20),
    "ambiguous": Constraint("lark", 'start: start start start | "a" | "a" "a"'),
    "many fields": Constraint(
        "json_schema", json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(900)}})
    ),
    "a mistake far down": Constraint("lark", "start: a0\n" + "\n".join(f'a{i}: "x" a{i + 1}?' for i in range(250))),
    "doubled": Constraint(
        "lark", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(20)) + '\nA20: "z"'
    ),
    "many words": Constraint("json_schema", json.dumps({"enum": [f"v{i}" for i in range(3000)]})),
    "much": Constraint("json_schema", '{"type": "array", "minItems": 1000000, "items": {"minLength": 100000000}}'),
}


@pytest.mark.parametrize("form", HOSTILE.values(), ids=HOSTILE)
def test_a_form_that_cannot_be_followed_is_refused_before_a_token(engine: Engine, form: Constraint) -> None:
    good, bad = ask(engine, FORMS["lark"]), ask(engine, form)
    try:
        answer = rig.run(engine, [bad, good])[0]
        assert answer.end is not None
        error: AdapterServerError | None = answer.end.error
        assert not answer.ids
    except InvalidRequest as refused:
        error = refused
    assert isinstance(error, InvalidRequest)
    assert error.param == "response_format"
    assert len(error.message) < 500
    assert "\n" not in error.message
    assert not engine.busy


@pytest.mark.parametrize("form", HEAVY.values(), ids=HEAVY)
def test_a_heavy_form_costs_its_own_row_alone(engine: Engine, form: Constraint) -> None:
    """Followed or refused, soon; and its neighbour says what it says alone."""
    begun = time.monotonic()
    heavy, plain = rig.run(engine, [ask(engine, form, max_new_tokens=40), ask(engine, None, "shout")], timeout_s=20)
    assert time.monotonic() - begun < 10
    assert said(plain) == "RED CAT"
    assert heavy.end is not None
    assert heavy.end.error is None or heavy.end.error.param == "response_format"


def test_a_form_that_breaks_on_the_way_ends_its_row_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, judged = Guide._judge, list[Guide]()

    def breaking(guide: Guide) -> None:
        judge(guide)
        row = engine._rows.get(broken.id)
        if row is not None and row.guide is guide:
            judged.append(guide)
            if len(judged) == 5:  # looked, took, looked, took, looked
                guide.error = InvalidRequest("out of fuel", param="response_format")

    monkeypatch.setattr(Guide, "_judge", breaking)
    broken, sound = ask(engine, FORMS["schema"]), ask(engine, FORMS["schema"], "mirror")
    first, second, plain = rig.run(engine, [broken, sound, ask(engine, None, "shout")])
    assert first.end is not None
    assert isinstance(first.end.error, InvalidRequest)
    assert "out of fuel" in first.end.error.message
    assert len(first.ids) == 2
    assert has_form("schema", said(second))
    assert said(plain) == "RED CAT"


def test_a_matcher_that_fails_ends_its_row_alone(engine: Engine) -> None:
    """llguidance reports; should it ever raise, that is the row's own matter too."""
    broken, plain = ask(engine, FORMS["schema"]), ask(engine, None, "shout")
    for request in (broken, plain):
        engine.submit(request)
    guide = settled(engine._rows[broken.id].guide)
    guide._mask = guide._mask[:1]
    answers = {broken.id: rig.Answer(), plain.id: rig.Answer()}
    while engine.busy:
        rig.collect(engine.step(), answers)
    end = answers[broken.id].end
    assert end is not None
    assert isinstance(end.error, InvalidRequest)
    assert said(answers[plain.id]) == "RED CAT"


def test_a_row_that_goes_while_its_form_is_compiled_is_gone(engine: Engine) -> None:
    request = ask(engine, Constraint("regex", "(gone){3}"))
    engine.submit(request)
    [end] = engine.cancel(request.id)
    assert isinstance(end, Finished)
    assert end.reason == "cancelled"
    time.sleep(0.05)
    assert (engine.step(), engine.busy, engine.forming) == ([], False, [])


def test_the_deadline_holds_while_a_form_is_compiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_server.engine.guide._compile", lambda *_: time.sleep(0.2))
    late = replace(ask(engine, Constraint("regex", "(late){3}")), deadline=time.monotonic() + 0.02)
    answer = rig.run(engine, [late])[0]
    assert answer.end is not None
    assert answer.end.reason == "timeout"


def test_what_goes_wrong_in_sampling_ends_its_row_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(seed: int, index: int) -> float:
        if seed == 13 and index == 2:
            raise ZeroDivisionError
        return 0.5

    monkeypatch.setattr("adapter_server.engine.sampling.uniform", uniform)
    asked = [ask(engine, None, "shout", temperature=0.1, seed=seed) for seed in (7, 13, 8)]
    first, second, third = rig.run(engine, asked)
    assert said(first) == said(third) == "RED CAT"
    assert second.end is not None
    assert isinstance(second.end.error, RequestFailed)
    assert "ZeroDivisionError" in second.end.error.message
    assert len(second.ids) == 2


def test_a_base_without_a_tokenizer_says_so() -> None:
    engine = rig.engine("llama", ("lora",))
    form = Constraint("regex", "a")
    asked = [rig.ask(engine, None, (5, 6), constraint=form), rig.ask(engine, "lora", (5, 6))]
    refused, answered = rig.run(engine, asked)
    assert refused.end is not None
    assert "no tokenizer" in str(refused.end.error)
    assert len(answered.ids) == rig.NEW
    engine.close()


# Tokenizers


def save_pieces(folder: Path) -> Path:
    """Words with ▁ for a space, and bytes for what is no word: as sentencepiece's tokenizers come."""
    words = ["▁", "▁cat", "cat", "{", "}", '"', '{"', '"}', ":", '":', "a", "b", "▁a", "1", "2", "é"]
    names = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    model = models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def save_metaspace(folder: Path) -> Path:
    """The same, by a pre-tokenizer."""
    save_pieces(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save", [save_byte_tokenizer, save_pieces, save_metaspace])
def test_a_guide_knows_every_tokens_bytes(tmp_path: Path, save: Any) -> None:
    """Of any tokens of the text the next is allowed, to the end; and what has another text is not."""
    tokenizer = AutoTokenizer.from_pretrained(save(tmp_path))
    ids = dict(tokenizer.get_vocab())
    end, vocab = ids["</s>"], len(tokenizer) + 7  # a head may be wider than the tokenizer
    guides = Guides(tmp_path, vocab, [end], 1 << 16)
    form = Constraint("regex", r'\{"cat é": "a cat[0-9]"\}')
    guide = settled(guides.want(form))
    for id in tokenizer('{"cat é": "a cat1"}', add_special_tokens=False)["input_ids"]:
        bits = allowed(guide, vocab)
        assert bits[id], tokenizer.decode([id])
        assert not bits[end]
        assert not bits[-7:].any()
        done = guide.take(id)
    assert done
    assert guide.error is None
    assert allowed(guide, vocab).nonzero().flatten().tolist() == [end]
    guides.close()


def test_every_end_token_may_end_a_form(tmp_path: Path) -> None:
    guides = Guides(save_byte_tokenizer(tmp_path), 257, [7, 256], 1 << 16)
    guide = settled(guides.want(Constraint("regex", "a*")))
    assert allowed(guide, 257).nonzero().flatten().tolist() == [7, ord("a") - ord("!"), 256]
    guides.close()


def test_a_form_is_compiled_once_and_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_server.engine.guide.MOST_KEPT", 2)
    guides = Guides(save_byte_tokenizer(tmp_path), 257, [256], 1 << 16)
    first, again = (settled(guides.want(Constraint("regex", "ab"))) for _ in range(2))
    assert len(guides._kept) == 1
    assert first.take(ord("a") - ord("!")) is False
    assert again.take(ord("a") - ord("!")) is False, "what one row takes, another has not taken"
    assert (first.error, again.error) == (None, None)
    for text in ("b", "c", "d"):
        settled(guides.want(Constraint("regex", text)))
    assert [form.text for form in guides._kept] == ["c", "d"]
    guides.close()
