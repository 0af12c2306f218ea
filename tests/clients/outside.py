"""What other clients see of a live demo, run by an environment that has them: python outside.py CLIENT ADDRESS"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

PROMPT, RIGHT = "red cat>", "RED CAT"


def fails(kind: type[Exception], ask: Callable[[], Any]) -> Exception:
    """The error that asking ends with, which must be of this kind."""
    try:
        answer = ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}, but {answer}")


def lorax(address: str) -> None:
    from lorax import AsyncClient, Client, MergedAdapters
    from lorax.errors import GenerationError, ValidationError
    from lorax.types import FinishReason

    client = Client(address, timeout=30)
    answer = client.generate(PROMPT, adapter_id="shout", max_new_tokens=32)
    assert answer.generated_text == RIGHT, answer
    assert answer.details.finish_reason == FinishReason.EndOfSequenceToken
    assert answer.details.generated_tokens == len(answer.details.tokens) == 8
    assert answer.details.prompt_tokens == 8
    assert "".join(token.text for token in answer.details.tokens if not token.special) == RIGHT
    assert client.generate(PROMPT).generated_text == "red cat"
    full = client.generate(PROMPT, adapter_id="shout", return_full_text=True, decoder_input_details=True)
    assert full.generated_text == PROMPT + RIGHT
    assert len(full.details.prefill) == 8
    seeded = [client.generate(PROMPT, do_sample=True, temperature=5.0, seed=7).generated_text for _ in range(2)]
    assert seeded[0] == seeded[1]
    stopped = client.generate(PROMPT, adapter_id="shout", stop_sequences=["C"])
    assert stopped.details.finish_reason == FinishReason.StopSequence
    merged = MergedAdapters(
        ids=["shout", "caesar"], weights=[1.0, 0.0], merge_strategy="linear", density=0.0, majority_sign_method="total"
    )
    assert client.generate(PROMPT, merged_adapters=merged).generated_text == RIGHT
    *_, last = events = list(client.generate_stream(PROMPT, adapter_id="shout"))
    assert (last.generated_text, last.details.generated_tokens) == (RIGHT, len(events))
    assert "".join(event.token.text for event in events if not event.token.special) == RIGHT
    fails(GenerationError, lambda: client.generate(PROMPT, adapter_id="nobody"))
    fails(ValidationError, lambda: client.generate(PROMPT, adapter_id="shout", max_new_tokens=100_000))
    fails(GenerationError, lambda: list(client.generate_stream(PROMPT, adapter_id="nobody")))

    async def both() -> None:
        other = AsyncClient(address, timeout=30)
        assert (await other.generate(PROMPT, adapter_id="shout")).generated_text == RIGHT
        assert [event async for event in other.generate_stream(PROMPT, adapter_id="shout")][-1].generated_text == RIGHT

    asyncio.run(both())


def text_generation(address: str) -> None:
    from text_generation import AsyncClient, Client
    from text_generation.errors import ValidationError

    client = Client(address, timeout=30)
    answer = client.generate(PROMPT, max_new_tokens=32)
    assert answer.generated_text == "red cat", answer
    assert answer.details.finish_reason.value == "eos_token"
    assert answer.details.generated_tokens == len(answer.details.tokens) == 8
    sampled = client.generate(PROMPT, do_sample=True, temperature=0.7, top_k=5, top_p=0.9, seed=1)
    assert sampled.details.seed == 1
    *_, last = events = list(client.generate_stream(PROMPT, max_new_tokens=32))
    assert (last.generated_text, len(events)) == ("red cat", 8)
    assert client.generate(PROMPT, stop_sequences=["c"]).details.finish_reason.value == "stop_sequence"
    fails(ValidationError, lambda: client.generate("", max_new_tokens=32))
    fails(ValidationError, lambda: client.generate(PROMPT, max_new_tokens=100_000))
    fails(ValidationError, lambda: list(client.generate_stream(PROMPT, max_new_tokens=100_000)))

    async def both() -> None:
        other = AsyncClient(address, timeout=30)
        assert (await other.generate(PROMPT)).generated_text == "red cat"
        assert [event async for event in other.generate_stream(PROMPT)][-1].generated_text == "red cat"

    asyncio.run(both())


def litellm(address: str) -> None:
    import litellm as lite

    fields: dict[str, Any] = {
        "model": "openai/shout",
        "api_base": f"{address}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": "red cat"}],
        "temperature": 0,
    }
    answer = lite.completion(**fields)
    assert answer.choices[0].message.content == RIGHT, answer
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 8
    said = "".join(chunk.choices[0].delta.content or "" for chunk in lite.completion(**fields, stream=True))
    assert said == RIGHT
    assert asyncio.run(lite.acompletion(**fields)).choices[0].message.content == RIGHT
    plain = {name: value for name, value in fields.items() if name != "messages"} | {
        "model": "text-completion-openai/shout"
    }
    assert lite.text_completion(**plain, prompt=PROMPT).choices[0].text == RIGHT
    fails(lite.NotFoundError, lambda: lite.completion(**fields | {"model": "openai/nobody"}))
    fails(lite.BadRequestError, lambda: lite.completion(**fields | {"max_tokens": 100_000}))
    fails(lite.Timeout, lambda: lite.completion(**fields, timeout=0.0001))


if __name__ == "__main__":
    {"lorax": lorax, "text_generation": text_generation, "litellm": litellm}[sys.argv[1]](sys.argv[2])
