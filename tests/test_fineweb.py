"""fineweb.py: documents, tokenizers, shards, interruption, the hub, ready-made shards, the command line.

Every claim is held against something independent: tiktoken, the tokenizers library, transformers, `datasets`,
OpenAI's own list of merges, or `simple_shards`, the plain script at the top of the file.
"""
import ast
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fineweb
from fineweb import UserError

ROOT = Path(fineweb.__file__).parent
ODD = ["", " ", "  two  spaces ", "\n\n\t tabs\r\n", "it's I'LL we've", "naïve café ½ ²", "日本語 テキスト",
       "😀👩‍👩‍👧 flag 🇬🇷", "a" * 300, "\u00a0\u2003\u3000x", "x\x00y\x7f", "1234567890 3.14",
       "def f(x):\n    return x**2  # !", "مرحبا שלום", "<|endoftext|", "a <|endoftext|> b"]
TEXTS = [f"Document {i}. " + "word " * (i * 7 % 40) + "ünï " * (i % 3) + f"end{i}" for i in range(60)]


class Stop(BaseException):
    """An interruption that nothing catches."""


def stopping(documents, after):
    for i, text in enumerate(documents):
        if i == after:
            raise Stop
        yield text


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of a few documents, so that small corpora have many; and no waiting, not for the disk either."""
    monkeypatch.setattr(fineweb, "BATCH", 300)
    monkeypatch.setattr(fineweb, "AHEAD", 1)
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture(scope="module")
def bpe():
    return fineweb.train_tokenizer(iter(TEXTS + ODD * 3), 400)


def plain_ids(documents, tokenizer):
    """One list, the mark before each document."""
    return sum(([tokenizer.eot_token] + tokenizer.encode_ordinary(text) for text in documents if text), [])


def read_shards(out, split):
    return [ids.tolist() for _, ids in fineweb.open_shards(out, split)]


def digests(out, files="*"):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob(files))}


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=6)


@pytest.fixture
def book(tmp_path, monkeypatch):
    """t.txt in the current folder; `book(OUT, FLAGS)` makes shards of it, in data/t if OUT is ""."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("\n\n\n".join(TEXTS))
    return lambda out, *more: fineweb.main(["--source", "t.txt", "--tokenizer", "bytes",
                                            *(["--out", out] if out else []), *more])


# --- the file -------------------------------------------------------------------------------------

def test_import_does_nothing(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import fineweb; "
            "print([m for m in ('torch', 'tiktoken', 'datasets', 'tokenizers', 'transformers', 'pyarrow', "
            "'tqdm', 'huggingface_hub') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
    assert list(tmp_path.iterdir()) == []


def test_the_file_begins_with_the_idea_in_thirty_lines():
    functions = [node for node in ast.walk(ast.parse((ROOT / "fineweb.py").read_text()))
                 if isinstance(node, ast.FunctionDef)]
    assert functions[0].name == "simple_shards" and functions[0].end_lineno - functions[0].lineno < 30
    assert all(node.end_lineno - node.lineno < 60 for node in functions)


# --- documents ------------------------------------------------------------------------------------

def test_builtin_is_the_reference_and_the_docstrings(tmp_path, monkeypatch):
    """Of each module once, without running it; tests, and what doesn't parse, are left out."""
    import pydoc_data.topics
    files = {"b/two.py": "'''Two.'''\nclass A:\n    '''Of A.'''\n    def f():\n        '''Of f.'''\nraise SystemExit",
             "a.py": "'''A.'''\ndef f(): '''Of f.'''\ndef g(): '''Of f.'''\n", "c.py": "def h(): '''Of f.'''",
             "broken.py": "print 'no'", "nul.py": "\0", "test/t.py": "'''T.'''", "d.py": "'''D.'''", "os.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.py"))
    topics = list(dict.fromkeys(pydoc_data.topics.topics.values()))
    assert list(fineweb.builtin_documents()) == [*topics, "A.\n\nOf f.", "Two.\n\nOf A.", "D."]
    assert sum(map(len, topics)) > 400_000


