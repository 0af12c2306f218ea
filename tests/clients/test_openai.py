"""OpenAI's client as programs use it: both kinds, whole and streamed, its errors, its time-outs, its retries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import live
from adapter_server.config import EngineConfig, ServerConfig
from live import Live

KEY = "may-ask"
SAID: list[Any] = [{"role": "user", "content": "red cat"}]


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    with live.demo(engine=EngineConfig(max_rows=1, max_waiting=2), config=ServerConfig(api_key=(KEY,))) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(demo: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def awaited(demo: Live, work: Any, **options: Any) -> Any:
    """What `work` does with the asynchronous client."""

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{demo.address}/v1", api_key=KEY, max_retries=0, **options) as client:
            return await work(client)

    return asyncio.run(run())


def test_an_answer_is_the_adapters(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="shout", messages=SAID, temperature=0)
    assert answer.choices[0].message.content == "RED CAT"
    plain = sdk.completions.create(model="shout", prompt="red cat>", temperature=0)
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("RED CAT", "stop")


def test_the_asynchronous_client_gets_the_same(demo: Live) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str | None:
        answer = await client.chat.completions.create(model="shout", messages=SAID, temperature=0)
        return answer.choices[0].message.content

    assert awaited(demo, ask) == "RED CAT"


def test_streams_add_up(demo: Live, sdk: openai.OpenAI) -> None:
    def text(chunk: Any) -> str:
        return chunk.choices[0].delta.content or "" if chunk.choices else ""

    fields: Any = {"model": "shout", "messages": SAID, "temperature": 0, "stream": True}
    assert "".join(text(chunk) for chunk in sdk.chat.completions.create(**fields)) == "RED CAT"

    async def ask(client: openai.AsyncOpenAI) -> str:
        stream: AsyncIterator[Any] = await client.chat.completions.create(**fields)
        return "".join([text(chunk) async for chunk in stream])

    assert awaited(demo, ask) == "RED CAT"


def test_its_stream_helper_makes_the_whole_answer(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(model="shout", messages=SAID, temperature=0) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == "RED CAT"
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_log_probabilities_and_choices_come_in_its_types(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="shout", messages=SAID, temperature=0, logprobs=True, top_logprobs=2, n=2, max_tokens=3
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert "".join(token.token for token in logprobs.content) == "RED"
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logprobs.content)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"temperature": -1}, openai.BadRequestError),
        ({"model": "nobody"}, openai.NotFoundError),
        ({"max_tokens": 5000}, openai.BadRequestError),
        ({"extra_body": {"top_k": -1}}, openai.BadRequestError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_its_own_errors(sdk: openai.OpenAI, fields: Any, kind: type[Exception], stream: bool) -> None:
    with pytest.raises(kind) as caught:
        sdk.chat.completions.create(**{"model": "shout", "messages": SAID, "stream": stream} | fields)
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.request_id


def test_a_wrong_key_is_an_authentication_error(demo: Live) -> None:
    with (
        openai.OpenAI(base_url=f"{demo.address}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def long(sdk: openai.OpenAI, **fields: Any) -> Any:
    return sdk.completions.create(
        model="caesar", prompt="x" * 20, max_tokens=450, temperature=0, extra_body={"ignore_eos": True}, **fields
    )


def test_a_client_that_gives_up_frees_its_place(demo: Live, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        long(sdk.with_options(timeout=0.05))
    demo.settle(5)

    async def ask(client: openai.AsyncOpenAI) -> Any:
        task = asyncio.create_task(client.completions.create(model="caesar", prompt="x" * 20, max_tokens=450))
        await asyncio.sleep(0.05)
        task.cancel()
        return await asyncio.gather(task, return_exceptions=True)

    [ended] = awaited(demo, ask)
    assert isinstance(ended, asyncio.CancelledError)
    demo.settle(5)


def test_leaving_a_stream_frees_its_place(demo: Live, sdk: openai.OpenAI) -> None:
    with long(sdk, stream=True) as stream:
        next(iter(stream))
    demo.settle(5)


def refused(demo: Live) -> float:
    """How often the queue was full."""
    lines = demo.http.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith("adapter_server_refused_total") and "queue_full" in line
    )


def test_a_full_queue_is_asked_again(demo: Live, sdk: openai.OpenAI) -> None:
    def short(client: openai.OpenAI, n: int = 1) -> str:
        return client.completions.create(model="shout", prompt="red cat>", temperature=0, n=n).choices[0].text

    with ThreadPoolExecutor(2) as others, demo.slowly(0.02):
        with long(sdk, stream=True) as running:
            next(iter(running))
            queued = others.submit(short, sdk, n=2)
            demo.wait_for(waiting=2)
            before = refused(demo)
            with pytest.raises(openai.RateLimitError) as caught:
                short(sdk)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            again = others.submit(short, sdk.with_options(max_retries=3))
            while refused(demo) < before + 2:
                time.sleep(0.01)
        assert (queued.result(), again.result()) == ("RED CAT", "RED CAT")
    demo.settle()


def test_a_failure_inside_is_asked_no_more(demo: Live, sdk: openai.OpenAI) -> None:
    engine, calls = demo.worker.engine, []

    def fail(slices: Any) -> Any:
        calls.append(1)
        raise ZeroDivisionError

    forward, engine._forward = engine._forward, fail  # type: ignore[method-assign]
    try:
        with pytest.raises(openai.InternalServerError):
            sdk.with_options(max_retries=2).completions.create(model="shout", prompt="red cat>")
    finally:
        engine._forward = forward  # type: ignore[method-assign]
    assert len(calls) == 1
    demo.settle()
