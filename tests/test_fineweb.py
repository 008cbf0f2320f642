"""fineweb.py: documents, tokenizers, shards, interruption, the hub, ready-made shards, the command line.

Every claim is held against something independent: tiktoken, the tokenizers library, transformers, `datasets`,
OpenAI's own list of merges, or a second, plainer implementation written here.
"""
import ast
import doctest
import hashlib
import http.server
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fineweb
from fineweb import UserError

ROOT = Path(fineweb.__file__).parent
ODD = ["", " ", "  two  spaces ", "\n\n\t tabs\r\n", "it's I'LL we've", "naïve café ½ ²", "日本語 テキスト",
       "😀👩‍👩‍👧 flag 🇬🇷", "a" * 300,
       "\u00a0\u2003\u3000x", "x\x00y\x7f", "1234567890 3.14", "def f(x):\n    return x**2  # !",
       "مرحبا שלום", "<|endoftext|", "|>"]
TEXTS = [f"Document {i}. " + "word " * (i * 7 % 40) + "ünï " * (i % 3) + f"end{i}" for i in range(60)]


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of a few documents, so that small corpora have many; and no waiting, not for the disk either."""
    monkeypatch.setattr(fineweb, "BATCH", 300)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def plain_tokens(documents, encoding):
    """The second implementation: one list, the mark before each document."""
    ids = []
    for text in documents:
        if text:
            ids += [encoding.eot_token] + encoding.encode_ordinary(text)
    return ids


def read_shards(out, split):
    meta = json.loads((out / "meta.json").read_text())
    return [np.load(out / shard["file"]).tolist() for shard in meta["shards"] if shard["split"] == split]


def digests(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def run_command(*arguments, env=None, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "fineweb.py"), *map(str, arguments)],
                          capture_output=True, text=True,
                          env=os.environ | (env or {}), timeout=120, **kwargs)


# --- import ---------------------------------------------------------------------------------------

def test_import_does_nothing(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import fineweb; "
            "print([m for m in ('torch', 'tiktoken', 'datasets', 'tokenizers', 'transformers', 'pyarrow', "
            "'tqdm', 'huggingface_hub') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True,
                          cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
    assert list(tmp_path.iterdir()) == []


def test_examples_in_docstrings():
    result = doctest.testmod(fineweb)
    assert result.failed == 0 and result.attempted >= 5


# --- documents ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def builtin_texts():
    return list(fineweb.builtin_documents())


def test_builtin_is_the_same_on_every_run_and_runs_nothing(tmp_path, request):
    code = ("import sys, hashlib; sys.path.insert(0, sys.argv[1]); import fineweb; h = hashlib.sha256();\n"
            "for t in fineweb.builtin_documents(): h.update(t.encode() + b'|')\n"
            "names = 'antigravity', 'this', 'turtle', 'tkinter'\n"
            "print(h.hexdigest(), [m for m in names if m in sys.modules])")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONHASHSEED": "7"})
    texts = request.getfixturevalue("builtin_texts")        # made while the other process makes its own
    ours = hashlib.sha256(b"".join(text.encode() + b"|" for text in texts)).hexdigest()
    assert process.communicate() == (f"{ours} []\n", "") and process.returncode == 0
    assert 1_500_000 < sum(map(len, texts)) < 4_000_000
    assert all(texts) and len(set(texts)) == len(texts)


def test_builtin_holds_the_reference_and_the_docstrings(builtin_texts):
    import pydoc_data.topics
    import textwrap
    import json.decoder
    texts = builtin_texts
    topics = list(dict.fromkeys(pydoc_data.topics.topics.values()))
    assert texts[:len(topics)] == topics
    assert any(textwrap.fill.__doc__.split("\n")[0] in text for text in texts)
    assert any(text.startswith(textwrap.__doc__.strip()) for text in texts)
    everything = "\n".join(texts)
    assert everything.count(textwrap.dedent.__doc__.split("\n")[0]) == 1
    # Docstrings that stand in several modules come once.
    library = Path(textwrap.__file__).parent
    found = []
    for path in [*sorted(library.glob("concurrent/**/*.py")), *sorted(library.glob("asyncio/*.py"))]:
        nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.FunctionDef)]
        found.append(set(map(ast.get_docstring, nodes)) - {None})
    twice = {text for i, texts in enumerate(found) for more in found[i + 1:] for text in texts & more}
    long = [text for text in twice if len(text) > 80]
    assert long and all(everything.count(text) == 1 for text in long)


@pytest.mark.parametrize("content, documents", [
    ("one\n<|endoftext|>\ntwo\n\n\n\nstill two\n<|endoftext|>\n", ["one", "two\n\n\n\nstill two"]),
    ("<|endoftext|>\n  <|endoftext|>  \nonly\n", ["only"]),
    ("a chapter\n\nits second paragraph\n\n\nnext chapter\n\n\n\n\nlast\n",
     ["a chapter\n\nits second paragraph", "next chapter", "last"]),
    # blank is what has only white space
    ("heading\n \t\n \nbody", ["heading", "body"]),
    ("First Citizen:\nBefore we\n\nAll:\nSpeak.\n", ["First Citizen:\nBefore we\n\nAll:\nSpeak."]),
    ("a line with <|endoftext|> inside\n", ["a line with <|endoftext|> inside"]),
    ("one <|endoftext|> inside\n<|endoftext|>\ntwo", ["one <|endoftext|> inside", "two"]),
    ("one line, no end", ["one line, no end"]),
    ("", []), ("\n\n\n\n", []),
])
def test_text_rules(tmp_path, content, documents):
    path = tmp_path / "t.txt"
    path.write_text(content, encoding="utf-8")
    assert list(fineweb.clean(fineweb.text_documents(path))) == documents


def test_text_bytes(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9 \xff\xfe!\r\nnext")
    assert list(fineweb.text_documents(path)) == ["café \ufffd\ufffd!\nnext"]


def test_endless_documents_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "LONGEST", 100)
    path = tmp_path / "t.txt"
    path.write_text("x" * 1000 + "\n" + "y" * 30 + "\n")
    texts = list(fineweb.clean(fineweb.text_documents(path)))
    assert max(map(len, texts)) <= 200 and "".join(texts) == "x" * 1000 + "y" * 30


def test_jsonl_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    rows = [{"body": text, "n": i} for i, text in enumerate(TEXTS)]
    (tmp_path / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=7)
    assert list(fineweb.jsonl_documents(tmp_path / "t.jsonl", "body")) == TEXTS
    assert list(fineweb.parquet_documents(tmp_path / "t.parquet", "body")) == TEXTS


@pytest.mark.parametrize("name, content, words", [
    ("t.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ["line 2", "'text'", "body", "--text_column"]),
    ("t.jsonl", b'{"text": "a"}\n\nnot json\n', ["line 3", "not JSON"]),
    ("t.jsonl", b'["text"]\n', ["line 1", "--text_column"]),
    ("t.jsonl", b'{"text": 5}\n', ["int", "--text_column"]),
    ("t.parquet", b"PAR1 no", ["t.parquet", "parquet"]),
])
def test_wrong_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as told:
        list(fineweb.clean(fineweb.READERS[Path(name).suffix](tmp_path / name, "text")))
    assert all(word in str(told.value) for word in words) and "\n" not in str(told.value)


def test_parquet_without_the_column(tmp_path):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no column 'text'.*body.*--text_column"):
        list(fineweb.parquet_documents(tmp_path / "t.parquet", "text"))


def test_find_files(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "sub/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    find = lambda *patterns: fineweb.find_files([str(tmp_path / pattern) for pattern in patterns])
    names = lambda *patterns: [path.name for path in find(*patterns)]
    assert names("") == ["a.txt", "b.txt", "c.jsonl"] and names("*.txt") == ["a.txt", "b.txt"]
    assert names("sub", "b.txt", "a.txt") == ["c.jsonl", "b.txt", "a.txt"]
    for wrong in ("none.txt", "none*", "sub/d.csv"):
        with pytest.raises(UserError, match="--source"):
            names("a.txt", wrong)


# --- the split ------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, fraction, expected", [(2, 0.1, 1), (10, 0.1, 1), (60, 0.1, 6), (60, 0.25,
                                                                                                 15),
                                                       (3, 0.5, 2)])
def test_split_parts_the_corpus(count, fraction, expected):
    val, train, size = fineweb.split_documents(lambda: iter(TEXTS[:count]), fraction, seed=1)
    assert len(list(val())) == expected and len(list(train())) == count - expected
    assert sorted([*val(), *train()]) == sorted(TEXTS[:count])
    assert list(train()) == list(train()) and size == sum(len(text.encode()) for text in TEXTS[:count])


def test_split_is_drawn_from_the_seed():
    draw = lambda seed: [list(stream()) for stream in fineweb.split_documents(lambda: iter(TEXTS), 0.2,
                                                                              seed)[:2]]
    assert draw(1) == draw(1) and draw(1)[0] != draw(2)[0]
    assert draw(1)[1] != [text for text in TEXTS if text in draw(1)[1]]         # the order is drawn, too
    # Over many seeds each document is val as often as any other: 400 draws of 12 of 60, mean 80, sd 8.
    often = [sum(text in draw(seed)[0] for seed in range(400)) for text in TEXTS[::13]]
    assert all(40 < times < 120 for times in often)


def test_a_large_corpus_is_shuffled_block_by_block(monkeypatch):
    monkeypatch.setattr(fineweb, "SHUFFLED", 1000)
    texts = list(fineweb.shuffled(iter(TEXTS), seed=3))
    assert sorted(texts) == sorted(TEXTS) and texts != TEXTS
    behind = [TEXTS.index(text) - i for i, text in enumerate(texts)]
    # nobody travels further than a block
    assert max(map(abs, behind)) < 40


def test_a_single_document_is_cut(capsys):
    text = "".join(f"line {i}\n" for i in range(100))
    val, train, _ = fineweb.split_documents(lambda: iter([text]), 0.1, seed=1)
    (tail,), (head,) = val(), train()
    assert head + tail == text and tail.startswith("line ") and 60 < len(tail) < 100
    assert "only one document" in capsys.readouterr().out


# --- tokenizers -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bpe():
    return fineweb.train_tokenizer(iter(TEXTS + ODD * 3), 400)


def test_bytes():
    encoding = fineweb.load_tokenizer("bytes")
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    for text in ODD:
        assert encoding.encode_ordinary(text) == list(text.encode())
        assert encoding.decode(list(text.encode())) == text


def test_bpe_equals_the_tokenizers_library(bpe, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=399, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    library.train_from_iterator(TEXTS + ODD * 3, trainer)
    assert (bpe.n_vocab, bpe.eot_token, bpe.name) == (400, 399, "bpe:400")
    for text in ODD + TEXTS + list(map("".join, zip(ODD, ODD[3:]))):
        assert bpe.encode_ordinary(text) == library.encode(text).ids
        assert bpe.decode(bpe.encode_ordinary(text)) == text
    ids = bpe.encode_ordinary("a <|endoftext|> b")
    assert bpe.eot_token not in ids and bpe.decode(ids) == "a <|endoftext|> b"


def test_bpe_of_a_short_text():
    with pytest.raises(UserError, match=r"too short for 5000 ids: use --tokenizer bpe:\d+") as told:
        fineweb.train_tokenizer(iter(TEXTS), 5000)
    enough = int(str(told.value).split("bpe:")[1].split()[0])
    assert fineweb.train_tokenizer(iter(TEXTS), enough).n_vocab == enough


def test_bpe_learns_from_a_bounded_sample(monkeypatch):
    monkeypatch.setattr(fineweb, "BPE_SAMPLE", 500)
    texts = iter(TEXTS)
    fineweb.train_tokenizer(texts, 260)
    assert len(list(texts)) > 40


def check_saved(encoding, folder):
    """What is saved is read the same by us, by the tokenizers library and by transformers."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    fineweb.save_tokenizer(encoding, folder)
    again, theirs = fineweb.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(theirs) == again.n_vocab == encoding.n_vocab == library.get_vocab_size()
    assert theirs.eos_token_id == theirs.bos_token_id == again.eot_token == encoding.eot_token
    assert theirs.eos_token == "<|endoftext|>" and theirs.model_max_length == 1024
    for text in ODD + TEXTS[:5]:
        ids = encoding.encode_ordinary(text)
        assert again.encode_ordinary(text) == theirs(text)["input_ids"] == library.encode(text).ids == ids
        assert again.decode(ids) == theirs.decode(ids) == text
    marked = [encoding.eot_token] + encoding.encode_ordinary("hi")
    assert theirs.decode(marked, skip_special_tokens=True) == "hi"
    assert again.decode(marked) == theirs.decode(marked)