@pytest.mark.parametrize("content, documents", [
    ("one\n<|endoftext|>\ntwo\n\n\n\nstill two\n<|endoftext|>\n", ["one", "two\n\n\n\nstill two"]),
    ("<|endoftext|>\n  <|endoftext|>  \nonly\n<|endoftext|>", ["only"]),
    ("a chapter\n\nits second paragraph\n\n\nnext chapter\n\n\n\n\nlast\n",
     ["a chapter\n\nits second paragraph", "next chapter", "last"]),
    ("heading\n \t\n \nbody", ["heading", "body"]),                     # blank is what has only white space
    ("one <|endoftext|> inside\n<|endoftext|>\ntwo", ["one <|endoftext|> inside", "two"]),
    ("one line, no end", ["one line, no end"]), ("\n\n\n\n", []),
    (b"\xef\xbb\xbfcaf\xc3\xa9 \xff\xfe!\r\nnext", ["café \ufffd\ufffd!\nnext"]),
])
def test_text_rules(tmp_path, content, documents):
    path = tmp_path / "t.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert list(fineweb.clean(fineweb.file_documents(path, "text"))) == documents


def test_clean():
    texts = ["", None, "half \ud83d", {"text": "row"}, "\ufeffmark"]
    assert list(fineweb.clean(texts)) == ["half ?", "row", "\ufeffmark"]


