"""Text arrives in pieces, and the pieces are always whole characters whose sum is the text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from adapter_server.errors import BaseNotSupported
from adapter_server.text import INCOMPLETE, Text
from fakes import EOS, save_byte_tokenizer

SAMPLES = ["plain words", "naïve café", "日本語のテキスト", "👩‍👩‍👧 family 🏳️‍🌈", "a\u0301\n\ttail ", ""]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(save_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """As Llama 2's: a mark for spaces, whole words, and bytes for what it does not know."""
    folder = tmp_path_factory.mktemp("pieces")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁plain", "▁words", "日"]
    words += [*"abcdefghijklmnopqrstuvwxyz", "pl", "pla", "plai", "plain", "▁p", "▁pl", "▁pla", "▁plai"]
    words += ["wo", "wor", "word", "words", "▁w", "▁wo", "▁wor", "▁word"]
    merges = [("p", "l"), ("pl", "a"), ("pla", "i"), ("plai", "n"), ("▁", "plain")]
    merges += [("w", "o"), ("wo", "r"), ("wor", "d"), ("word", "s"), ("▁", "words")]
    model = models.BPE({word: id for id, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return Text(folder)


@pytest.fixture(params=["byte_level", "sentencepiece"])
def text(request: pytest.FixtureRequest) -> Text:
    found: Text = request.getfixturevalue(request.param)
    return found


def pieces(text: Text, ids: list[int], prompt: list[int] | None = None, stop: tuple[str, ...] = ()) -> list[str]:
    stream = text.stream(prompt or [], stop)
    return [*(stream.push(id) for id in ids), stream.finish()]


@pytest.mark.parametrize("sample", SAMPLES)
def test_pieces_sum_to_the_text_and_split_no_character(text: Text, sample: str) -> None:
    parts = pieces(text, text.encode(sample))
    assert "".join(parts) == sample
    assert not any(INCOMPLETE in part for part in parts)


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_prompt_decides_about_the_first_space(text: Text, sample: str) -> None:
    prompt, whole = text.encode("plain"), text.encode(f"plain words{sample}")
    assert "".join(pieces(text, whole[len(prompt) :], prompt)) == f" words{sample}"


def test_a_prompt_that_is_cut_inside_a_character_spoils_nothing(sentencepiece: Text) -> None:
    ids = sentencepiece.encode("語語語")
    assert "".join(pieces(sentencepiece, ids[-3:], ids[:-3])) == "語"


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_come_out_as_the_whole_decodes(byte_level: Text, seed: int) -> None:
    random_ids = random.Random(seed).choices(range(256), k=200)
    assert "".join(pieces(byte_level, random_ids)) == byte_level.decode(random_ids)


def test_broken_bytes_do_not_wait_for_ever(text: Text) -> None:
    broken = text.encode("日é")[-1:]  # a byte that continues nothing
    assert any(pieces(text, broken * 20)[:-1])


def test_end_tokens_have_no_text(byte_level: Text) -> None:
    ids = byte_level.encode("ab")
    assert pieces(byte_level, [ids[0], EOS, ids[1]]) == ["a", "", "b", ""]
    stream = byte_level.stream(hidden=(ids[1],))
    assert [stream.push(id) for id in ids] == ["a", ""]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("lo w",), "hel"),
        (("world", "o"), "hell"),
        (("d!",), "hello world"),
        (("x", "worm"), "hello world"),
        (("hello",), ""),
        (("ld",), "hello wor"),
    ],
)
def test_stop_strings_are_found_across_tokens(byte_level: Text, stop: tuple[str, ...], expected: str) -> None:
    assert "".join(pieces(byte_level, byte_level.encode("hello world"), stop=stop)) == expected


def test_what_may_become_a_stop_string_is_held_back(byte_level: Text) -> None:
    stream = byte_level.stream(stop=["aab"])
    assert [stream.push(id) for id in byte_level.encode("xaaab!")] == ["x", "", "", "a", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_a_stop_string_may_be_a_part_of_a_character_sequence(text: Text) -> None:
    assert "".join(pieces(text, text.encode("ab日本"), stop=("本",))) == "ab日"


def test_an_empty_text_is_the_first_token_where_there_is_one(text: Text) -> None:
    assert text.encode("") == ([] if text.bos_id is None else [text.bos_id])


def test_tokens_have_names(byte_level: Text) -> None:
    assert byte_level.token(EOS) == "</s>"
    assert byte_level.token(byte_level.encode("a")[0]) == "a"


def test_a_long_answer_costs_the_same_per_token(byte_level: Text) -> None:
    """The window stays short whatever comes: words, end tokens, broken bytes."""
    for ids in (byte_level.encode("word " * 400), [EOS] * 2000, byte_level.encode("é")[-1:] * 2000):
        stream = byte_level.stream()
        for id in ids:
            stream.push(id)
        assert len(stream._decoder._pending) + len(stream._decoder._context) < 20


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseNotSupported, match="no tokenizer"):
        Text(tmp_path)