def test_bpe_saved(bpe, tmp_path):
    check_saved(bpe, tmp_path)


def test_bytes_saved(tmp_path):
    check_saved(fineweb.load_tokenizer("bytes"), tmp_path)


def test_gpt2_saved(gpt2_tokenizer, tmp_path):
    check_saved(gpt2_tokenizer, tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    ours = [" ".join(pair) for pair in model["merges"]]
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    cached = Path(os.environ["TIKTOKEN_CACHE_DIR"], hashlib.sha1(url.encode()).hexdigest())
    assert ours == cached.read_text(encoding="utf-8").splitlines()[1:]          # OpenAI's own 50,000 merges


@pytest.mark.parametrize("change", [
    lambda file: file["model"]["merges"].reverse(),
    lambda file: file["pre_tokenizer"].update(add_prefix_space=True),
    lambda file: file["pre_tokenizer"].update(type="Whitespace"),
    lambda file: file["model"]["vocab"].update({"Ġzz": 999}),
    lambda file: file["added_tokens"][0].update(id=5),
    lambda file: file["added_tokens"].append({"content": "<pad>", "id": 400}),
    lambda file: file.pop("model"),
])
def test_foreign_tokenizers_are_refused(bpe, tmp_path, change):
    fineweb.save_tokenizer(bpe, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no byte-level BPE like GPT-2's"):
        fineweb.load_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        fineweb.load_tokenizer(tmp_path)


def test_gpt2_without_a_network(monkeypatch):
    import tiktoken
    def fail(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        fineweb.load_tokenizer("gpt2")


# --- shards ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ODD + ["<|endoftext|>", "a<|endoftext|>b", "half \ud83d pair",
                                        "both \ud83d\ude00 halves"])
def test_tokenize(gpt2_tokenizer, text):
    tokens = fineweb.tokenize(text, gpt2_tokenizer)
    assert tokens.dtype == np.uint16 and tokens.tolist() == [50256] + gpt2_tokenizer.encode_ordinary(text)


def test_a_million_blanks(gpt2_tokenizer):
    """Too many for tiktoken itself, which raises ValueError; a night's work must not end there."""
    text = "before" + "\n" * 10**6 + "after"
    tokens = fineweb.tokenize(text, gpt2_tokenizer)
    assert tokens[0] == 50256 and gpt2_tokenizer.decode(tokens[1:].tolist()) == text


@pytest.mark.parametrize("shard_size", [1, 37, 500, 10**6])
def test_shards_hold_the_documents(tmp_path, small_batches, bpe, shard_size):
    documents = ["", *TEXTS[:20], None, "<|endoftext|>", "", *TEXTS[20:40]] if shard_size > 1 else TEXTS[:3]
    val = ["one", "", "two"]
    meta = fineweb.write_shards(documents, tmp_path, bpe, val=val, name="n", shard_size=shard_size)
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    index = 0
    for split, texts in ("val", val), ("train", documents):
        expected, shards = plain_tokens(texts, bpe), read_shards(tmp_path, split)
        assert sum(shards, []) == expected
        assert [len(shard) for shard in shards[:-1]] == [shard_size] * (len(shards) - 1)
        assert 0 < len(shards[-1]) <= shard_size
        entries = [shard for shard in meta["shards"] if shard["split"] == split]
        assert sum(e["bytes"] for e in entries) == sum(len(t.encode()) for t in texts if t)
        assert sum(e["documents"] for e in entries) == sum(bool(t) for t in texts)
        for entry, shard in zip(entries, shards, strict=True):
            path = tmp_path / f"n_{split}_{index:06d}.npy"
            assert entry["file"] == path.name
            assert entry["tokens"] == len(shard)
            assert np.load(path).dtype == np.uint16
            assert entry["documents"] == shard.count(bpe.eot_token)
            assert entry["bytes"] == len(bpe.decode_bytes([i for i in shard if i != bpe.eot_token]))
            assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            index += 1
    assert {path.name for path in tmp_path.iterdir()} == {e["file"] for e in meta["shards"]} | {
        "meta.json", "tokenizer.json", "tokenizer_config.json"}
    assert fineweb.load_tokenizer(tmp_path).encode_ordinary(TEXTS[3]) == bpe.encode_ordinary(TEXTS[3])
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["complete"]) == ("bpe:400", 400, 399,
                                                                                      True)