@pytest.mark.parametrize("name, content, words", [
    ("t.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ["near document 1", "text", "--text_column"]),
    ("t.jsonl", b'{"text": "a"}\n\nnot json\n', ["near document 1", "JSON"]),
    ("t.jsonl", b'["text"]\n', ["--text_column"]), ("t.jsonl", b'{"text": 5}\n', ["near document 1", "int"]),
    ("t.parquet", b"PAR1 no", ["Parquet"]), ("t.parquet", {"body": ["x"]}, ["--text_column"]),
])
def test_wrong_files_are_one_line(book, tmp_path, name, content, words):
    write_parquet(tmp_path / name, content) if isinstance(content, dict) else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as told:
        book("out", "--source", name)
    assert all(word in str(told.value) for word in words) and "\n" not in str(told.value)


@pytest.mark.parametrize("count, fraction, expected", [(2, 0.1, 1), (10, 0.1, 1), (60, 0.25, 15), (3, 0.5, 2)])
def test_the_split_parts_the_corpus_and_is_drawn_from_the_seed(count, fraction, expected):
    def draw(seed):
        return fineweb.split_documents(iter(TEXTS[:count]), fraction, seed)
    (val, train), in_order = draw(1), [text for text in TEXTS if text in draw(1)[1]]
    assert len(val) == expected and sorted([*val, *train]) == sorted(TEXTS[:count]) and draw(1) == [val, train]
    assert count < 9 or train != in_order
    assert {text for seed in range(300) for text in draw(seed)[0]} == set(TEXTS[:count])    # each is val at times


def test_of_a_large_corpus_the_beginning_is_shuffled(book, monkeypatch):
    """Memory stays bounded: what comes later is train, in its order. A tokenizer learns from a bounded sample, too."""
    monkeypatch.setattr(fineweb, "SAMPLE", 1000)
    documents = iter(TEXTS)
    val, train = fineweb.split_documents(documents, 0.2, seed=3)
    assert 1 < len(val) < 5 and len(val + train) < 20 and list(documents) == TEXTS[len(val + train):]
    assert sum(shard["documents"] for shard in book("out")["shards"]) == len(TEXTS)
    fineweb.train_tokenizer(documents := iter(TEXTS), 260)
    assert len(list(documents)) > 40


def test_a_single_document_is_cut():
    text = "".join(f"line {i}\n" for i in range(100))
    (tail,), (head,) = fineweb.split_documents(iter([text]), 0.1, seed=1)
    assert head + tail == text and tail.startswith("line ") and 60 < len(tail) < 100
    (tail,), (head,) = fineweb.split_documents(iter(["a title\n" + "word " * 100]), 0.1, seed=1)
    assert len(tail) == 51  # no line begins near: within the line, not after the title


# --- tokenizers -----------------------------------------------------------------------------------

def test_bpe_equals_the_tokenizers_library(bpe):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=399, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    library.train_from_iterator(TEXTS + ODD * 3, trainer)
    assert (bpe.n_vocab, bpe.eot_token, bpe.name) == (400, 399, "bpe:400")
    for text in ODD + TEXTS:
        assert bpe.encode_ordinary(text) == library.encode(text).ids
        assert bpe.decode(bpe.encode_ordinary(text)) == text


@pytest.mark.parametrize("name", ["bpe", "bytes", "gpt2"])
def test_a_saved_tokenizer_is_read_the_same(request, tmp_path, name):
    """By us, from the folder and as one string, by the tokenizers library and by transformers."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    tokenizer = fineweb.load_tokenizer(name) if name == "bytes" else request.getfixturevalue(
        "gpt2_tokenizer" if name == "gpt2" else name)
    fineweb.save_tokenizer(tokenizer, tmp_path)
    theirs, library = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert name != "bytes" or tokenizer.encode_ordinary("é <|endoftext|>") == list("é <|endoftext|>".encode())
    string = fineweb.tokenizer_from_json(fineweb.tokenizer_to_json(tokenizer), "bpe:x")
    assert len(theirs) == library.get_vocab_size() == tokenizer.n_vocab
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot_token and theirs.model_max_length == 1024
    for again in fineweb.load_tokenizer(tmp_path), string:
        assert (again.n_vocab, again.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)
        for text in ODD + TEXTS[:5]:
            ids = tokenizer.encode_ordinary(text)
            assert again.encode_ordinary(text) == ids and again.decode(ids) == text
            if "<|endoftext|>" not in text:
                assert theirs(text)["input_ids"] == library.encode(text).ids == ids and theirs.decode(ids) == text
        marked = [tokenizer.eot_token] + tokenizer.encode_ordinary("hi")
        assert theirs.decode(marked, skip_special_tokens=True) == "hi"
        assert again.decode(marked) == theirs.decode(marked) == "<|endoftext|>hi"
    if name == "gpt2":                  # OpenAI's own 50,000 merges
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
        cached = Path(os.environ["TIKTOKEN_CACHE_DIR"], hashlib.sha1(url.encode()).hexdigest())
        merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
        assert [" ".join(pair) for pair in merges] == cached.read_text(encoding="utf-8").splitlines()[1:]


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}},
    {"added_tokens": [{"id": 399, "content": "</s>"}, {"id": 400, "content": "<pad>"}]}])
def test_any_tokenizer_is_usable(bpe, tmp_path, change):
    """Of any kind, with more ids after the mark, which may have another name: the ids are those of the library."""
    from tokenizers import Tokenizer
    content = json.loads(fineweb.tokenizer_to_json(bpe))
    [mark] = content["added_tokens"]
    content |= change | {"added_tokens": [mark | token for token in change.get("added_tokens", [{}])]}
    content |= {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if "added_tokens" in change:
        with pytest.raises(UserError, match="no <.endoftext.>"):
            fineweb.load_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer, library = fineweb.load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.no_truncation()
    assert (tokenizer.eot_token, tokenizer.n_vocab) == (399, 401 if "added_tokens" in change else 400)
    for text in ODD[:-1] + TEXTS:
        assert tokenizer.encode_ordinary(text) == library.encode(text).ids
    assert 399 not in tokenizer.encode_ordinary("a <|endoftext|></s> b")
    meta = fineweb.write_shards(TEXTS, tmp_path / "shards", tokenizer, shard_size=100, workers=2)
    again = fineweb.load_tokenizer(tmp_path / "shards")
    assert sum(read_shards(tmp_path / "shards", "train"), []) == plain_ids(TEXTS, again)[100:]
    assert meta["shards"][0]["bytes"] is None and again.n_vocab == tokenizer.n_vocab


def test_no_tokenizer(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no tokenizer"):
        fineweb.load_tokenizer(tmp_path)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: open(tmp_path / "none"))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        fineweb.load_tokenizer("gpt2")


# --- shards ---------------------------------------------------------------------------------------

def test_tokenize(gpt2_tokenizer):
    """As tiktoken does it, also where tiktoken gives up: a million blanks must not end a night's work."""
    for text in ODD:
        ids = fineweb.tokenize(text, gpt2_tokenizer)
        assert ids.dtype == np.uint16 and ids.tolist() == [50256] + gpt2_tokenizer.encode_ordinary(text)
    long = "before" + "\n" * 10**6 + "after"
    (_, ids), = fineweb.tokenized(iter([*ODD, long]), fineweb.START, gpt2_tokenizer, workers=2)
    expected = plain_ids(ODD, gpt2_tokenizer)
    assert ids[:len(expected) + 1].tolist() == expected + [50256]
    assert gpt2_tokenizer.decode(ids[len(expected) + 1:].tolist()) == long


@pytest.mark.parametrize("shard_size", [1, 37, 500, 10**6])
def test_shards_hold_the_documents(tmp_path, small_batches, bpe, shard_size):
    documents = ["", *TEXTS[:20], None, "<|endoftext|>", "", *TEXTS[20:40]] if shard_size > 1 else TEXTS[:3]
    val, told = ["one", "", "two"], []
    meta = fineweb.write_shards(documents, tmp_path, bpe, val=val, name="n", shard_size=shard_size,
                                progress=told.append)
    assert fineweb.read_meta(tmp_path) == json.loads((tmp_path / "meta.json").read_text()) == meta
    for split, texts in ("val", val), ("train", documents):
        shards = read_shards(tmp_path, split)
        assert sum(shards, []) == plain_ids(texts, bpe)
        assert [len(shard) for shard in shards[:-1]] == [shard_size] * (len(shards) - 1)
        assert 0 < len(shards[-1]) <= shard_size
        entries = [shard for shard in meta["shards"] if shard["split"] == split]
        assert sum(e["bytes"] for e in entries) == sum(len(t.encode()) for t in texts if t)
        for entry, shard in zip(entries, shards, strict=True):
            file = f"n_{split}_{meta['shards'].index(entry):06d}.npy"
            assert entry == {"file": file, "split": split, "tokens": len(shard), "documents": shard.count(399),
                             "bytes": len(bpe.decode_bytes([i for i in shard if i != 399])),
                             "sha256": digests(tmp_path)[file]}
    assert digests(tmp_path).keys() == {entry["file"] for entry in meta["shards"]} | {
        "meta.json", "tokenizer.json", "tokenizer_config.json"}
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["complete"]) == ("bpe:400", 400, 399, True)
    assert sum(told) == sum(shard["tokens"] for shard in meta["shards"])
    assert fineweb.load_tokenizer(tmp_path).name == "bpe:400"


