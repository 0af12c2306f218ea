"""Tokens and text: encoding, decoding as tokens arrive, and stop strings.

Text      a base model's tokenizer        Decoder   ids to pieces that never split a character
Stream    a Decoder that also watches for stop strings: one per running request
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from adapter_server.errors import BaseNotSupported, InvalidRequest

Decode = Callable[[Sequence[int]], str]  # the text of some ids

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 6  # of the prompt: enough for a decoder to know whether a space precedes the first new word
LONGEST_TAIL = 3  # tokens that may hold a character's first bytes: a fourth byte would complete it
WIDTHS = 1 << 18  # tokens whose own width is remembered: more than most vocabularies have
LONGEST_WAIT = 8  # pending tokens, after which the text is broken bytes rather than an unfinished character


class Text:
    """The tokenizer of a base model. Special tokens are never part of a text."""

    def __init__(self, model: str | Path) -> None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model))
        except (OSError, ValueError) as error:
            raise BaseNotSupported(f"{model} has no tokenizer that can be read: {error}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.special_ids: frozenset[int] = frozenset(tokenizer.all_special_ids)
        self.longest_token: int = max((len(token) for token in tokenizer.get_vocab()), default=1)
        decode = _fast(backend) if backend is not None else _plain(tokenizer)
        self._decode: Decode = decode
        self._width = lru_cache(WIDTHS)(lambda id: len(decode((id,))))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with what the base expects around it (such as a first token)."""
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        if not ids and self.bos_id is not None:
            return [self.bos_id]
        return ids

    def spans(self, text: str, special: bool = True) -> list[tuple[int, int, int]]:
        """The ids of a text, each with where its characters begin and end; special tokens have none."""
        if not self._tokenizer.is_fast:
            raise InvalidRequest("this base's tokenizer does not say where a token stands: send prompt, not inputs")
        found = self._tokenizer(text, verbose=False, add_special_tokens=special, return_offsets_mapping=True)
        return [(id, *at) for id, at in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation that awaits its next message, in the base's own template (run in a sandbox)."""
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this base has no chat template: ask for a completion instead", param="messages")
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            message = f"the base's chat template refuses these messages: {error}"
            raise InvalidRequest(message, param="messages") from None
        return ids

    def chat_variables(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """What a chat template is given, as transformers gives it."""
        given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        return {**self._tokenizer.special_tokens_map, **given}

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a rendered template, which holds its special tokens itself."""
        ids: list[int] = self._tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(ids)

    def token(self, id: int) -> str:
        """One token as a reader sees it; special tokens by their names."""
        return str(self._tokenizer.decode([id], skip_special_tokens=False))

    def stream(self, prompt: Sequence[int] = (), stop: Iterable[str] = (), hidden: Collection[int] = ()) -> Stream:
        """For one answer to `prompt`; `hidden` ids (end tokens) have no text."""
        decoder = Decoder(self._decode, prompt[-CONTEXT_TOKENS:], self.special_ids.union(hidden), self._width)
        return Stream(decoder, tuple(stop))


def _fast(backend: object) -> Decode:
    decode: Callable[[list[int], bool], str] = backend.decode  # type: ignore[attr-defined]
    return lambda ids: decode(list(ids), True)


def _plain(tokenizer: object) -> Decode:
    decode: Callable[..., str] = tokenizer.decode  # type: ignore[attr-defined]
    return lambda ids: decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Decoder:
    """Turns ids into text one at a time. What is not yet a whole character stays pending.

    window   [ context | pending ]      context: its text is out; kept because a token's text depends on its left

    `width` is how many characters a token has alone, which is asked of every one.
    """

    __slots__ = ("_context", "_decode", "_hidden", "_pending", "_shown", "_width")

    def __init__(
        self, decode: Decode, context: Sequence[int], hidden: Collection[int], width: Callable[[int], int]
    ) -> None:
        self._decode = decode
        self._hidden = hidden
        self._width = width
        self._context = self._whole(context)
        self._pending: list[int] = []
        self._shown = len(decode(self._context))  # characters of the window that are out

    def push(self, id: int) -> str:
        """The text that became certain with this token."""
        if id in self._hidden:
            return ""
        self._pending.append(id)
        text = self._decode(self._context + self._pending)
        if text.endswith(INCOMPLETE):
            return self._give_up() if len(self._pending) > LONGEST_WAIT else ""
        if len(text) == self._shown:  # an id without text is no context either
            self._pending.clear()
            return ""
        return self._advance(text, len(self._pending))

    def flush(self) -> str:
        """What is left at the end, broken characters and all."""
        return self._advance(self._decode(self._context + self._pending), len(self._pending))

    def _whole(self, context: Sequence[int]) -> list[int]:
        """The context from its first whole character: half of one would spoil every byte after it."""
        starts = range(len(context))
        whole = (at for at in starts if not self._decode(context[at:]).startswith(INCOMPLETE))
        return list(context[next(whole, len(context)) :])

    def _give_up(self) -> str:
        count = len(self._pending) - LONGEST_TAIL
        return self._advance(self._decode(self._context + self._pending[:count]), count)

    def _advance(self, text: str, count: int) -> str:
        piece = text[self._shown :]
        if count:
            self._context, self._pending = self._pending[:count], self._pending[count:]
        alone = len(self._context) == 1
        self._shown = self._width(self._context[0]) if alone else len(self._decode(self._context))
        return piece


class Stream:
    """The text of one answer as it grows. `stopped` turns true when a stop string was found; its text never shows."""

    __slots__ = ("_decoder", "_held", "_stop", "stopped")

    def __init__(self, decoder: Decoder, stop: tuple[str, ...] = ()) -> None:
        self._decoder = decoder
        self._stop = stop
        self._held = ""  # the beginning of what may become a stop string
        self.stopped = False

    def push(self, id: int) -> str:
        """The text to show after this token; nothing once stopped."""
        if self.stopped:
            return ""
        piece = self._decoder.push(id)
        return self._release(piece) if self._stop else piece

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        if self.stopped:
            return ""
        piece = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return piece + ("" if self.stopped else held)

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
