"""The client of the Hugging Face hub, which speaks as LoRAX does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, ValidationError

import live
from live import Live


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    with live.demo() as running:
        yield running


def test_it_gets_answers_streams_and_errors(demo: Live) -> None:
    client = InferenceClient(demo.address, timeout=30)
    assert client.text_generation("red cat>", adapter_id="shout", max_new_tokens=32) == "RED CAT"
    full = client.text_generation("red cat>", details=True, decoder_input_details=True)
    assert (full.generated_text, full.details.generated_tokens, len(full.details.prefill)) == ("red cat", 8, 8)
    *_, last = client.text_generation("red cat>", adapter_id="shout", stream=True, details=True)
    assert (last.generated_text, last.details.finish_reason) == ("RED CAT", "eos_token")
    with pytest.raises(ValidationError):
        client.text_generation("red cat>", max_new_tokens=100_000)
    with pytest.raises(GenerationError):
        client.text_generation("red cat>", adapter_id="nobody")
    talker = InferenceClient(base_url=demo.address, timeout=30)  # which else calls every model "dummy"
    chat = talker.chat_completion([{"role": "user", "content": "red cat"}], model="shout", temperature=0)
    assert chat.choices[0].message.content == "RED CAT"
    demo.settle()