@pytest.mark.parametrize("size, workers", [(100, 1), (333, 2), (333, 8)])
def test_as_the_simple_script_does_it_for_any_workers(tmp_path, small_batches, size, workers):
    tokenizer = fineweb.load_tokenizer("bytes")
    fineweb.simple_shards(TEXTS * 3, tmp_path, tokenizer, size)
    fineweb.write_shards(iter(TEXTS * 3), tmp_path / "ours", "bytes", name="text", shard_size=size, workers=workers)
    ours = digests(tmp_path / "ours", "*.npy")
    assert digests(tmp_path, "*.npy") == ours and len(ours) > 9
    assert sum(read_shards(tmp_path, "val") + read_shards(tmp_path, "train"), []) == plain_ids(TEXTS * 3, tokenizer)


def test_workers_do_not_read_ahead_without_end(monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH", 1)
    tokenizer, read = fineweb.load_tokenizer("bytes"), []
    documents = (read.append(i) or f"text {i}" for i in range(150))
    for number, (position, ids) in enumerate(fineweb.tokenized(documents, fineweb.START, tokenizer, workers=2)):
        assert position["place"] == number and bytes(ids[1:].tolist()).decode() == f"text {number}"
        assert len(read) <= 66 + number
    assert number == 149


@pytest.mark.parametrize("own_val", [False, True])
@pytest.mark.parametrize("max_tokens, fraction, shard_size",
                         [(1000, 0.1, 150), (1000, 0.2, 50), (901, 0.1, 10**6), (10**6, 0.1, 300)])
def test_max_tokens(tmp_path, small_batches, own_val, max_tokens, fraction, shard_size):
    val = TEXTS[40:] if own_val else None
    fineweb.write_shards(TEXTS, tmp_path, "bytes", val=val, shard_size=shard_size, max_tokens=max_tokens,
                         val_fraction=fraction)
    whole, most = plain_ids(TEXTS, fineweb.load_tokenizer("bytes")), int(max_tokens * fraction)
    of_val = plain_ids(val, fineweb.load_tokenizer("bytes"))[:most] if own_val else whole[:min(most, shard_size)]
    begin = 0 if own_val else len(of_val)
    assert sum(read_shards(tmp_path, "val"), []) == of_val
    assert sum(read_shards(tmp_path, "train"), []) == whole[begin:begin + max_tokens - most]


@pytest.mark.parametrize("documents, val, settings", [
    ([], None, {}), ([""], ["x"], {}), (["x"], [], {}), (["short"], None, {}), (TEXTS, None, {"max_tokens": 1})])
def test_too_little_text(tmp_path, documents, val, settings):
    with pytest.raises(UserError, match="too little text"):
        fineweb.write_shards(documents, tmp_path / "out", "bytes", val=val, **settings)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_ids_must_fit_uint16(tmp_path):
    with pytest.raises(UserError, match="65,537 ids"):
        fineweb.write_shards(TEXTS, tmp_path / "out", SimpleNamespace(name="wide", n_vocab=65537, eot_token=0))


@pytest.mark.parametrize("change", [{"shard_size": 501}, {"name": "other"}, {"max_tokens": 900}, {"seed": 2},
                                    {"val_fraction": 0.2}, {"tokenizer": "gpt2"}, {}])
def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(tmp_path, change, gpt2_tokenizer):
    settings = {"tokenizer": "bytes", "shard_size": 500, "seed": 1}
    meta = fineweb.write_shards(TEXTS, tmp_path, **settings)
    before, never = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}, stopping(TEXTS, 0)
    if change:
        with pytest.raises(UserError, match="was made with .*choose another --out"):
            fineweb.write_shards(never, tmp_path, **(settings | change))
    else:
        assert fineweb.write_shards(never, tmp_path, **settings) == meta
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