def test_shards_of_bytes_name_their_tokenizer(tmp_path):
    fineweb.write_shards(TEXTS, tmp_path, "bytes", shard_size=500)
    assert fineweb.load_tokenizer(tmp_path).name == "bytes"


def test_without_val_the_first_shard_is_val(tmp_path, small_batches):
    meta = fineweb.write_shards(iter(TEXTS), tmp_path, "bytes", shard_size=333)
    expected = plain_tokens(TEXTS, fineweb.load_tokenizer("bytes"))
    assert [shard["split"] for shard in meta["shards"]] == ["val"] + ["train"] * (len(meta["shards"]) - 1)
    assert read_shards(tmp_path, "val") == [expected[:333]]
    assert sum(read_shards(tmp_path, "train"), []) == expected[333:]


@pytest.mark.parametrize("own_val", [False, True])
@pytest.mark.parametrize("max_tokens, fraction, shard_size",
                         [(1000, 0.1, 150), (1000, 0.2, 50), (901, 0.1, 10**6), (10**6, 0.1, 300)])
def test_max_tokens(tmp_path, small_batches, own_val, max_tokens, fraction, shard_size):
    val = TEXTS[40:] if own_val else None
    fineweb.write_shards(TEXTS, tmp_path, "bytes", val=val, shard_size=shard_size, max_tokens=max_tokens,
                         val_fraction=fraction)
    encoding = fineweb.load_tokenizer("bytes")
    whole, whole_val = plain_tokens(TEXTS, encoding), plain_tokens(TEXTS[40:], encoding)
    got_val, got = sum(read_shards(tmp_path, "val"), []), sum(read_shards(tmp_path, "train"), [])
    most = int(max_tokens * fraction)
    if own_val:
        assert got_val == whole_val[:most] and got == whole[:max_tokens - most]
    else:
        assert got_val == whole[:min(most, shard_size)]
        assert got == whole[len(got_val):len(got_val) + max_tokens - most]


