"""The nouns that every layer shares. No torch, no web: plain data that pickles, so that the engine may live elsewhere.

Spec      an adapter on disk, at one version              Member   a spec with its weight in one request
Request   what was asked, validated and resolved          Sampling how its tokens are chosen
Constraint   the form that an answer must have
Token     one emitted token    Finished   the end of a request    Loaded, Folded   an adapter's news
Info      what the engine says of its base           Stats  a picture of it after a step
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from adapter_server.errors import AdapterServerError

Mode = Literal["base", "unmerged", "merged"]
AskedMode = Mode | Literal["auto"]  # auto: the engine chooses when the row starts, once
FinishReason = Literal["stop", "length", "eos", "cancelled", "timeout", "error"]
ResidentState = Literal["registered", "loading", "ready", "failed"]  # registered: in the host tier alone
Tier = Literal["disk", "host", "device"]
TIERS: tuple[Tier, ...] = get_args(Tier)
Op = Literal["load", "unload", "pin", "unpin", "merge", "unmerge"]
ConstraintKind = Literal["json_schema", "regex", "lark"]
Top = tuple[tuple[int, float], ...]  # token ids with their logprobs, the likeliest first


@dataclass(frozen=True, slots=True)
class Spec:
    """An adapter on disk at one version. `version` is the first 12 hex digits of the content hash."""

    name: str
    version: str
    path: str
    family: str  # PEFT's peft_type, such as "LORA"
    config: Mapping[str, Any] = field(hash=False, compare=False)
    bytes: int = field(hash=False, compare=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.version


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of a request and its weight w: y = y₀ + Σ wᵢ (yᵢ − y₀) per module."""

    spec: Spec
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that an answer must have: a JSON schema, a regular expression, or a grammar in Lark's language."""

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_new_tokens: int = 128
    ignore_eos: bool = False
    logprobs: int = 0  # alternatives reported per token; 0 reports none
    prompt_logprobs: int = 0  # the same for the prompt's own tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked: validated, tokenised, its adapters resolved to versions. Times are `time.monotonic()`."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    members: tuple[Member, ...] = ()
    mode: AskedMode = "base"
    task_id: int | None = None
    arrived: float = 0.0
    deadline: float | None = None

    @property
    def cost(self) -> int:
        """Tokens that it may take: those of the prompt, and as many new ones as it allows."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def may_merge(self) -> bool:
        """Whether `auto` may take a snapshot: one adapter as it was trained, and no seed to be true to."""
        return len(self.members) == 1 and self.members[0].weight == 1 and self.sampling.seed is None


class Token(NamedTuple):
    """One emitted token of a request; `index` counts from 0. `logprob` and `top` are of the raw logits.

    The first carries those of the prompt's second token and all after it, where they were asked for, and the mode.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # a field, not a tuple's search
    id: int
    logprob: float | None = None
    top: Top = ()
    prompt: tuple[tuple[float, Top], ...] = ()
    mode: Mode | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request. An `error` (reason "error" or "timeout") says why; seconds are since the arrival."""

    request_id: str
    reason: FinishReason
    error: AdapterServerError | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0
    load_s: float = 0.0
    ttft_s: float | None = None
    total_s: float = 0.0
    mode: Mode | None = None  # how it ran; of one that never did, how it was asked for


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter's load ended, well or badly. `warning`: what is odd about an adapter that is served all the same."""

    name: str
    version: str
    seconds: float
    error: str | None = None
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Folded:
    """A snapshot was made, or could not be."""

    name: str
    version: str
    seconds: float
    error: str | None = None


Event = Token | Finished | Loaded | Folded


@dataclass(frozen=True, slots=True)
class Resident:
    """What the engine holds of one adapter version. Bytes are of the device tier, `host_bytes` of the host's."""

    name: str
    version: str
    state: ResidentState
    family: str
    rank: int | None = None
    bytes: int = 0
    snapshot_bytes: int = 0  # 0: no merged snapshot
    host_bytes: int = 0  # compiled; 0: not in the host tier
    pinned: bool = False
    foldable: bool = True
    running: int = 0
    waiting: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Info:
    """The base as a client may know it. `commit`: of a base from a hub."""

    model: str
    max_model_len: int
    vocab: int
    eos: frozenset[int]
    device: str
    dtype: str
    parameters: int
    lane: str
    lane_why: str
    has_encoder: bool  # which reads the prompt, so that an answer is no continuation of it
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """A picture of the engine, taken after a step."""

    running: int = 0
    waiting: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    residents: tuple[Resident, ...] = ()
    hits: Mapping[Tier, int] = field(default_factory=dict)  # where queued requests found their adapters
    decisions: Mapping[Mode, int] = field(default_factory=dict)  # what became of requests of mode auto