# --- reading them again ---------------------------------------------------------------------------

def bin_bytes(tokens, magic=20240520, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, np.uint16).tobytes()


def test_open_shards(tmp_path):
    """Both layouts, in order, of this split only; ids stay on disk. Without meta.json they are taken to be GPT-2's."""
    np.save(tmp_path / "val_x_train_000001.npy", np.array([1, 2], np.uint16))
    (tmp_path / "val_x_train_000000.bin").write_bytes(bin_bytes([50256, 3]))
    np.save(tmp_path / "x_val_000000.npy", np.array([9], np.uint16))
    (tmp_path / "notes_train.txt").write_text("no shard")
    assert read_shards(tmp_path, "train") == [[50256, 3], [1, 2]] and read_shards(tmp_path, "val") == [[9]]
    assert all(isinstance(ids, np.memmap) for _, ids in fineweb.open_shards(tmp_path, "train"))
    meta = fineweb.read_meta(tmp_path)
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["shards"]) == ("gpt2", 50257, 50256, [])
    with pytest.raises(UserError, match="no test shards in .*fineweb.py"):
        fineweb.open_shards(tmp_path, "test")


@pytest.mark.parametrize("content", [
    bin_bytes([1, 2], magic=20240521), bin_bytes([1, 2], count=3), b"short", b"", bin_bytes([1]) + b"\x01\x00",
    np.zeros((2, 2), np.uint16), np.zeros(4, np.int64), np.array([{}], object), b"\x93NUMPY"])
def test_damaged_shards(tmp_path, content):
    path = tmp_path / ("x_train_000001.npy" if not isinstance(content, bytes) or b"NUMPY" in content else
                       "x_train_000001.bin")
    with open(path, "wb") as file:
        file.write(content) if isinstance(content, bytes) else np.save(file, content)
    with pytest.raises(UserError, match="is damaged.*make it again"):
        fineweb.open_shards(tmp_path, "train")


def test_unfinished_shards_are_not_read(tmp_path):
    with pytest.raises(Stop):
        fineweb.write_shards(stopping(TEXTS, 50), tmp_path, "bytes", shard_size=300)
    with pytest.raises(UserError, match="is not finished"):
        fineweb.read_meta(tmp_path)


# --- interruption ---------------------------------------------------------------------------------