def test_a_document_longer_than_several_shards(tmp_path):
    text = "long " * 1000
    fineweb.write_shards([text, "short"], tmp_path, "bytes", val=["v"], shard_size=1234)
    shards = read_shards(tmp_path, "train")
    assert len(shards) == 5 and sum(shards, []) == [256, *text.encode(), 256, *b"short"]


@pytest.mark.parametrize("documents, val, size, words", [
    ([], None, 10, "no text for val"), ([""], ["x"], 10, "no text for train"),
                                                         (["x"], [], 10, "no text for val"),
    (["short"], None, 1000, "no text for train"),
])
def test_too_little_text(tmp_path, documents, val, size, words):
    with pytest.raises(UserError, match=words):
        fineweb.write_shards(documents, tmp_path / "out", "bytes", val=val, shard_size=size)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_what_is_no_text(tmp_path):
    with pytest.raises(UserError, match="int, not text"):
        fineweb.write_shards(["a", 5], tmp_path, "bytes", val=["v"])


def test_ids_must_fit_uint16(tmp_path):
    fits = fineweb.make_encoding("x", [i.to_bytes(3, "big") for i in range(65535)])
    assert fits.n_vocab == 65536
    wide = fineweb.make_encoding("x", [i.to_bytes(3, "big") for i in range(65536)])
    with pytest.raises(UserError, match="65,537 ids"):
        fineweb.write_shards(TEXTS, tmp_path / "out", wide)
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_left_alone(tmp_path):
    def never():
        raise AssertionError("read again")
        yield
    meta = fineweb.write_shards(TEXTS, tmp_path, "bytes", shard_size=500)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert fineweb.write_shards(never(), tmp_path, "bytes", shard_size=500) == meta
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", [{"shard_size": 501}, {"name": "other"}, {"max_tokens": 900},
                                    {"facts": {"seed": 2}},
                                    {"val_fraction": 0.2}, {"tokenizer": "gpt2"}])
def test_other_settings_are_refused(tmp_path, change, gpt2_tokenizer):
    settings = {"tokenizer": "bytes", "shard_size": 500, "facts": {"seed": 1}}
    fineweb.write_shards(TEXTS, tmp_path, **settings)
    before = digests(tmp_path)
    with pytest.raises(UserError, match="was made with .*choose another --out"):
        fineweb.write_shards(TEXTS, tmp_path, **(settings | change))
    assert digests(tmp_path) == before


def test_shards_of_unknown_origin_are_refused(tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(5, dtype=np.uint16))
    with pytest.raises(UserError, match="unknown origin"):
        fineweb.write_shards(TEXTS, tmp_path, "bytes")


# --- several processes ----------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("workers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_workers_change_nothing(tmp_path, small_batches, bpe, method, workers, monkeypatch):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    before = multiprocessing.get_start_method(allow_none=True)
    monkeypatch.syspath_prepend(str(ROOT))
    multiprocessing.set_start_method(method, force=True)
    try:
        for folder, number in ("one", 1), ("many", workers):
            fineweb.write_shards(TEXTS * 3, tmp_path / folder, bpe, val=TEXTS[:9], shard_size=400,
                                 workers=number)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


def test_a_worker_that_dies(tmp_path, small_batches, monkeypatch):
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("only a forked worker meets the broken function")
    monkeypatch.setattr(fineweb, "tokenize", lambda text, encoding: os._exit(9))
    with pytest.raises(UserError, match="worker process died.*fewer --workers"):
        fineweb.write_shards(TEXTS, tmp_path, "bytes", workers=2)


def test_workers_keep_the_order_and_do_not_read_ahead_without_end():
    read = []
    def work():
        for i in range(150):
            read.append(i)
            yield i, [f"text {i}"]
    encoding = fineweb.load_tokenizer("bytes")
    for number, (position, tokens) in enumerate(fineweb.tokenized(work(), encoding, workers=2)):
        assert position == number and bytes(tokens[1:].tolist()).decode() == f"text {number}"
        assert len(read) <= 65 + number
    assert number == 149


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the workers in /proc")
def test_workers_go_when_the_parent_is_killed(tmp_path):
    """kill -9 gives the parent no time to end its workers; idle ones would stay forever."""
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import fineweb\n"
            "def work():\n    yield from (({}, ['text']) for _ in range(70))\n    time.sleep(60)\n"
            "results = fineweb.tokenized(work(), fineweb.load_tokenizer('bytes'), 2)\n"
            "next(results); print('up', flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "up\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    alive = lambda: [pid for pid in children if Path(f"/proc/{pid}").exists()
                     and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()]
    for _ in range(100):
        if not alive():
            break
        time.sleep(0.1)
    assert not alive()


# --- interruption ---------------------------------------------------------------------------------

class Stop(BaseException):
    """An interruption that nothing catches."""


def stopping(documents, after):
    for i, text in enumerate(documents):
        if i == after:
            raise Stop
        yield text


@pytest.mark.parametrize("own_val", [False, True])
@pytest.mark.parametrize("shard_size", [64, 500])
def test_stopped_anywhere_ends_the_same(tmp_path, small_batches, own_val, shard_size):
    settings = {"tokenizer": "bytes", "shard_size": shard_size, "max_tokens": 6000, "val_fraction": 0.2}
    val = TEXTS[45:] if own_val else None
    fineweb.write_shards(TEXTS, tmp_path / "whole", val=val, **settings)
    for after in range(1, 30, 7):
        out = tmp_path / f"stopped{after}"
        for stop in (after, after + 5):                                         # stopped twice
            with pytest.raises(Stop):
                fineweb.write_shards(stopping(TEXTS, stop), out, val=val and iter(val), **settings)
            assert not (out / "meta.json").exists()
        fineweb.write_shards(iter(TEXTS), out, val=val and iter(val), **settings)
        assert digests(out) == digests(tmp_path / "whole")


