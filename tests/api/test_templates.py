"""Chat templates of adapters: rendered as transformers does, only where allowed, and hostile ones end in a refusal."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import files
from adapter_server.api.templates import MAX_BYTES, ChatTemplate, Renderer, of
from adapter_server.config import DEMO_BASE, ServerConfig
from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused, InvalidRequest
from adapter_server.text import Text
from serving import Served, serving

MESSAGES = [{"role": "system", "content": "Be <kind>."}, {"role": "user", "content": 'hé "you"'}]
CHATML = """{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}
<|{{ message.role }}|>
{% if message['role'] == 'user' %}{% generation %}{{ message['content'] | trim }}{% endgeneration %}{% else %}
{{ message['content'] | tojson }}{% continue %}{% endif %}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}{{ tools is none }}{{ strftime_now('%Y') | length }}"""


def rendered(*templates: str, variables: Any = None) -> list[str | InvalidRequest]:
    """What each gives, one after another in the same process."""

    async def run() -> list[str | InvalidRequest]:
        renderer, found = Renderer(), list[str | InvalidRequest]()
        for template in templates:
            try:
                found.append(await renderer.render(ChatTemplate(template), variables or {"messages": MESSAGES}))
            except InvalidRequest as refused:
                found.append(refused)
        await renderer.close()
        return found

    return asyncio.run(run())


def test_it_renders_as_transformers_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    variables = Text(DEMO_BASE).chat_variables(MESSAGES)
    for template in (CHATML, tokenizer.chat_template):
        theirs = tokenizer.apply_chat_template(
            MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert rendered(template, variables=variables) == [theirs]


SLOW = ["{{ 9 ** (9 ** 9) }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"]
HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}{{ lipsum.__globals__['os'] }}",
    "{{ range(10 ** 9) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('not these') }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if %}",
]


def test_hostile_templates_end_in_a_refusal_and_the_next_is_rendered() -> None:
    fine = "{{ messages | length }}"
    found = rendered(*(each for hostile in HOSTILE for each in (hostile, fine)))
    for hostile, refusal, after in zip(HOSTILE, found[::2], found[1::2], strict=True):
        assert isinstance(refusal, InvalidRequest), hostile
        assert refusal.param == "messages"
        assert len(refusal.message) < 500
        assert after == "2", hostile


@pytest.mark.parametrize("slow", [SLOW[0], pytest.param(SLOW[1], marks=pytest.mark.soak)])
def test_one_that_takes_too_long_is_killed_and_not_tried_again(slow: str) -> None:
    start = time.monotonic()
    first, after, again = rendered(slow, "{{ messages | length }}", slow)
    assert time.monotonic() - start < 40
    assert after == "2"
    assert all(isinstance(refusal, InvalidRequest) for refusal in (first, again))
    assert ["before" in str(refusal) for refusal in (first, again)] == [False, True]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for seed, name in enumerate(("own", "config", "plain", "large")):
        files.write(folder / name, seed)
    (folder / "own" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (folder / "config" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "{{ messages[0].content | upper }}"}]})
    )
    (folder / "large" / "chat_template.jinja").write_text("x" * (MAX_BYTES + 1))
    for name in ("own", "config", "plain", "large"):
        files.age(folder / name)
    return folder


@pytest.fixture
def served(text: Text, root: Path) -> Iterator[Served]:
    with serving(text, root, ServerConfig(adapter_chat_templates=True)) as served:
        yield served


def chat(served: Served, model: str | None) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "ab"}], "max_tokens": 20}
    return served.http.post("/v1/chat/completions", json=body)


def test_an_adapters_own_template_is_used_where_it_is_allowed(served: Served) -> None:
    own = chat(served, "own")
    assert own.json()["choices"][0]["message"]["content"] == "ab!"
    assert own.headers["x-chat-template"] == ChatTemplate("{{ messages[0].content }}!").id
    assert chat(served, "config").json()["choices"][0]["message"]["content"] == "AB"
    plain = chat(served, "plain")  # this base has none of its own
    assert (plain.status_code, plain.json()["error"]["param"]) == (400, "messages")
    assert "x-chat-template" not in plain.headers
    assert chat(served, None).status_code == 400
    assert chat(served, "nobody").status_code == 404
    assert chat(served, "large").status_code == 424


def test_otherwise_it_is_left_alone(text: Text, root: Path) -> None:
    with serving(text, root) as served:
        assert "no chat template" in chat(served, "own").json()["error"]["message"]


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"{"])
def test_a_file_that_cannot_be_read_is_the_adapters_fault(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(AdapterRefused):
        of(Spec("a", "", str(tmp_path / "a"), "LORA", {}, 0), tmp_path)
    (tmp_path / "a" / "chat_template.jinja").symlink_to("/etc/passwd")
    with pytest.raises(AdapterRefused):
        of(Spec("a", "", str(tmp_path / "a"), "LORA", {}, 0), tmp_path)