@pytest.mark.parametrize("own_val", [False, True])
@pytest.mark.parametrize("shard_size", [64, 300])
def test_stopped_anywhere_ends_the_same(tmp_path, monkeypatch, small_batches, own_val, shard_size):
    """In the midst of the texts, twice; or while a note is written: then half of it is there, and a shard without."""
    def make(out, documents=TEXTS, workers=1):
        fineweb.write_shards(iter(documents), tmp_path / out, "bytes", val=iter(TEXTS[45:]) if own_val else None,
                             shard_size=shard_size, max_tokens=6000, val_fraction=0.2, workers=workers)

    def half(path, content, write=fineweb.write_json):
        if left.pop() == 0:
            path.parent.mkdir(exist_ok=True)
            Path(f"{path}.tmp").write_text("half a no")
            raise Stop
        write(path, content)
    make("whole")
    for number in range(1, 17, 3):
        out, left = f"stopped{number}", list(range(number))
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(fineweb, "write_json", half)
            make(out)
        for stop in number, number + 5:
            with pytest.raises(Stop):
                make(out, stopping(TEXTS, stop), workers=2)
        assert not (tmp_path / out / "meta.json").exists()
        make(out)
        assert digests(tmp_path / out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_file_is_old_or_new_at_any_moment(tmp_path, monkeypatch, name):
    path = tmp_path / "deep" / "progress.json"
    fineweb.write_file(path, lambda file: file.write(b"old"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, name, lambda *_: next(stopping("-", 0)))
        fineweb.write_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    fineweb.write_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_going_on_does_not_tokenize_again(tmp_path, small_batches):
    tokens = []

    def encode(text):
        tokens.extend([256, *text.encode()])
        return list(text.encode())
    watched = SimpleNamespace(name="bytes", n_vocab=257, eot_token=256, encode_ordinary=encode)
    with pytest.raises(Stop):
        fineweb.write_shards(stopping(TEXTS, 50), tmp_path, watched, shard_size=300)
    done = len(json.loads((tmp_path / "progress.json").read_text())["shards"])
    tokens.clear()
    meta = fineweb.write_shards(TEXTS, tmp_path, watched, shard_size=300)
    left = sum(shard["tokens"] for shard in meta["shards"]) - 300 * done
    assert done > 5 and left <= len(tokens) <= left + 520                       # at most the batch where it stopped


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, real_data, gpt2_tokenizer):
    """All the real text at hand in shards of 50,000 tokens: killed -9 five times, and left alone."""
    command = [sys.executable, str(ROOT / "fineweb.py"), "--source", *map(str, sorted(real_data.glob("*/*.txt"))),
               "--shard_size", "50000", "--workers", "2", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=120)
    rng, out, kills = random.Random(5), tmp_path / "killed", 0
    for aim in sorted(rng.sample(range(1, 22), 5)):
        job = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while job.poll() is None and len(list(out.glob("*.npy"))) < aim:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        job.send_signal(signal.SIGKILL)
        kills += job.wait() == -signal.SIGKILL
    assert kills == 5 and not (out / "meta.json").exists()
    subprocess.run([*command, str(out)], check=True, capture_output=True, timeout=120)
    assert digests(out) == digests(tmp_path / "whole")


# --- the hub, played by local files and by an iterator that fails ---------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch, small_batches):
    """A hub data set `me/set` with train and validation: the real `datasets` reads it from local files."""
    import datasets
    state = SimpleNamespace(splits=["train", "validation"], asked=[], fail=None, sha="abc123")
    parts = {"train-0": (0, 25), "train-1": (25, 45), "validation-0": (45, 60), "test-0": (0, 1)}
    real = datasets.load_dataset
    for name, (begin, end) in parts.items():
        write_parquet(tmp_path / f"{name}.parquet", {"text": TEXTS[begin:end], "url": ["u"] * (end - begin)})

    def load_dataset(repo, config, streaming, revision):
        if state.fail:
            raise state.fail
        state.asked.append((repo, config, streaming, revision))
        return datasets.IterableDatasetDict({split: real("parquet", data_files=str(tmp_path / f"{split}-*.parquet"),
                                                         split="train", streaming=True) for split in state.splits})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, repo: SimpleNamespace(sha=state.sha))
    return state


def make(out, *more):
    return fineweb.main(["--source", "me/set", "--tokenizer", "bytes", "--shard_size", "200", "--workers", "1",
                         "--out", str(out), *more])


def test_hub_shards_and_resumption(hub, tmp_path):
    meta = make(tmp_path / "whole")
    tokenizer, clean = fineweb.load_tokenizer("bytes"), fineweb.clean
    assert sum(read_shards(tmp_path / "whole", "train"), []) == plain_ids(TEXTS[:45], tokenizer)
    assert sum(read_shards(tmp_path / "whole", "val"), []) == plain_ids(TEXTS[45:], tokenizer)
    assert (meta["source"], meta["revision"], meta["name"]) == ("me/set", "abc123", "set")
    assert all(asked[2:] == (True, "abc123") for asked in hub.asked)
    for stop in range(2, 45, 4):
        out = tmp_path / f"stop{stop}"
        hub.sha = "abc123"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fineweb, "clean", lambda documents: stopping(clean(documents), stop))
            with pytest.raises(Stop):
                make(out)
        assert not (out / "meta.json").exists()
        hub.sha = "newer"                           # a job stays with the revision that it began with
        make(out)
        assert digests(out) == digests(tmp_path / "whole")
    hub.fail, hub.sha = AssertionError("asked the hub"), None
    assert make(out) == meta                        # what is finished needs no network