def test_stopped_within_val(tmp_path, small_batches):
    fineweb.write_shards(TEXTS, tmp_path / "whole", "bytes", val=TEXTS[30:], shard_size=90)
    with pytest.raises(Stop):
        fineweb.write_shards(TEXTS, tmp_path / "stopped", "bytes", val=stopping(TEXTS[30:], 20),
                             shard_size=90)
    fineweb.write_shards(TEXTS, tmp_path / "stopped", "bytes", val=TEXTS[30:], shard_size=90)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_stopped_between_shard_and_note(tmp_path, monkeypatch, small_batches):
    """A shard may be there without its note: then it is written again. A .tmp left behind does no harm."""
    fineweb.write_shards(TEXTS, tmp_path / "whole", "bytes", shard_size=300)
    write, calls = fineweb.write_json, []
    def stop(path, content):
        calls.append(path)
        if len(calls) == 4:
            Path(f"{path}.tmp").write_text("half a no")
            raise Stop
        write(path, content)
    monkeypatch.setattr(fineweb, "write_json", stop)
    with pytest.raises(Stop):
        fineweb.write_shards(TEXTS, tmp_path / "stopped", "bytes", shard_size=300)
    monkeypatch.undo()
    assert len(list((tmp_path / "stopped").glob("*.npy"))) == 3
    assert len(json.loads((tmp_path / "stopped" / "progress.json").read_text())["shards"]) == 2
    fineweb.write_shards(TEXTS, tmp_path / "stopped", "bytes", shard_size=300)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_a_note_is_old_or_new_at_any_moment(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    fineweb.write_json(path, {"old": 1})
    def stop(*_):
        raise Stop
    for name in "fsync", "replace":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, stop)
            with pytest.raises(Stop):
                fineweb.write_json(path, {"new": 2})
        assert json.loads(path.read_text()) == {"old": 1}
    fineweb.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2} and list(tmp_path.iterdir()) == [path]


def test_going_on_does_not_tokenise_again(tmp_path, small_batches, monkeypatch):
    with pytest.raises(Stop):
        fineweb.write_shards(stopping(TEXTS, 50), tmp_path, "bytes", shard_size=300)
    done, tokens, tokenize = len(list(tmp_path.glob("*.npy"))), [], fineweb.tokenize
    def watched(text, encoding):
        tokens.append(tokenize(text, encoding))
        return tokens[-1]
    monkeypatch.setattr(fineweb, "tokenize", watched)
    meta = fineweb.write_shards(TEXTS, tmp_path, "bytes", shard_size=300)
    left = sum(shard["tokens"] for shard in meta["shards"]) - 300 * done
    # at most the batch where it stopped
    assert done > 5 and left <= sum(map(len, tokens)) <= left + 300 + 220


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, real_data, gpt2_tokenizer):
    """All the real text at hand in shards of 50,000 tokens: killed -9 five times, and left alone."""
    command = [sys.executable, str(ROOT / "fineweb.py"), "--source",
               *map(str, sorted(real_data.glob("*/*.txt"))),
               "--shard_size", "50000", "--workers", "2", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=120)
    rng, out, kills = random.Random(5), tmp_path / "killed", 0
    shards = lambda: len(list(out.glob("*.npy")))
    for aim in sorted(rng.sample(range(1, 22), 5)):
        job = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while job.poll() is None and shards() < aim:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        job.send_signal(signal.SIGKILL)
        kills += job.wait() == -signal.SIGKILL
    assert kills == 5 and not (out / "meta.json").exists()
    subprocess.run([*command, str(out)], check=True, capture_output=True, timeout=120)
    left = {name for name in digests(out) if name.endswith(".tmp")}
    assert not left and digests(out) == digests(tmp_path / "whole")


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch, small_batches):
    fineweb.write_shards(TEXTS, tmp_path / "whole", "bytes", shard_size=300)
    sync, calls = os.fsync, []
    def full(number):
        calls.append(number)
        if len(calls) >= 8:
            raise OSError(28, "No space left on device")
        sync(number)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*Finished shards are kept"):
        fineweb.write_shards(TEXTS, tmp_path / "full", "bytes", shard_size=300)
    monkeypatch.undo()
    kept = json.loads((tmp_path / "full" / "progress.json").read_text())["shards"]
    assert len(kept) == 3 and not list((tmp_path / "full").glob("*.npy.tmp"))
    fineweb.write_shards(TEXTS, tmp_path / "full", "bytes", shard_size=300)
    assert digests(tmp_path / "full") == digests(tmp_path / "whole")


# --- the hub, played by local files and by an iterator that fails ---------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch, small_batches):
    """A hub data set `me/set` with train and validation: the real `datasets` reads it from local files."""
    import datasets
    import huggingface_hub
    import pyarrow
    import pyarrow.parquet
    files = tmp_path / "hub"
    files.mkdir()
    parts = {"train-0": TEXTS[:25], "train-1": TEXTS[25:45], "validation-0": TEXTS[45:], "test-0": TEXTS[:1]}
    for name, texts in parts.items():
        table = pyarrow.table({"text": texts, "url": ["u"] * len(texts)})
        pyarrow.parquet.write_table(table, files / f"{name}.parquet", row_group_size=6)
    state = SimpleNamespace(splits=["train", "validation"], asked=[], fail=lambda: None)
    real = datasets.load_dataset

    def load_dataset(repo, config, streaming, revision):
        state.fail()
        state.asked.append((repo, config, streaming, revision))
        return {split: real("parquet", data_files=str(files / f"{split}-*.parquet"), split="train", streaming=True)
                for split in state.splits}

    def dataset_info(self, repo):
        state.fail()
        return SimpleNamespace(sha="abc123")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return state


def test_a_hub_set_goes_to_any_place(hub):
    """From each position that is noted, a data set opened anew gives the rest of the texts, each one once."""
    open_train = lambda: fineweb.open_hub("me/set", None, "text", None)[1]()
    whole = list(fineweb.batches(open_train(), fineweb.START))
    assert len(whole) > 8 and sum((texts for _, texts in whole), []) == TEXTS[:45]
    for number, (position, _) in enumerate(whole):
        again = list(fineweb.batches(open_train(), json.loads(json.dumps(position))))
        assert [texts for _, texts in again] == [texts for _, texts in whole[number:]]


