"""From a valid body to the engine's `Request`: token ids, adapters at their versions, the route, room to answer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from adapter_server.api.schemas import GenerateBody
from adapter_server.core import AskedMode, Info, Member, Request, Sampling
from adapter_server.errors import InvalidRequest, PromptTooLong
from adapter_server.families import before_the_prompt, tasks, virtual_tokens
from adapter_server.registry.store import Store
from adapter_server.text import Text

_numbers = itertools.count()


def prompt_ids(prompt: str | Sequence[int], text: Text, info: Info) -> tuple[int, ...]:
    """The prompt's token ids, at least one and all of them the base's."""
    if isinstance(prompt, str):
        check_length(len(prompt), text, info)
        prompt = text.encode(prompt)
    wrong = next((id for id in prompt if id >= info.vocab), None)
    if wrong is not None:
        raise InvalidRequest(f"token id {wrong} is not below the vocabulary's {info.vocab}", param="prompt")
    if not prompt and text.bos_id is None:
        raise InvalidRequest("the prompt is empty: this model needs at least one token to go on from", param="prompt")
    return tuple(prompt) or (text.bos_id or 0,)


def check_length(characters: int, text: Text, info: Info) -> None:
    """Spares the tokenizer a text that cannot fit however it is cut."""
    if characters > info.max_model_len * text.longest_token:
        raise _too_long(f"the prompt's {characters:,} characters", info)


def _too_long(what: str, info: Info, remedy: str = "shorten it") -> PromptTooLong:
    return PromptTooLong(f"{what} do not fit the context of {info.max_model_len:,} tokens: {remedy}", param="prompt")


def admissible(
    body: GenerateBody,
    prompt: tuple[int, ...],
    store: Store,
    info: Info,
    arrived: float,
    deadline: float | None = None,
) -> Request:
    """The request as the engine takes it, with its adapters at the versions of this moment. May read files."""
    refs = adapter_refs(body, info)
    members = tuple(Member(store.resolve(ref), weight) for ref, weight in refs)
    check_members(body, members)
    return Request(
        id=f"g{next(_numbers)}",
        prompt=prompt,
        sampling=sampling(body, prompt, members, info),
        members=members,
        mode=route(body, members),
        task_id=body.task_id,
        arrived=arrived,
        deadline=deadline,
    )


def adapter_refs(body: GenerateBody, info: Info) -> list[tuple[str, float]]:
    """The names asked for with their weights; none means the base model."""
    asked = body.adapter
    if asked is None or asked in ("", info.model):
        return []
    if isinstance(asked, str):
        return [(asked, body.scale)]
    names = [member.name for member in asked]
    if len(set(names)) < len(names):
        raise InvalidRequest("an adapter is named twice: add its weights up", param="adapter")
    return [(member.name, member.weight * body.scale) for member in asked]


def check_members(body: GenerateBody, members: Sequence[Member]) -> None:
    """Weights, scale and task must have a meaning for these adapters."""
    prompts = [member for member in members if before_the_prompt(member.spec.family)]
    if len(prompts) > 1:
        raise InvalidRequest("at most one prefix or soft prompt fits into a composition", param="adapter")
    if not members and body.scale != 1:
        raise InvalidRequest("scale needs an adapter: the base model has none", param="scale")
    for member in prompts:
        _check_unscaled(body, member)
    _check_task(body, {member.spec.name: count for member in members if (count := tasks(member.spec))})


def _check_unscaled(body: GenerateBody, member: Member) -> None:
    name, family = member.spec.name, member.spec.family
    if body.scale != 1:
        raise InvalidRequest(f"scale has no meaning for {name!r} ({family}): leave it out", param="scale")
    if member.weight != 1:
        raise InvalidRequest(f"the weight of {name!r} ({family}) can only be 1", param="adapter")


def _check_task(body: GenerateBody, tasked: Mapping[str, int]) -> None:
    """`tasked` are the adapters with tasks, and how many; all of them run the same one."""
    if not tasked and body.task_id is not None:
        raise InvalidRequest("task_id is for adapters with tasks only: leave it out", param="task_id")
    for name, count in tasked.items():
        if body.task_id is None or body.task_id >= count:
            raise InvalidRequest(f"adapter {name!r} needs a task_id from 0 to {count - 1}", param="task_id")


def route(body: GenerateBody, members: Sequence[Member]) -> AskedMode:
    """How the members are to be applied."""
    if not members:
        return "base"
    if body.mode != "merged":
        return body.mode
    if len(members) > 1:
        raise InvalidRequest("mode merged takes one adapter: use unmerged for a composition", param="mode")
    if members[0].weight != 1:
        raise InvalidRequest("mode merged has the adapter's own strength: use unmerged to scale", param="scale")
    return "merged"


def sampling(body: GenerateBody, prompt: Sequence[int], members: Sequence[Member], info: Info) -> Sampling:
    """The sampling asked for. Only a `max_new_tokens` that the caller left open is cut to fit the context."""
    room = info.max_model_len - len(prompt) - sum(virtual_tokens(member.spec) for member in members)
    if room < 1:
        raise _too_long(f"the prompt's {len(prompt):,} tokens and a new one", info)
    wrong = next((id for id in body.logit_bias or () if id >= info.vocab), None)
    if wrong is not None:
        raise InvalidRequest(f"token id {wrong} is not below the vocabulary's {info.vocab}", param="logit_bias")
    wanted = body.max_new_tokens
    if wanted > room and "max_new_tokens" in body.model_fields_set:
        what = f"the prompt's {len(prompt):,} tokens and {wanted:,} new ones"
        raise _too_long(what, info, "shorten it, or ask for fewer")
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        max_new_tokens=min(wanted, room),
        ignore_eos=body.ignore_eos,
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        logit_bias=tuple((body.logit_bias or {}).items()),
        constraint=None if body.response_format is None else body.response_format.constraint,
    )