def test_hub_without_validation_and_with_bpe(hub, tmp_path):
    hub.splits = ["train"]
    meta = make(tmp_path / "o", "--tokenizer", "bpe:300")
    expected = plain_ids(TEXTS[:45], fineweb.train_tokenizer(iter(TEXTS[:45]), 300))
    assert read_shards(tmp_path / "o", "val") == [expected[:200]] and meta["shards"][1]["split"] == "train"
    assert sum(read_shards(tmp_path / "o", "train"), []) == expected[200:]


def test_hub_sets_that_do_not_fit(hub, tmp_path):
    with pytest.raises(UserError, match="--text_column.*body"):
        make(tmp_path / "o", "--text_column", "body")
    hub.splits = ["test"]
    with pytest.raises(UserError, match="no train split"):
        make(tmp_path / "o")

    hub.fail = ValueError("Config name is missing.\nPlease pick one of ['en', 'de']")
    with pytest.raises(UserError, match="--config.*'en', 'de'") as told:
        make(tmp_path / "o")
    assert "\n" not in str(told.value)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when somebody waits, or `clock.now` is put forward. `clock.waits` lists the waits."""
    clock = SimpleNamespace(now=0, waits=[])

    def sleep(seconds):
        clock.waits.append(seconds)
        clock.now += seconds
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_a_lost_connection_loses_nothing(hub, tmp_path, monkeypatch, clock):
    """Lost in the midst of the text, in all ways: the shards are those of a quiet night."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    make(tmp_path / "whole")
    errors = [ConnectionError, TimeoutError, OSError, HfHubHTTPError.__bases__[0], LocalEntryNotFoundError]
    clean, seen = fineweb.clean, []

    def failing(documents):
        for text in clean(documents):
            seen.append(text)
            if len(seen) % 14 == 0 and errors:
                clock.now += 100                    # it had worked for a while
                raise errors.pop()("lost")
            yield text
    monkeypatch.setattr(fineweb, "clean", failing)
    make(tmp_path / "lost")
    assert digests(tmp_path / "lost") == digests(tmp_path / "whole")
    assert not errors and len(clock.waits) == 5 and clock.waits == sorted(clock.waits)
    assert len(seen) < 60 + 5 * 14                                          # it never began from the beginning


@pytest.mark.parametrize("seconds, wait", [(0, 0), (100, 3600)])
def test_a_hub_that_stays_away(clock, seconds, wait):
    """After a minute of work an hour of patience; at the beginning, with a wrong name or no network, none."""
    spent = [seconds]

    def job():
        clock.now += spent.pop() if spent else 0
        raise ConnectionError("gone\naway")
    with pytest.raises(UserError, match="ConnectionError: gone away.*shards are kept.*--source builtin") as told:
        fineweb.patiently(job)
    assert sum(clock.waits) == wait and "\n" not in str(told.value)
    with pytest.raises(ZeroDivisionError):          # a bug is no network trouble
        fineweb.patiently(lambda: 1 / 0)


# --- ready-made shards ----------------------------------------------------------------------------

