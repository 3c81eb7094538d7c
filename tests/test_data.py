"""The data path: corpora, tokenizers, packed tokens, and the order in which they are trained on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from parallel.errors import ConfigError, DataError
from parallel.models.batch import IGNORE, Batch
from parallel.tokenizer import END_OF_TEXT, end_of_text, load_tokenizer, vocabulary_size, write_tokenizer
from zero import data
from zero.corpus import STDLIB, Corpus, held_out, sample
from zero.data import DataConfig, PackedTokens, Prepared, prepare
from zero.loader import Loader, permute, validation_batches
from zero.tokenizer import encode_documents, train_bpe

CODE = (
    'class Ünïcode(object):\r\n\tdef f(self):\n        return {"a_b": 12345}  # 日本語 🦜 it\'s\n\n\n\n'
    "    \n x = 1   \n"
)
TEXTS = ["abc", "bad cab", "a", "dabble in code", "cc dd"]


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def letters(folder: Path) -> Path:
    """A tokenizer of single characters: its ids are the positions in this string, after the end of text."""
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0} | {c: i for i, c in enumerate("abcdefghil no?", 1)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"eos_token_id": [0, 3]}')
    return folder


def ids(text: str) -> list[int]:
    return [1 + "abcdefghil no?".index(c) for c in text] + [0]


def packed(folder: Path, documents: list[list[int]], vocabulary: int = 1 << 16) -> PackedTokens:
    """A split written by hand."""
    flat = [token for document in documents for token in document]
    np.array(flat, "<u2").tofile(folder / "train.tokens")
    np.cumsum([0, *map(len, documents)]).astype("<i8").tofile(folder / "train.documents")
    return PackedTokens(folder, "train", np.dtype("<u2"), vocabulary)


def counted(folder: Path, tokens: int, document: int = 7) -> PackedTokens:
    """Tokens 1, 2, 3 ... in documents of equal length."""
    flat = list(range(1, tokens + 1))
    return packed(folder, [flat[i : i + document] for i in range(0, tokens, document)])


# Corpora


def test_every_kind_of_file_gives_its_documents_in_order(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "z.py").write_text(" \n")
    (tmp_path / "weights.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    write_lines(tmp_path / "c.jsonl", {"text": "line one"}, {"text": ""}, {"text": "line\nthree", "more": 1})
    table = pa.table({"other": list(range(1000)), "text": pa.array([f"row {i}" for i in range(1000)])})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=300)
    corpus = Corpus(str(tmp_path))
    expected = ["first", "one\r\ntwo\n", "line one", "line\nthree", *(f"row {i}" for i in range(1000))]
    assert list(corpus) == expected
    assert list(corpus) == expected, "a second pass reads the same"
    assert corpus.skipped == {"empty": 2, "broken": 0, "unsupported": 1}
    assert corpus.share == 1.0


def test_lists_and_globs_read_each_file_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c,d.txt"):
        (tmp_path / name).write_text(name)
    assert list(Corpus(f"{tmp_path}/b.txt, {tmp_path}/[ab].txt")) == ["b.txt", "a.txt"]
    assert list(Corpus(f"{tmp_path}/c,d.txt")) == ["c,d.txt"]


def test_the_standard_library_is_there_and_has_no_tests() -> None:
    corpus = Corpus(STDLIB)
    names = [file.name for file in corpus.files]
    assert names == sorted(names) and len(names) > 200
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert next(iter(corpus)) == Path(os.__file__).parent.joinpath(names[0]).read_bytes().decode()


def test_all_broken_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{",
        b'{"tex": "no key"}',
        b'{"text": 3}',
        b"[1]",
        b'{"text": "\xff"}',
        b"",
        b"[" * 99999,
    ]
    path.write_bytes(b"\n".join([*lines, b'{"text": "\\ud800"}', b'{"text": "also good"}']))
    seen: list[str] = []
    with pytest.raises(DataError) as caught:
        seen.extend(iter(Corpus(str(path))))
    assert seen == ["good"], "nothing is used after the first broken line"
    places = [problem.split(": ")[0] for problem in caught.value.problems]
    assert places == [f"{path}:{line}" for line in (2, 3, 4, 5, 6, 8, 9)] + [str(path)]
    assert "did you mean 'tex'?" in caught.value.problems[1]
    assert "7 broken documents" in caught.value.problems[-1]
    tolerant = Corpus(str(path), skip_broken=True)
    assert list(tolerant) == ["good", "also good"]
    assert tolerant.skipped["broken"] == 7


def test_the_first_twenty_broken_documents_are_listed_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n" * 15)
    (tmp_path / "b.jsonl").write_text("{\n" * 15)
    (tmp_path / "c.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError) as caught:
        list(Corpus(str(tmp_path)))
    assert len(caught.value.problems) == 21
    assert caught.value.problems[19].startswith(f"{tmp_path}/b.jsonl:5: ")
    assert "31 broken documents (the first 20 are listed)" in caught.value.problems[-1]


def test_paths_that_cannot_be_used_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        Corpus(f"{tmp_path}/none.txt,{tmp_path}/a.bin,{tmp_path}/empty,python_stdlib")
    assert [problem.split(": ")[1].split(" ")[0] for problem in caught.value.problems] == [
        "no",
        "unsupported",
        "no",
        "no",
    ]
    assert "did you mean 'python-stdlib'?" in caught.value.problems[3]
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no document that is not empty"):
        list(Corpus(f"{tmp_path}/blank.txt"))


def test_parquet_is_refused_by_column_kind_and_cell(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"], "number": [1, 2, 3]}), path)
    with pytest.raises(DataError, match=r"x\.parquet:row 2: 'text' must be text"):
        list(Corpus(str(path)))
    assert list(Corpus(str(path), skip_broken=True)) == ["a", "b"]
    with pytest.raises(DataError, match="column 'number' must hold text, holds int64"):
        list(Corpus(str(path), text_key="number", skip_broken=True))
    with pytest.raises(DataError, match=r"no column 'texts' \(did you mean 'text'"):
        list(Corpus(str(path), text_key="texts", skip_broken=True))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(Corpus(str(path), skip_broken=True))


def test_the_fingerprint_follows_names_sizes_and_times(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(5, 5))
    seen = {Corpus(str(tmp_path)).fingerprint()}
    path.write_text("two")
    os.utime(path, ns=(5, 5))
    assert Corpus(str(tmp_path)).fingerprint() in seen
    os.utime(path, ns=(5, 6))
    seen.add(Corpus(str(tmp_path)).fingerprint())
    path.write_text("three")
    os.utime(path, ns=(5, 6))
    seen.add(Corpus(str(tmp_path)).fingerprint())
    path.rename(tmp_path / "b.txt")
    seen.add(Corpus(str(tmp_path)).fingerprint())
    assert len(seen) == 4


def test_held_out_documents_are_a_share_and_copies_stay_together(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(4000)]
    out = [held_out(index, text, 0.1) for index, text in enumerate(texts)]
    assert 340 < sum(out) < 460
    assert out[1:] == [held_out(index + 9999, text, 0.1) for index, text in enumerate(texts)][1:]
    assert not any(held_out(0, text, 0.999) for text in texts)
    assert not any(held_out(index, text, 0.0) for index, text in enumerate(texts))


def test_the_sample_is_bounded_and_follows_the_hashes_not_the_order(tmp_path: Path) -> None:
    texts = [f"{i:010d}" for i in range(300)]
    forward = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    backward = write_lines(tmp_path / "b.jsonl", *({"text": text} for text in reversed(texts)))
    picked = sample(Corpus(str(forward)), 0.0, 95, lambda what, share: None)
    assert len(picked) == 10 and picked != texts[:10]
    assert picked == sample(Corpus(str(backward)), 0.0, 95, lambda what, share: None)
    training = sample(Corpus(str(forward)), 0.3, 1 << 20, lambda what, share: None)
    assert set(training) == {text for index, text in enumerate(texts) if not held_out(index, text, 0.3)}


# Tokenizers


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(iter([CODE * 3, "def f(x):\n    return x\n" * 20]), 320)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_survives_a_trained_tokenizer(bpe: Tokenizer, text: str) -> None:
    [(same, tokens)] = encode_documents(bpe, [text])
    assert same == text
    assert bpe.decode(tokens, skip_special_tokens=False) == text


def test_a_trained_tokenizer_is_deterministic_and_keeps_indentation(bpe: Tokenizer) -> None:
    again = train_bpe(iter([CODE * 3, "def f(x):\n    return x\n" * 20]), 320)
    assert again.to_str() == bpe.to_str()
    assert vocabulary_size(bpe) == 320 and bpe.token_to_id(END_OF_TEXT) == 0
    assert bpe.decode(bpe.encode(CODE).ids) == CODE
    assert "   " in [bpe.decode([token]) for token in bpe.encode("):\n    return").ids]
    with pytest.raises(ConfigError, match="257"):
        train_bpe(iter(["a"]), 256)


def test_a_special_token_in_a_document_is_plain_text(bpe: Tokenizer) -> None:
    [(text, tokens)] = encode_documents(bpe, [f"a{END_OF_TEXT}b"])
    assert 0 not in tokens and bpe.decode(tokens) == text
    assert bpe.encode(text).ids.count(0) == 1, "the caller's tokenizer is left as it was"


def test_what_a_given_tokenizer_adds_or_cuts_is_left_out(bpe: Tokenizer) -> None:
    other = Tokenizer.from_str(bpe.to_str())
    other.enable_truncation(3)
    other.enable_padding(length=50)
    assert [tokens for _, tokens in encode_documents(other, ["abcdefghi"])] == [bpe.encode("abcdefghi").ids]


def test_transformers_loads_what_is_written_and_encodes_the_same(bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(bpe, tmp_path, longest=77)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (CODE, "", " leading", f"a{END_OF_TEXT}b", "it 's a  test ."):
        assert theirs(text)["input_ids"] == bpe.encode(text).ids
        assert theirs.decode(bpe.encode(text).ids) == text
    assert (theirs.eos_token, theirs.bos_token, theirs.eos_token_id) == (END_OF_TEXT, END_OF_TEXT, 0)
    assert theirs.model_max_length == 77 and len(theirs) == vocabulary_size(bpe)
    assert end_of_text(load_tokenizer(tmp_path), tmp_path) == 0
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == bpe.to_str()


def test_a_folder_says_which_token_ends_a_document(bpe: Tokenizer, tmp_path: Path) -> None:
    assert end_of_text(bpe) == end_of_text(bpe, tmp_path) == 0
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert end_of_text(bpe, tmp_path) == 5
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert end_of_text(bpe, tmp_path) == 7
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    assert end_of_text(bpe, tmp_path) == bpe.token_to_id("a")
    for bad in ('{"eos_token": "<none>"}', '{"eos_token": 9999}', "{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(bad)
        with pytest.raises(DataError, match=r"tokenizer_config\.json"):
            end_of_text(bpe, tmp_path)
    with pytest.raises(DataError, match="none of the tokens"):
        end_of_text(Tokenizer(models.WordLevel({"a": 0}, "a")))


def test_paths_that_hold_no_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError, match=path.name):
            load_tokenizer(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        load_tokenizer(tmp_path / "empty")


# Preparation


def small(tmp_path: Path, **changes: object) -> DataConfig:
    """A corpus of TEXTS and a tokenizer of letters."""
    if not (tmp_path / "corpus.jsonl").exists():
        write_lines(tmp_path / "corpus.jsonl", *({"text": text} for text in TEXTS))
        letters(tmp_path / "letters")
    given = {"source": f"{tmp_path}/corpus.jsonl", "tokenizer": f"{tmp_path}/letters", "validation": 0.0}
    return DataConfig(**(given | changes))  # pyright: ignore[reportArgumentType]


def test_packed_tokens_are_the_documents_each_with_its_end(tmp_path: Path) -> None:
    prepared = prepare(small(tmp_path), tmp_path / "out")
    flat = [token for text in TEXTS for token in ids(text)]
    assert np.fromfile(tmp_path / "out" / "train.tokens", "<u2").tolist() == flat
    starts = np.fromfile(tmp_path / "out" / "train.documents", "<i8").tolist()
    assert starts == [0, 4, 12, 14, 29, 35]
    assert (prepared.end_of_text, prepared.vocabulary) == (0, 15)
    assert prepared.splits["train"] == data.Split(35, 5, 30)
    assert prepared.bytes_per_token("train") == 30 / 35
    assert prepared.splits["validation"] == data.Split(0, 0, 0) and prepared.bytes_per_token("validation") == 0.0
    assert prepared.open("validation").windows(1) == 0
    assert Prepared.load(tmp_path / "out", hashes=True) == prepared
    assert end_of_text(load_tokenizer(tmp_path / "out"), tmp_path / "out") == 0


def test_splits_partition_the_documents(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", *({"text": f"text {i} é"} for i in range(200)))
    config = DataConfig(source=str(source), vocabulary=300, validation=0.3)
    seen: list[tuple[str, float]] = []
    prepared = prepare(config, tmp_path / "out", lambda what, share: seen.append((what, share)))
    tokenizer = load_tokenizer(tmp_path / "out")
    for split, wanted in (("train", False), ("validation", True)):
        tokens = np.fromfile(tmp_path / "out" / f"{split}.tokens", "<u2").astype(int)
        starts = np.fromfile(tmp_path / "out" / f"{split}.documents", "<i8")
        pieces = [tokens[a:b].tolist() for a, b in pairwise(starts)]
        assert all(piece[-1] == 0 for piece in pieces)
        texts = [text for i in range(200) if held_out(i, text := f"text {i} é", 0.3) == wanted]
        assert [tokenizer.decode(piece[:-1]) for piece in pieces] == texts
        assert prepared.splits[split] == data.Split(len(tokens), len(texts), len("".join(texts).encode()))
    assert prepared.vocabulary <= 300
    assert seen[-1] == ("encoding", 1.0) and ("training the tokenizer", 0.0) in seen


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    vocabulary = {"<eos>": 0, "?": 1, "a": 65535}
    for largest, dtype in ((65535, "<u2"), (70000, "<u4")):
        folder = tmp_path / str(largest)
        folder.mkdir()
        Tokenizer(models.WordLevel(vocabulary | {"a": largest}, "?")).save(str(folder / "tokenizer.json"))
        (folder / "a.txt").write_text("a")
        config = DataConfig(source=f"{folder}/a.txt", tokenizer=str(folder / "tokenizer.json"))
        prepared = prepare(config, folder / "out")
        assert (prepared.dtype, prepared.vocabulary) == (dtype, largest + 1)
        assert prepared.open("train").window(0, 1)[0].tolist() == [largest]


def test_a_prepared_folder_is_used_again_and_not_for_anything_else(tmp_path: Path) -> None:
    first = prepare(small(tmp_path), tmp_path / "out")
    stamp = (tmp_path / "out" / "data.json").stat().st_mtime_ns
    assert prepare(small(tmp_path, vocabulary=999), tmp_path / "out") == first, "nothing is trained: size is no matter"
    assert (tmp_path / "out" / "data.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError) as caught:
        prepare(small(tmp_path, validation=0.5, skip_broken=True), tmp_path / "out")
    assert len(caught.value.problems) == 2
    assert "skip_broken = False, asked for is True" in caught.value.problems[0]
    assert "validation = 0.0, asked for is 0.5" in caught.value.problems[1]
    (tmp_path / "letters" / "config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(DataError, match="end_of_text = 0, asked for is 3"):
        prepare(small(tmp_path), tmp_path / "out")
    (tmp_path / "letters" / "config.json").unlink()
    write_lines(tmp_path / "corpus.jsonl", {"text": "other"})
    with pytest.raises(DataError, match="made from other files"):
        prepare(small(tmp_path), tmp_path / "out")


def test_problems_are_reported_together_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(source=f"{tmp_path}/no.txt", tokenizer=f"{tmp_path}/no"), tmp_path / "out")
    assert len(caught.value.problems) == 2
    bad = DataConfig(source=" ", text_key="", vocabulary=256, validation=float("nan"))
    assert len(bad.problems()) == 4 and not DataConfig().problems()
    with pytest.raises(ConfigError, match="vocabulary = 256"):
        prepare(bad, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(DataError, match="not prepared data"):
        prepare(small(tmp_path), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]
    (tmp_path / "out" / "thesis.txt").unlink()
    assert prepare(small(tmp_path), tmp_path / "out").splits["train"].documents == 5


def test_a_failure_half_way_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path)

    def fail(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    for place in ("encode_documents", "_sync", "write_tokenizer"):
        with monkeypatch.context() as patch:
            patch.setattr(data, place, fail)
            with pytest.raises(KeyboardInterrupt):
                prepare(config, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "corpus.jsonl", "letters"]
    (tmp_path / "corpus.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="broken"):
        prepare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_under_way_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path)

    def change(what: str, share: float) -> None:
        write_lines(tmp_path / "corpus.jsonl", {"text": "x"})

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(config, tmp_path / "out", change)
    assert not (tmp_path / "out").exists()


PROGRAM = """
import sys, time
from pathlib import Path
from zero.data import DataConfig, prepare
source, out, pause = sys.argv[1:]
def progress(what, share):
    if what == "encoding":
        time.sleep(float(pause))
