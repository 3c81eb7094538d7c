"""Text as it streams: whole characters, at the end that of decoding everything; cut at stop strings in any pieces."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from infer.params import SamplingParams
from infer.text import Detokenizer, StopStrings, TextStream, encode_bad_words

TEXT = ["Hello world, don't stop. naïve café 中文字 日本語 😀👩‍👩‍👧 !? ﬁn", "one two  three\n\n four\tfive ' ' end ."]
BROKEN = "\ufffd"


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|end|>"])
        made.train_from_iterator(TEXT * 3, trainer)
        made.add_tokens([AddedToken("é x"), AddedToken("中", special=False), "Ġa b"])
    elif kind == "fallback":  # as Llama 2
        spelled = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
        words = ["▁Hello", "▁world", ",", "▁", "▁don", "'", "t", "▁a", "中", "▁stop", ".", "é", "b", "▁▁", ""]
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | spelled | {word: 259 + i for i, word in enumerate(words)}
        made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "metaspace":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        made.train_from_iterator(
            TEXT * 3, trainers.UnigramTrainer(vocab_size=80, special_tokens=["<s>"], unk_token="<s>")
        )
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        made.train_from_iterator(TEXT * 3, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"]))
    else:
        made = Tokenizer(models.WordLevel(unk_token="?"))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
        made.train_from_iterator(TEXT * 3, trainers.WordLevelTrainer(special_tokens=["?"]))
    made.add_special_tokens(["<|special|>"])
    return made


def named(kind: str, *tokens: str) -> list[int]:
    found = [tokenizer(kind).token_to_id(token) for token in tokens]
    assert None not in found
    return [token for token in found if token is not None]


def streamed(kind: str, ids: list[int], **given: Any) -> list[str]:
    stream = Detokenizer(tokenizer(kind)).stream(**given)
    return [*(stream.push(token) for token in ids), stream.flush()]


def sequences(kind: str, seed: int) -> list[list[int]]:
    made, draw = tokenizer(kind), random.Random(seed)
    size = made.get_vocab_size() + 3  # three ids that do not exist
    found = [made.encode(text, add_special_tokens=False).ids for text in (*TEXT, "".join(TEXT), " a", "中文字")]
    known = made.encode(TEXT[0], add_special_tokens=False).ids
    found.append([*known[:3], *[size - 1] * 40, *known[3:9]])
    for _ in range(150):
        if kind == "fallback":  # any characters, spelled by bytes or not, among words
            chars = draw.choices("中é😀b👩ﬁ ", k=draw.randrange(1, 8))
            parts = [[3 + byte for byte in char.encode()] for char in chars]
            parts += [[draw.randrange(259, size)] for _ in range(4)]
            draw.shuffle(parts)
            found.append([token for part in parts for token in part])
        else:
            found.append([draw.randrange(size) for _ in range(draw.randrange(1, 25))])
    return found


@pytest.mark.parametrize("kind", ["bytes", "fallback", "metaspace", "wordpiece", "words"])
@pytest.mark.parametrize("skip", [True, False])
def test_the_stream_is_the_decoding_of_the_whole(kind: str, skip: bool) -> None:
    made = tokenizer(kind)
    assert made.token_to_id("<|special|>") is not None
    for ids in sequences(kind, 1):
        assert "".join(streamed(kind, ids, skip_special_tokens=skip)) == made.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_no_character_is_torn(kind: str) -> None:
    for text in (*TEXT, "😀é中" * 9):
        ids = tokenizer(kind).encode(text, add_special_tokens=False).ids
        pieces = streamed(kind, ids)
        assert BROKEN not in "".join(pieces) and pieces[-1] == ""
        assert len([piece for piece in pieces if piece]) > len(text) / 6, "it is given as it comes"


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_bytes_that_form_no_character_hold_nothing_up(kind: str) -> None:
    made, draw = tokenizer(kind), random.Random(3)
    if kind == "bytes":
        spelled = named(kind, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    else:
        spelled = list(range(3, 259))
    for _ in range(60):
        ids = [draw.choice(spelled[128:]) for _ in range(40)]
        pieces = streamed(kind, ids)
        silent = max(map(len, "".join("x" if piece else "." for piece in pieces[:-1]).split("x")))
        assert silent <= 8
        if kind == "bytes":
            assert "".join(pieces) == made.decode(ids)


def test_the_space_before_the_first_word_follows_the_prompt() -> None:
    hello, world, special = named("fallback", "▁Hello", "▁world", "<|special|>")
    assert "".join(streamed("fallback", [world])) == "world"
    assert "".join(streamed("fallback", [world], context=[special] * 20 + [hello])) == " world"
    assert "".join(streamed("fallback", [hello, world], context=[special] * 20)) == "Hello world"


@pytest.mark.parametrize("kind", ["bytes", "fallback", "metaspace"])
def test_the_work_for_a_token_does_not_grow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting:
        def __init__(self) -> None:
            self.decoder, self.made = tokenizer(kind).decoder, tokenizer(kind)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.made, name)

        def decode(self, ids: list[int], **given: Any) -> str:
            sizes.append(len(ids))
            return self.made.decode(ids, **given)

    ids = [token for ids in sequences(kind, 4) for token in ids][:1500]
    counting: Any = Counting()
    stream = TextStream(SamplingParams(max_tokens=10**6, stop=("never there", "nor this")), Detokenizer(counting))
    for token in ids:
        stream.push([token])
        assert len(stream._stops._held) < 12
    assert len(stream.tokens) == 1500 and len(sizes) <= 3 * 1500 + 2 and max(sizes, default=0) <= 20


def naive(text: str, stops: tuple[str, ...], armed_from: int = 0) -> tuple[str, str | None]:
    """The stop string that is complete first, the longest of those; text before it."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], max(found, key=len)
    return text, None