def test_ready_made_shards(tmp_path, monkeypatch):
    import huggingface_hub
    there = ["finewebedu_val_000000.bin", *(f"finewebedu_train_{i:06d}.bin" for i in range(1, 100)), "README.md"]

    def fetch(repo_id, repo_type, local_dir, allow_patterns):
        assert (repo_id, repo_type) == ("kjj0/finewebedu10B-gpt2", "dataset")
        local_dir.mkdir(exist_ok=True)
        for name in huggingface_hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns):
            (local_dir / name).write_bytes(bin_bytes([50256, 1, 2, 50256, 3]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    arguments = ["--out", str(tmp_path / "out"), "--pretokenized"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=5 * 10**8))  # room for two, not 100
    assert fineweb.main([*arguments, "1"])["tokenizer"] == "gpt2"
    with pytest.raises(UserError, match="not enough room"):
        fineweb.main(arguments)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**12))
    assert sorted(digests(tmp_path / "out")) == ["finewebedu_train_000001.bin", "finewebedu_val_000000.bin"]
    assert read_shards(tmp_path / "out", "val") == [[50256, 1, 2, 50256, 3]]
    fineweb.main(arguments)
    assert len(read_shards(tmp_path / "out", "train")) == 99
    with pytest.raises(UserError, match="holds other shards"):  # they would be read as one text
        fineweb.write_shards(TEXTS, tmp_path / "out", "bytes")
    fineweb.write_shards(TEXTS, tmp_path / "other", "bytes", shard_size=500)
    with pytest.raises(UserError, match="shards of another kind"):
        fineweb.main(["--pretokenized", "--out", str(tmp_path / "other")])


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (["--bogus"], "--bogus"), (["--tokenizer", "bpe:x"], "bpe:N"), (["--tokenizer", "gpt4"], "gpt2"),
    (["--tokenizer", "bpe:3"], "257"), (["--tokenizer", "bpe:9999"], "not 9999: use --tokenizer bpe:"),
    (["--val_fraction", "10"], "between 0 and 1"), (["--workers", "0"], "above 0"), (["--max_tokens", "-5"], "above 0"),
    (["--source", "builtin", "--seed", "-1"], "not below 0"), (["--shard_size", "0"], "above 0"),
    (["--source", "none.txt"], "none.txt"), (["--source", "t.txt", "none.txt"], "none.txt"),
    (["--source", "nonsense"], "nonsense"), (["--pretokenized", "--tokenizer", "bytes"], "--tokenizer"),
    (["--source"], "--source"),
])
def test_wrong_flags_are_one_line(book, arguments, words):
    with pytest.raises(UserError) as told:
        book("out", *arguments)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_exit_status(book, tmp_path):
    """UserError, OSError, no network: one line, status 2."""
    for flags, words in (["--source", "none.txt"], "--source none.txt"), (
            ["--source", "t.txt", "--out", "t.txt"], "Error: "), (["--source", "tinystories"], "--source builtin"):
        done = subprocess.run([sys.executable, ROOT / "fineweb.py", *flags, "--tokenizer", "bytes"], cwd=tmp_path,
                              env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert last.startswith("fineweb.py: ") and words in last


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_command_on_local_files(book, tmp_path, kind):
    """A folder's files, and more of the same in the folders in it."""
    for part, texts in ("in/a", TEXTS[:30]), ("in/deep/[b]", TEXTS[30:]):
        path = tmp_path / f"{part}.{kind}"
        path.parent.mkdir(parents=True)
        if kind == "txt":
            path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
        elif kind == "jsonl":
            path.write_text("\n\n".join(json.dumps({"body": text, "n": 1}) for text in texts))
        else:
            write_parquet(path, {"body": texts, "n": [1] * len(texts)})
    (tmp_path / "in/c.csv").write_text("no text")
    flags = "--source", "in", "--text_column", "body", "--val_fraction", "0.2", "--shard_size", "500"
    meta = book("", *flags)
    tokenizer, documents = fineweb.load_tokenizer("bytes"), {}
    for split in "val", "train":
        ids = sum(read_shards(Path("data/a"), split), [])
        documents[split] = bytes(i if i < 256 else 0 for i in ids[1:]).decode().split("\0")
        assert ids == plain_ids(documents[split], tokenizer)
    assert len(documents["val"]) == 12 and sorted(documents["val"] + documents["train"]) == sorted(TEXTS)
    assert (meta["name"], meta["source"], meta["seed"]) == ("a", f"a.{kind}, [b].{kind}", 1337)
    assert book("two", *flags, "--seed", "2")["shards"] != meta["shards"]
    with open(path, "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="was made with .*revision"):            # the files have changed
        book("", *flags)


def test_a_bpe_job_goes_on_with_its_tokenizer(book, monkeypatch, small_batches):
    flags = "--tokenizer", "bpe:280", "--shard_size", "300"
    book("whole", *flags)
    saves = [np.save] * 5                           # the sixth fails
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(np, "save", lambda file, ids: saves.pop()(file, ids))
        book("stopped", *flags)
    monkeypatch.setattr(fineweb, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert not list(Path("stopped").glob("*.tmp"))
    book("stopped", *flags)
    assert digests(Path("stopped")) == digests(Path("whole"))


def test_one_bar_for_the_whole_job_and_a_look_at_the_disk(book, monkeypatch):
    import tqdm
    bars, bar = [], tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda *arguments, **kwargs: bars.append(bar(*arguments, **kwargs)) or bars[0])
    meta = book("out")
    assert [bar.n for bar in bars] == [sum(shard["tokens"] for shard in meta["shards"])]
    assert bars[0].total == pytest.approx(bars[0].n, rel=0.05)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="not enough room"):
        book("full")
    assert not list(Path("full").iterdir())
