"""Answers of a given form: a constraint, compiled against the tokenizer, says before each token which may follow.

Guides   compiles constraints, on a thread of its own, and looks ahead for all rows of a step beside its forward
Guide    one row's place in its constraint. It follows the row's tokens, so that preemption does not touch it

The languages are llguidance's: JSON schema, Rust's regular expressions, Lark. No other file imports it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from adapter_server.core import Constraint
from adapter_server.errors import AdapterServerError, InvalidRequest

FIELD = "response_format"
MOST_KEPT = 32  # compiled constraints that wait for the next request of the same form
MOST_LINES = (
    256  # of a grammar: llguidance tells of a mistake in time quadratic in the depth of rules (seen: 10 s at 800)
)
LONGEST_REASON = 300  # characters of llguidance's own words
WHITESPACE = r"( |\n( {0,16}|\t{0,8}))?"  # between JSON's tokens: bounded, or a base that is no writer fills it forever
DEAD_END = "NoExtension"  # llguidance's word for a place from which no token leads on
LIMITS = LLParserLimits(  # of one compilation and of one step, in llguidance's units: together a few milliseconds
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
GRAMMARS: dict[str, Callable[[str], str]] = {
    "json_schema": lambda text: LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": WHITESPACE}),
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
}


class Guide:
    """One row's place in its constraint. `error` says why it leads no further; its row ends with that."""

    def __init__(self) -> None:
        self.ready = False
        self.error: AdapterServerError | None = None
        self._matcher: LLMatcher
        self._mask: Tensor
        self._looked = False

    def begin(self, compiled: Future[tuple[LLMatcher, int]]) -> None:
        """What the compilation came to; `ready` either way."""
        if failure := compiled.exception():
            self.error = failure if isinstance(failure, AdapterServerError) else _refusal(failure)
        else:
            self._matcher, tokens = compiled.result()
            self._mask = torch.zeros((tokens + 31) // 32, dtype=torch.int32)
        self.ready = True

    @property
    def mask(self) -> Tensor:
        """[words] int32, a bit for each token that may follow; none where there is an error."""
        if not self._looked:
            self.look()
        return self._mask

    def look(self) -> None:
        """Find out what may follow, ahead of being asked. Other rows may do so at the same time. Raises nothing."""
        self._looked = True
        try:
            self._matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), self._mask.nbytes)
        except Exception as failure:
            self.error = _refusal(failure)
        else:
            self._judge()

    def take(self, id: int) -> bool:
        """Go on by the token that was chosen; whether the answer is complete with it."""
        self._looked = False
        self._matcher.consume_token(id)
        self._judge()
        return self.error is None and self._matcher.is_stopped()

    def _judge(self) -> None:
        if self._matcher.is_error():
            self.error = _refusal(self._matcher.get_error())


class Guides:
    """The constraints of one base. A tokenizer is read when the first of them comes."""

    def __init__(self, tokenizer: str | Path | None, vocab: int, ends: Collection[int], max_bytes: int) -> None:
        self._source, self._vocab, self._ends, self._max_bytes = tokenizer, vocab, sorted(ends), max_bytes
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._compiler = ThreadPoolExecutor(1, "guides")
        self._lookouts = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "guide")
        self.wake: Callable[[], None] = lambda: None

    def want(self, constraint: Constraint) -> Guide:
        """A guide that will be ready soon. Raises InvalidRequest where that can be said at once."""
        if (size := len(constraint.text.encode())) > self._max_bytes:
            raise _refusal(f"it has {size:,} bytes, and may have {self._max_bytes:,} (--max-grammar-bytes)")
        if constraint.kind == "lark" and (lines := len(constraint.text.splitlines())) > MOST_LINES:
            raise _refusal(f"it has {lines:,} lines, and may have {MOST_LINES}")
        guide = Guide()
        self._compiler.submit(self._compiled, constraint).add_done_callback(lambda done: self._begin(guide, done))
        return guide

    def _begin(self, guide: Guide, done: Future[tuple[LLMatcher, int]]) -> None:
        if done.cancelled():
            return
        guide.begin(done)
        self.wake()

    def look(self, guides: Iterable[Guide]) -> Callable[[], object]:
        """Begin to look ahead for these; what is returned waits until all have."""
        looks = [self._lookouts.submit(guide.look) for guide in guides]
        return partial(wait, looks)

    def close(self) -> None:
        for pool in (self._compiler, self._lookouts):
            pool.shutdown(wait=False, cancel_futures=True)

    # On the compiler's thread

    def _compiled(self, constraint: Constraint) -> tuple[LLMatcher, int]:
        """A matcher at the start of the constraint, and for how many tokens. Raises InvalidRequest."""
        self._tokenizer = self._tokenizer or self._read_tokenizer()
        matcher = self._kept.get(constraint)
        if matcher is None:
            matcher = self._kept[constraint] = _compile(constraint, self._tokenizer)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(constraint)
        return matcher.deep_copy(), self._tokenizer.vocab_size

    def _read_tokenizer(self) -> LLTokenizer:
        """The base's own. llguidance needs to know each token's bytes, which only a fast tokenizer can tell."""
        if self._source is None:
            raise InvalidRequest(f"this base has no tokenizer: {FIELD} cannot be served", param=FIELD)
        tokenizer = AutoTokenizer.from_pretrained(str(self._source))
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise InvalidRequest(f"this base's tokenizer is not a fast one: {FIELD} cannot be served", param=FIELD)
        vocab = max(self._vocab, len(tokenizer))
        return from_tokenizer(tokenizer, n_vocab=vocab, eos_token=self._ends or None)


def _compile(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    try:
        grammar = GRAMMARS[constraint.kind](constraint.text)
    except ValueError as error:
        raise _refusal(error) from None
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # one that allows no first token is broken, and says so only here
    if matcher.is_error():
        raise _refusal(matcher.get_error())
    return matcher


def _refusal(reason: object) -> InvalidRequest:
    said = " ".join(str(reason).split())
    said = "no token may follow" if said.startswith(DEAD_END) else said
    said = said if len(said) <= LONGEST_REASON else said[:LONGEST_REASON] + "…"
    return InvalidRequest(f"{FIELD}: this form cannot be followed: {said}", param=FIELD)