def test_hub_shards_and_resumption(hub, tmp_path):
    arguments = ["--source", "me/set", "--tokenizer", "bytes", "--shard_size", "200", "--workers", "1",
                 "--out"]
    meta = fineweb.main([*arguments, str(tmp_path / "whole")])
    encoding = fineweb.load_tokenizer("bytes")
    assert sum(read_shards(tmp_path / "whole", "train"), []) == plain_tokens(TEXTS[:45], encoding)
    assert sum(read_shards(tmp_path / "whole", "val"), []) == plain_tokens(TEXTS[45:], encoding)
    assert (meta["source"], meta["revision"], meta["name"]) == ("me/set", "abc123", "set")
    assert all(asked[2:] == (True, "abc123") for asked in hub.asked)

    for stop in 3, 10, 17:
        out, tokenize_batch, calls = tmp_path / f"stop{stop}", fineweb.tokenize_batch, []
        def fail(texts, encoding):
            calls.append(texts)
            if len(calls) == stop:
                raise Stop
            return tokenize_batch(texts, encoding)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fineweb, "tokenize_batch", fail)
            with pytest.raises(Stop):
                fineweb.main([*arguments, str(out)])
        assert not (out / "meta.json").exists()
        fineweb.main([*arguments, str(out)])
        assert digests(out) == digests(tmp_path / "whole")


def test_a_resumed_job_stays_with_its_revision(hub, tmp_path, monkeypatch):
    arguments = ["--source", "me/set", "--tokenizer", "bytes", "--shard_size", "200", "--workers", "1",
                 "--out", str(tmp_path / "o")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "finish", lambda out, record: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            fineweb.main(arguments)
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self,
                        repo: SimpleNamespace(sha="newer"))
    hub.asked.clear()
    assert fineweb.main(arguments)["revision"] == "abc123" and {asked[3] for asked in hub.asked} == {"abc123"}


def test_hub_without_validation(hub, tmp_path):
    hub.splits = ["train"]
    meta = fineweb.main(["--source", "me/set", "--tokenizer", "bytes", "--shard_size", "200", "--out",
                         str(tmp_path / "o")])
    expected = plain_tokens(TEXTS[:45], fineweb.load_tokenizer("bytes"))
    assert read_shards(tmp_path / "o", "val") == [expected[:200]]
    assert sum(read_shards(tmp_path / "o", "train"), []) == expected[200:]
    assert meta["shards"][1]["split"] == "train"


def test_hub_bpe(hub, tmp_path):
    fineweb.main(["--source", "me/set", "--tokenizer", "bpe:300", "--out", str(tmp_path / "o")])
    learnt = fineweb.train_tokenizer(iter(TEXTS[:45]), 300)
    assert sum(read_shards(tmp_path / "o", "train"), []) == plain_tokens(TEXTS[:45], learnt)


def test_finished_needs_no_network(hub, tmp_path):
    arguments = ["--source", "me/set", "--tokenizer", "bytes", "--shard_size", "200", "--out",
                 str(tmp_path / "o")]
    meta = fineweb.main(arguments)
    hub.fail = lambda: (_ for _ in ()).throw(AssertionError("asked the hub"))
    assert fineweb.main(arguments) == meta


@pytest.mark.parametrize("change, words", [
    ({"splits": ["test"]}, "no train split, only test"), ({"column": "body"},
                                                          "no column 'body', only text, url")])
def test_hub_sets_that_do_not_fit(hub, change, words):
    hub.splits = change.get("splits", hub.splits)
    with pytest.raises(UserError, match=words):
        fineweb.open_hub("me/set", None, change.get("column", "text"), None)


def test_a_missing_config_is_named(hub, monkeypatch):
    import datasets
    def several(repo, config, streaming, revision):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")
    monkeypatch.setattr(datasets, "load_dataset", several)
    with pytest.raises(UserError, match="--config.*'en', 'de'") as told:
        fineweb.main(["--source", "me/set", "--tokenizer", "bytes"])
    assert "\n" not in str(told.value)