def test_stop_strings_however_the_text_is_cut() -> None:
    draw = random.Random(2)
    for _ in range(1500):
        stops = tuple("".join(draw.choices("ab", k=draw.randrange(1, 6))) for _ in range(draw.randrange(1, 4)))
        text = "".join(draw.choices("abc", weights=[5, 5, 1], k=draw.randrange(25)))
        armed_from = draw.choice([0, 0, draw.randrange(len(text) + 1)])
        cuts = sorted({0, armed_from, len(text), *(draw.randrange(len(text) + 1) for _ in range(draw.randrange(6)))})
        search, given, found = StopStrings(stops), "", None
        for start, stop in pairwise(cuts):
            piece, found = search.push(text[start:stop], armed=start >= armed_from)
            given += piece
            if found:
                break
            held = text[len(given) : stop]
            assert held == "" or any(one.startswith(held) for one in stops), "no more is held back than may be needed"
        given += "" if found else search.flush()
        assert (given, found) == naive(text, stops, armed_from), (text, stops, cuts)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("include", [True, False])
def test_requests_end_at_stop_strings_across_tokens(kind: str, include: bool) -> None:
    made = tokenizer(kind)
    ids = made.encode(TEXT[0], add_special_tokens=False).ids
    whole = made.decode(ids)
    draw = random.Random(5)
    for _ in range(60):
        start = draw.randrange(len(whole) - 6)
        stop = whole[start : start + draw.randrange(1, 6)]
        params = SamplingParams(stop=(stop, "absent"), include_stop=include)
        stream, given = TextStream(params, Detokenizer(made)), ""
        rest = list(ids)
        while rest and stream.finish_reason is None:
            size = draw.randrange(1, 4)
            given += stream.push(rest[:size])
            rest = rest[size:]
        assert (stream.finish_reason, stream.stop_reason) == ("stop", stop)
        assert given == stream.text == whole[: whole.index(stop)] + (stop if include else "")
        needed = len(stream.tokens)
        assert stop in made.decode(ids[:needed]) and stop not in made.decode(ids[: needed - 1])
        assert stream.push([5]) == "" and len(stream.tokens) == needed


def test_reasons_to_end() -> None:
    made = tokenizer("bytes")
    end, a, b, half = named("bytes", "<|end|>", "a", "b", "ä")  # half: the first byte of a character of three

    def run(*ids: int, text: bool = True, **given: Any) -> tuple[Any, ...]:
        stream = TextStream(SamplingParams(**given), Detokenizer(made) if text else None, ends=(end,))
        given_text = "".join(stream.push([token]) for token in ids)
        return given_text, stream.tokens, stream.finish_reason, stream.stop_reason

    assert run(a, b) == ("ab", [a, b], None, None)
    assert run(a, end, b) == ("a", [a], "stop", end)
    assert run(a, end, b, ignore_eos=True, max_tokens=3) == ("ab", [a, end, b], "length", None)
    assert run(a, end, include_stop=True) == ("a", [a, end], "stop", end)
    assert run(a, end, include_stop=True, skip_special_tokens=False) == ("a<|end|>", [a, end], "stop", end)
    assert run(a, b, a, stop_tokens=(b,)) == ("a", [a], "stop", b)
    assert run(a, b, a, stop_tokens=(b,), include_stop=True) == ("ab", [a, b], "stop", b)
    assert run(a, b, a, max_tokens=2) == ("ab", [a, b], "length", None)
    assert run(a, b, stop=("b",), max_tokens=2) == ("a", [a, b], "stop", "b")
    assert run(a, b, a, stop=("ba", "abx"), max_tokens=2) == ("ab", [a, b], "length", None)
    assert run(a, half, max_tokens=2) == ("a" + BROKEN, [a, half], "length", None)
    assert run(a, half, end) == ("a" + BROKEN, [a, half], "stop", end)
    assert run(a, b, a, b, stop=("ab",), min_tokens=2) == ("ab", [a, b, a, b], "stop", "ab")
    assert run(a, b, a, b, stop=("ba",), min_tokens=2) == ("a", [a, b, a], "stop", "ba")
    assert run(a, b, a, stop=("ab",), min_tokens=1) == ("", [a, b], "stop", "ab")
    assert run(a, b, end, text=False) == ("", [a, b], "stop", end)
    stream = TextStream(SamplingParams(stop=("abc",)), Detokenizer(made))
    assert stream.push([a, b]) == "" and stream.close() == "ab" == stream.text


def test_bad_words_as_texts_become_tokens() -> None:
    for kind in ("bytes", "metaspace"):
        made = tokenizer(kind)
        params = encode_bad_words(SamplingParams(bad_words=(" world", (5, 6), "stop")), made)
        assert list(params.problems(vocabulary=made.get_vocab_size(), text=False)) == []
        for word in ("world", " world", "stop", " stop"):
            assert tuple(made.encode(word, add_special_tokens=False).ids) in params.bad_words
        assert (5, 6) in params.bad_words and len(set(params.bad_words)) == len(params.bad_words)
    assert encode_bad_words(SamplingParams(), None) == SamplingParams()