prepare(DataConfig(source=source, vocabulary=300, validation=0.0), Path(out), progress)
"""


def start(source: Path, out: Path, pause: float) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", PROGRAM, str(source), str(out), str(pause)]
    root = Path(data.__file__).parents[1]
    return subprocess.Popen(words, cwd=root)


def test_a_killed_process_leaves_nothing_and_the_next_one_builds(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", *({"text": f"text {i}"} for i in range(50)))
    out = tmp_path / "out"
    processes = [start(source, out, 60)]
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / ".out.partial" / "train.tokens").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        processes.append(start(source, out, 0))
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert not out.exists()
        assert processes[1].wait(30) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out", "x.jsonl"]
    assert Prepared.load(out, hashes=True).splits["train"].documents == 50


def test_the_second_of_two_waits_and_uses_what_the_first_built(tmp_path: Path) -> None:
    config = small(tmp_path)
    log: list[str] = []
    built: list[Prepared] = []
    holding = threading.Event()

    def slow(what: str, share: float) -> None:
        log.append("first")
        holding.set()
        time.sleep(0.3)

    first = threading.Thread(target=lambda: built.append(prepare(config, tmp_path / "out", slow)))
    first.start()
    assert holding.wait(10)
    second = prepare(config, tmp_path / "out", lambda what, share: log.append("second"))
    assert (tmp_path / "out" / "data.json").exists()
    first.join()
    assert built == [second] and "second" not in log


def test_missing_and_damaged_files_are_all_named(tmp_path: Path) -> None:
    prepare(small(tmp_path), tmp_path / "out")
    tokens = tmp_path / "out" / "train.tokens"
    content = bytearray(tokens.read_bytes())
    content[3] ^= 1
    tokens.write_bytes(content)
    Prepared.load(tmp_path / "out")
    with pytest.raises(DataError, match=r"train\.tokens: damaged: its SHA-256"):
        Prepared.load(tmp_path / "out", hashes=True)
    tokens.write_bytes(content[:-1])
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(DataError) as caught:
        Prepared.load(tmp_path / "out")
    assert ["tokenizer.json: missing" in problem for problem in caught.value.problems] == [True, False]
    assert "train.tokens: damaged: 69 bytes, expected 70" in caught.value.problems[1]
    for bad in ("{", "[]", '{"format": 2}', '{"format": 1}'):
        (tmp_path / "out" / "data.json").write_text(bad)
        with pytest.raises(DataError, match=r"data\.json"):
            Prepared.load(tmp_path / "out")
    with pytest.raises(DataError, match="no prepared data"):
        Prepared.load(tmp_path / "nowhere")


# Windows


def test_windows_labels_and_boundaries_are_exact(tmp_path: Path) -> None:
    tokens = prepare(small(tmp_path), tmp_path / "out").open("train")
    flat = [token for text in TEXTS for token in ids(text)]
    starts = {4, 12, 14, 29, 35}
    assert tokens.windows(4) == 8 and tokens.windows(34) == 1 and tokens.windows(35) == 0
    for length in (1, 3, 4, 5, 34):
        for number in range(tokens.windows(length)):
            begin = number * length
            places = range(begin, begin + length)
            got, labels, boundaries = tokens.window(number, length)
            assert got.dtype == labels.dtype == torch.int64
            assert got.tolist() == [flat[i] for i in places]
            assert labels.tolist() == [IGNORE if i + 1 in starts else flat[i + 1] for i in places]
            assert boundaries == [i - begin for i in places if i in starts and i > begin]
    with pytest.raises(IndexError):
        tokens.window(8, 4)


def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    tokens = packed(tmp_path, [[1, 2, 3, 0], [4, 9, 0], [1, 1, 0]], vocabulary=9)
    assert tokens.window(0, 4)[0].tolist() == [1, 2, 3, 0]
    for length in (5, 6):
        with pytest.raises(DataError, match=r"train\.tokens: token 5 \(byte 10\): id 9 is outside the vocabulary of 9"):
            tokens.window(0, length)
    assert tokens.window(2, 3)[0].tolist() == [0, 1, 1]


def test_damaged_boundaries_are_refused(tmp_path: Path) -> None:
    packed(tmp_path, [[1, 0], [2, 0], [3, 0]])
    np.array([0, 2, 2, 6], "<i8").tofile(tmp_path / "train.documents")
    with pytest.raises(DataError, match="out of order"):
        PackedTokens(tmp_path, "train", np.dtype("<u2"), 9).window(0, 4)
    for wrong in ([0, 2, 4, 7], [1, 2, 4, 6], []):
        np.array(wrong, "<i8").tofile(tmp_path / "train.documents")
        with pytest.raises(DataError, match="does not span the 6 tokens"):
            PackedTokens(tmp_path, "train", np.dtype("<u2"), 9)


# Order


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 700), key=st.integers(-(2**70), 2**70))
def test_permute_is_a_bijection(count: int, key: int) -> None:
    assert sorted(permute(i, count, key) for i in range(count)) == list(range(count))


def test_permute_is_the_same_everywhere_and_mixes() -> None:
    assert [permute(i, 11, 3) for i in range(11)] == [8, 9, 4, 3, 10, 7, 2, 1, 6, 0, 5]
    assert 0 <= permute(10**15, 10**15 + 1, 7) <= 10**15
    for bad in ((5, 5), (-1, 5), (0, 0)):
        with pytest.raises(IndexError):
            permute(*bad, key=0)
    count = 1000
    orders = [[permute(i, count, key) for i in range(count)] for key in range(40)]
    for order in orders:
        assert sum(place == i for i, place in enumerate(order)) < 10
        assert abs(np.corrcoef(order, range(count))[0, 1]) < 0.15
    assert len({tuple(order) for order in orders}) == 40
    first = np.array(orders)[:, 0]
    assert 300 < first.mean() < 700 and first.std() > 150


def rows(batch: Batch) -> list[tuple[int, int, int]]:
    assert batch.index_T is not None and batch.labels_T is not None
    return list(zip(batch.index_T.tolist(), batch.tokens_T.tolist(), batch.labels_T.tolist(), strict=True))


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_layout_changes_a_step(tmp_path: Path, shuffle: bool) -> None:
    tokens = counted(tmp_path, 153)
    for number in (0, 1, 5):
        seen = set()
        for size in (1, 2, 4):
            for microbatches in (1, 2):
                kept = {
                    "sequence": 6,
                    "sequences": 16,
                    "seed": 3,
                    "shuffle": shuffle,
                    "microbatches": microbatches,
                    "size": size,
                }
                ranks = [Loader(tokens, rank=rank, **kept).step(number) for rank in range(size)]  # pyright: ignore
                assert all(len(batches) == microbatches for batches in ranks)
                assert {len(batch) for batches in ranks for batch in batches} == {96 // size // microbatches}
                # Microbatch m over all ranks is microbatch m of one rank.
                order = [row for m in range(microbatches) for batches in ranks for row in rows(batches[m])]
                assert [index for index, _, _ in order] == list(range(96))
                seen.add(tuple(order))
        assert len(seen) == 1


def test_every_window_is_used_once_an_epoch(tmp_path: Path) -> None:
    tokens = counted(tmp_path, 78)
    assert tokens.windows(7) == 11
    loader = Loader(tokens, sequence=7, sequences=4, seed=1)
    stream = [int(batch.tokens_T[i]) for number in range(11) for batch in loader.step(number) for i in range(0, 28, 7)]
    epochs = [stream[i : i + 11] for i in range(0, 44, 11)]
    for epoch in epochs:
        assert sorted(epoch) == [1 + 7 * window for window in range(11)]
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each epoch has its own order"
    other = [
        int(b.tokens_T[i])
        for n in range(11)
        for b in Loader(tokens, sequence=7, sequences=4, seed=2).step(n)
        for i in range(0, 28, 7)
    ]
    assert other != stream
    plain = Loader(tokens, sequence=7, sequences=4, shuffle=False)
    assert [int(plain.step(2)[0].tokens_T[i]) for i in range(0, 28, 7)] == [57, 64, 71, 1]


def test_a_step_does_not_depend_on_the_steps_before(tmp_path: Path) -> None:
    tokens = counted(tmp_path, 100)
    loader = Loader(tokens, sequence=5, sequences=4)
    walked = [rows(loader.step(number)[0]) for number in range(8)]
    assert rows(Loader(tokens, sequence=5, sequences=4).step(7)[0]) == walked[7]
    assert loader.step(7)[0].key == 7


def test_positions_restart_with_sequences_and_documents(tmp_path: Path) -> None:
    tokens = counted(tmp_path, 30, document=7)
    [batch] = Loader(tokens, sequence=10, sequences=2, shuffle=False).step(0)
    assert batch.boundaries == (0, 7, 10, 14, 20)
    assert batch.positions_T.tolist() == [*range(7), *range(3), *range(4), *range(6)]
    assert batch.positions_T.dtype == torch.int64
    assert batch.labels_T is not None
    assert (batch.labels_T == IGNORE).nonzero().flatten().tolist() == [6, 13]
    [batch] = Loader(tokens, sequence=7, sequences=2, shuffle=False).step(0)
    assert batch.boundaries == (0, 7, 14), "a document that begins with its sequence is one boundary"


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tokens = counted(tmp_path, 12)
    for sequences, closest in ((1, 6), (8, 6), (9, 12), (11, 12)):
        with pytest.raises(ConfigError, match=f"divisible by 3 .* = 6; the nearest that is: {closest}$"):
            Loader(tokens, sequence=2, sequences=sequences, size=3, microbatches=2)
    assert not Loader.problems(sequence=2, sequences=12, size=3, microbatches=2, rank=2)
    assert len(Loader.problems(sequence=0, sequences=0, microbatches=0, size=0)) == 4
    assert "rank = 2" in Loader.problems(sequence=1, sequences=2, size=2, rank=2)[0]
    Loader(tokens, sequence=11, sequences=1)
    with pytest.raises(DataError, match="holds 12 tokens; a sequence of 12 needs 13"):
        Loader(tokens, sequence=12, sequences=1)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_validation_covers_each_window_once_and_keeps_ranks_in_step(tmp_path: Path, size: int) -> None:
    tokens = counted(tmp_path, 101)
    assert tokens.windows(10) == 10
    for limit, wanted in ((None, 10), (9, 9), (5, 5), (99, 10)):
        kept = {"sequence": 10, "sequences": 4, "size": size, "limit": limit}
        ranks = [list(validation_batches(tokens, rank=rank, **kept)) for rank in range(size)]  # pyright: ignore
        assert {len(batches) for batches in ranks} == {-(-wanted // 4)}
        steps = list(zip(*ranks, strict=True))
        seen: list[int] = []
        for key, step in enumerate(steps):
            assert {batch.key for batch in step} == {key}
            index = torch.cat([batch.index_T for batch in step if batch.index_T is not None])
            assert len(set(index.tolist())) == len(index)
            busy = [batch for batch in step if batch.labels_T is not None and (batch.labels_T != IGNORE).any()]
            seen += [token for batch in busy for token in batch.tokens_T.tolist()]
            assert all(batch.index_T is not None and int(batch.index_T.max()) < 40 for batch in busy)
        windows = [place * 10 // wanted for place in range(wanted)]
        assert seen == [window * 10 + offset + 1 for window in windows for offset in range(10)]


def test_validation_of_nothing_is_nothing(tmp_path: Path) -> None:
    tokens = counted(tmp_path, 10)
    assert list(validation_batches(tokens, sequence=10, sequences=1)) == []
    assert list(validation_batches(tokens, sequence=2, sequences=1, limit=0)) == []
    with pytest.raises(ConfigError, match="sequences = 0"):
        validation_batches(tokens, sequence=2, sequences=0)