def lost():
    """What a lost connection raises: errors of Python, of HTTP, of the hub's own library."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    http_error = HfHubHTTPError.__bases__[0]
    return [kind("lost") for kind in (ConnectionError, TimeoutError, OSError, http_error, LocalEntryNotFoundError)]


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
    """Lost when opening and in the midst of the text, in all ways: the shards are those of a quiet night."""
    arguments = ["--source", "me/set", "--tokenizer", "bytes", "--shard_size", "100", "--workers", "1", "--out"]
    fineweb.main([*arguments, str(tmp_path / "whole")])
    clock.waits.clear()
    errors, clean, seen = lost(), fineweb.clean, []
    def failing(documents):
        for text in clean(documents):
            seen.append(text)
            if len(seen) % 14 == 0 and errors:
                clock.now += 100                    # it had worked for a while
                hub.fail = lambda: again.pop()()
                again = [lambda: None] * 9 + [lambda: (_ for _ in ()).throw(ConnectionError("no route"))]
                raise errors.pop()
            yield text
    monkeypatch.setattr(fineweb, "clean", failing)
    fineweb.main([*arguments, str(tmp_path / "lost")])
    assert digests(tmp_path / "lost") == digests(tmp_path / "whole")
    assert not errors and clock.waits == [1, 2] * 5                         # each success begins anew
    assert len(seen) < 60 + 5 * 8                                           # nobody began from the beginning


def test_a_hub_that_stays_away(clock):
    """After it worked for a while we wait for two minutes; at the beginning, when there may be no network, 3 s."""
    def job():
        clock.now += spent.pop() if spent else 0
        raise ConnectionError("gone\naway")
    for spent, waits in ([], [1, 2]), ([100], [1, 2, 4, 8, 16, 32, 64]):
        clock.waits.clear()
        with pytest.raises(UserError, match="Finished shards are kept.*--source builtin") as told:
            fineweb.ask_hub(job)
        assert clock.waits == waits and "\n" not in str(told.value)


@pytest.mark.parametrize("status, tries", [(404, 1), (401, 1), (403, 1), (429, 3), (503, 3), (None, 3)])
def test_which_errors_are_worth_waiting_for(clock, status, tries):
    calls = []
    def question():
        calls.append(1)
        error = OSError("two\nlines")
        error.response = SimpleNamespace(status_code=status)
        raise error
    with pytest.raises(UserError) as told:
        fineweb.ask_hub(question)
    assert len(calls) == tries
    assert "\n" not in str(told.value)
    assert ("HF_TOKEN" in str(told.value)) == (tries == 1)


def test_what_the_hub_does_not_have_is_not_waited_for(clock):
    with pytest.raises(UserError, match="is the name right"):
        fineweb.ask_hub(lambda: open("no such file"))
    assert not clock.waits


def test_a_bug_is_no_network_trouble():
    with pytest.raises(ZeroDivisionError):
        fineweb.ask_hub(lambda: 1 / 0)


# --- ready-made shards, from a small hub on this machine ------------------------------------------

def bin_bytes(tokens, magic=20240520, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, np.uint16).tobytes()


@pytest.fixture
def ready_made(tmp_path):
    """A server that answers like the hub for the five files of the repository; requests are in `.log`."""
    files = {"README.md": b"hello", "finewebedu_val_000000.bin": bin_bytes([50256, 1, 2, 50256, 3])}
    for i in range(1, 4):
        files[f"finewebedu_train_{i:06d}.bin"] = bin_bytes([50256, *range(i * 10, i * 20)])
    log, repo = [], fineweb.READY_MADE

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, body, headers=(), status=200):
            self.send_response(status)
            for key, value in {"Content-Length": len(body), **dict(headers)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            log.append((self.command, self.path))
            path = self.path.split("?")[0]
            if path.startswith(f"/api/datasets/{repo}"):
                siblings = [{"rfilename": name, "size": len(content), "lfs": {
                    "sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}}
                    for name, content in sorted(files.items(), reverse=True)]
                body = json.dumps({"id": repo, "sha": "f" * 40, "siblings": siblings, "private": False,
                                   "tags": [],
                                   "downloads": 0, "likes": 0}).encode()
                return self.answer(body, {"Content-Type": "application/json"})
            known = path.startswith(f"/datasets/{repo}/resolve/{'f' * 40}/")
            content = files.get(path.split("/")[-1]) if known else None
            if content is None:
                return self.answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)
            served = Hub.damage(content)
            self.answer(served, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                                 "X-Repo-Commit": "f" * 40})

        do_HEAD = do_GET
        damage = staticmethod(lambda content: content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
           "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    yield SimpleNamespace(files=files, log=log, env=env, Hub=Hub)
    server.shutdown()


def test_ready_made_shards(ready_made, tmp_path):
    out = tmp_path / "out"
    names = lambda: sorted(path.name for path in out.glob("*.bin"))
    def fetch(*flags):
        ready_made.log.clear()
        done = run_command("--pretokenized", *flags, "--out", out, env=ready_made.env)
        assert done.returncode == 0, done.stderr
        return done.stdout, [path.split("/")[-1] for command,
                             path in ready_made.log if command == "GET" and "resolve" in path]
    text, fetched = fetch("1")
    assert names() == ["finewebedu_train_000001.bin", "finewebedu_val_000000.bin"] and len(fetched) == 2
    assert "free" in text and "train: 11 tokens, 1 documents" in text
    assert fetch("1")[1] == [] and not ready_made.log                           # finished: nothing is asked
    # more: only what is new
    assert fetch()[1] == ["finewebedu_train_000002.bin", "finewebedu_train_000003.bin"]
    meta = json.loads((out / "meta.json").read_text())
    assert [shard["file"] for shard in meta["shards"]] == [
        "finewebedu_val_000000.bin", *(f"finewebedu_train_{i:06d}.bin" for i in (1, 2, 3))]
    for shard in meta["shards"]:
        content = ready_made.files[shard["file"]]
        assert (out / shard["file"]).read_bytes() == content
        assert shard["sha256"] == hashlib.sha256(content).hexdigest() and shard["bytes"] is None
        assert shard["tokens"] == (len(content) - 1024) // 2 and shard["split"] in shard["file"]
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["revision"]) == ("gpt2", 50257, 50256,
                                                                                      "f" * 40)
    assert meta["shards"][0]["documents"] == 2 and meta["complete"] and not (out / "progress.json").exists()


def test_ready_made_shards_that_come_damaged(ready_made, tmp_path):
    magic = np.int32(20240520).tobytes()
    damage = lambda content: content[:-2] + b"!!" if content[:4] == magic else content
    ready_made.Hub.damage = staticmethod(damage)
    done = run_command("--pretokenized", "1", "--out", tmp_path / "out", env=ready_made.env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "damaged" in done.stderr and not list((tmp_path / "out").glob("*.bin"))
    # A shard that arrived just before the job was killed, without a note, is not one of unknown origin.
    name = "finewebedu_val_000000.bin"
    (tmp_path / "out" / name).write_bytes(ready_made.files[name])
    ready_made.Hub.damage = staticmethod(lambda content: content)
    assert run_command("--pretokenized", "1", "--out", tmp_path / "out", env=ready_made.env).returncode == 0


@pytest.mark.parametrize("content, digest, words", [
    (bin_bytes([1, 2, 3]), "0" * 64, "damaged.*sha256 [0-9a-f]{64}"),
    (bin_bytes([1, 2], magic=20240521), None, "damaged.*header .20240521, 1, 2"),
    (bin_bytes([1, 2], count=3), None, "damaged.*header .20240520, 1, 3., 2 tokens"),
    (bin_bytes([1, 50257]), None, "damaged.*largest id 50257"), (b"short", None, "damaged"), (b"", None, "damaged"),
    (bin_bytes([1]) + b"\x01\x00", None, "damaged.*1., 2 tokens"),
])
def test_damaged_bins(tmp_path, content, digest, words):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        fineweb.check_bin(path, digest)
    assert not path.exists()


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (["--bogus"], "--bogus"), (["--tokenizer", "bpe:3"], "257"), (["--tokenizer", "bpe:x"], "bpe:N"),
                                              (["--tokenizer", "gpt4"], "gpt2"),
    (["--tokenizer", "bpe:65537"], "65536"), (["--shard_size", "0"], "at least 1"),
                                              (["--workers", "0"], "at least 1"),
    (["--max_tokens", "1"], "at least 2"), (["--val_fraction", "1"], "between 0 and 1"),
                                              (["--source", "none.txt"], "none.txt"),
    (["--source", "nonsense"], "nonsense"), (["--pretokenized", "--tokenizer", "bytes"], "--tokenizer"),
                                              (["--shard_size", "x"], "x"),
    (["--seed", "-1"], "at least 0"), (["--pretokenized", "-1"], "at least 0"), (["--source"], "--source"),
])
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        fineweb.main(arguments)
    assert words in str(told.value) and "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_exit_status(tmp_path):
    done = run_command("--source", "none.txt", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("fineweb.py: --source none.txt") and not list(tmp_path.iterdir())


def test_no_network_is_told_at_once(tmp_path):
    done = run_command("--source", "tinystories", "--tokenizer", "bytes", cwd=tmp_path,
                       env={"HF_HUB_OFFLINE": "1"})
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(words in last for words in ("--source builtin", "files", "--pretokenized"))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_command_on_local_files(tmp_path, monkeypatch, kind):
    import pyarrow
    import pyarrow.parquet
    monkeypatch.chdir(tmp_path)
    for part, texts in ("a", TEXTS[:30]), ("b", TEXTS[30:]):
        path = tmp_path / f"{part}.{kind}"
        if kind == "txt":
            path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    meta = fineweb.main(["--source", f"*.{kind}", "--tokenizer", "bytes", "--val_fraction", "0.2",
                         "--shard_size", "500"])
    encoding = fineweb.load_tokenizer("bytes")
    documents = {}
    for split in "val", "train":
        ids = sum(read_shards(Path("data/a"), split), [])
        documents[split] = bytes(i if i < 256 else 0 for i in ids[1:]).decode().split("\0")
        assert ids == plain_tokens(documents[split], encoding)
    assert len(documents["val"]) == 12 and sorted(documents["val"] + documents["train"]) == sorted(TEXTS)
    assert (meta["name"], meta["source"], meta["seed"]) == ("a", f"a.{kind}, b.{kind}", 1337)


def test_files_that_changed_are_refused(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\n\ntwo\n\n\nthree")
    arguments = ["--source", str(tmp_path / "t.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    fineweb.main(arguments)
    (tmp_path / "t.txt").write_text("one\n\n\ntwo\n\n\nthree and more")
    with pytest.raises(UserError, match="was made with revision"):
        fineweb.main(arguments)


@pytest.mark.slow
def test_builtin_command(tmp_path, capsys, builtin_texts):
    arguments = ["--source", "builtin", "--tokenizer", "bpe:300", "--max_tokens", "200000", "--out",
                 str(tmp_path / "o")]
    meta = fineweb.main(arguments)
    told = capsys.readouterr().out
    assert "GB needed" in told and "free" in told and "0.34 steps of 524,288" in told
    assert (meta["name"], meta["source"], meta["tokenizer"], meta["vocab_size"]) == ("builtin", "builtin",
                                                                                     "bpe:300", 300)
    assert meta["revision"].startswith("Python 3.") and fineweb.load_tokenizer(tmp_path / "o").n_vocab == 300
    assert sum(shard["tokens"] for shard in meta["shards"]) == 200_000
    text = fineweb.load_tokenizer(tmp_path / "o").decode(sum(read_shards(tmp_path / "o", "train"), []))
    builtin = set(builtin_texts)
    assert all(document in builtin for document in text.split("<|endoftext|>")[1:4])


def test_the_seed_is_used(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n\n".join(TEXTS))
    make = lambda seed: fineweb.main(["--source", str(tmp_path / "t.txt"), "--tokenizer", "bytes", "--seed",
                                      seed,
                                      "--out", str(tmp_path / seed)])["shards"]
    assert make("1") != make("2")


def test_a_bpe_job_goes_on_with_its_tokenizer(tmp_path, monkeypatch, small_batches):
    (tmp_path / "t.txt").write_text("\n\n\n".join(TEXTS))
    arguments = ["--source", str(tmp_path / "t.txt"), "--tokenizer", "bpe:280", "--shard_size", "300",
                 "--out"]
    fineweb.main([*arguments, str(tmp_path / "whole")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "finish", lambda out, record: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            fineweb.main([*arguments, str(tmp_path / "stopped")])
    monkeypatch.setattr(fineweb, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    fineweb.main([*arguments, str(tmp_path / "stopped")])
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_too_small_a_disk(tmp_path, monkeypatch):
    import shutil
    (tmp_path / "t.txt").write_text("\n\n\n".join(TEXTS))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="not enough room"):
        fineweb.main(["--source", str(tmp_path / "t.txt"), "--tokenizer", "bytes", "--out",
                      str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_one_bar_for_the_whole_job(tmp_path, monkeypatch):
    import tqdm
    bars = []
    class Bar(tqdm.tqdm):
        def __init__(self, *arguments, **kwargs):
            super().__init__(*arguments, **kwargs)
            if not self.disable:
                bars.append(self)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    (tmp_path / "t.txt").write_text("\n\n\n".join(TEXTS))
    meta = fineweb.main(["--source", str(tmp_path / "t.txt"), "--tokenizer", "bytes", "--out",
                         str(tmp_path / "out")])
    assert [bar.n for bar in bars] == [sum(shard["tokens"] for shard in meta["shards"])]
    assert bars[0].total == pytest.approx(bars[0].n, rel=0.02)


def test_the_file_keeps_its_form():
    """Nothing but definitions at module level, no long function."""
    tree = ast.parse((ROOT / "fineweb.py").read_text())
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.If)
    assert all(isinstance(node, kinds) for node in tree.body[1:])
    assert [ast.unparse(node.test) for node in tree.body if isinstance(node,
                                                                       ast.If)] == ["__name__ == '__main__'"]
    assert all(node.end_lineno - node.lineno < 60 for node in ast.walk(tree) if isinstance(node,
                                                                                           ast.FunctionDef))
