"""Text in, shards of tokens out: everything that `train_gpt2.py` reads is made here.

    python fineweb.py                                           # FineWeb-Edu sample-10BT: 100 shards of 100M tokens
    python fineweb.py --pretokenized 10                         # the same, ready-made: val and 10 train shards
    python fineweb.py --source tinystories                      # or any data set of the hub: --source OWNER/NAME
    python fineweb.py --source builtin --tokenizer bpe:1024     # no network: the text inside every Python
    python fineweb.py --source books/*.txt --tokenizer bytes    # your own .txt, .jsonl, .parquet, folders

Beside the shards lies meta.json: where the text is from, which tokenizer cut it, what each shard holds. A folder that
has it is finished. Stop a job whenever you like, kill -9 included: the same command continues after the last finished
shard and ends with the same bytes. For that, progress.json records how far into the text the shards reach.

A hub data set with a validation split keeps it as val; of any other, the first shard is val. Files and the builtin
text are shuffled by --seed, and --val_fraction of the documents (or the end of a single one) are val.
"""
import argparse
import ast
import glob
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np

# ---- 1 the idea, in thirty lines ------------------------------------------------------------------------------------
# Start here. This is how training data is made, by a script with a single process. The rest of the file does the same
# with any text and tokenizer (2, 3), on all cores and safe from interruptions (4, 5), and from the command line (6).


def simple_shards(documents, folder, tokenizer, shard_size=100_000_000):
    """Documents -> ids -> shards. With a token a letter and shards of 5 ids:

    documents    "one" "two" "six"
    ids          < o n e < t w o < s i x        "<" is <|endoftext|>
    shards       < o n e < | t w o < s | i x    flat arrays of uint16, in numpy's .npy format
    """
    def row():                                      # one long row of ids, made as it is needed
        for text in documents:
            yield tokenizer.eot_token               # tells the model that what follows is about something else
            yield from tokenizer.encode_ordinary(text)

    ids = row()
    for number in count():
        shard = np.fromiter(islice(ids, shard_size), dtype=np.uint16)   # GPT-2's 50,257 ids fit into 16 bits
        if len(shard) == 0:
            break
        split = "train" if number else "val"        # val: text to judge the model by, never to train it on
        np.save(Path(folder, f"text_{split}_{number:06d}.npy"), shard)


# ---- what everything below refers to --------------------------------------------------------------------------------

EOT = "<|endoftext|>"
KNOWN = {   # name: (repository on the hub, configuration, folder under data/)
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "edu_fineweb10B"),
    "tinystories": ("roneneldan/TinyStories", None, "tinystories"),
}
FINEWEB_TOKENS = 9_953_989_101      # GPT-2 tokens in sample-10BT: 99 shards of 100M, and a shorter one
READY_MADE = "kjj0/finewebedu10B-gpt2"
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
FILES = (".txt", ".jsonl", ".parquet")
LONGEST = 1 << 24       # characters: a longer document is cut, so that memory stays bounded
SHUFFLED = 1 << 28      # characters that are shuffled: most local corpora as a whole
BPE_SAMPLE = 1 << 26    # characters of the training text that a bpe:N tokenizer learns from
BATCH = 1 << 18         # characters that a worker gets at a time: some 15 ms of work
WORKER = {}             # what a worker process keeps from one batch to the next
KEPT = "Finished shards are kept: the same command continues"


class UserError(ValueError):
    """Wrong input, told in one line that says what to do. A command prints it and exits with status 2."""


def insist(condition, message):
    if not condition:
        raise UserError(message)


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is a UserError: one line instead of a page of usage."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


# ---- 2 documents: a corpus is anything that yields texts, one after another, so that few are in memory ---------------

def builtin_documents():
    """English that every Python carries: the Language Reference, as `help("topics")` shows it, then the docstrings of
    the library, one document per module. It is parsed, never imported: `import antigravity` would open a browser."""
    from pydoc_data.topics import topics
    yield from dict.fromkeys(topics.values())       # some are listed under several names
    library, seen = Path(os.__file__).parent, {None, ""}
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(library).parts):
            try:
                with warnings.catch_warnings(action="ignore"):      # some old modules hold bad escapes,
                    nodes = ast.walk(ast.parse(path.read_bytes()))
            except (SyntaxError, ValueError):                       # and some Pythons ship files that don't parse
                continue
            owners = (node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
            texts = [text for text in dict.fromkeys(map(ast.get_docstring, owners)) if text not in seen]
            seen.update(texts)
            if texts:
                yield "\n\n".join(texts)


def file_documents(path, column):
    """Documents of a .txt, .jsonl (an object a line) or .parquet file; the last two have their text in `column`. In a
    .txt, lines that read `<|endoftext|>` part documents, or, if it has none, two blank lines in a row. (One stands
    between paragraphs: Tiny Shakespeare, with its speeches, is one document.)"""
    number = 0
    try:
        if path.suffix == ".txt":       # the only kind that is in memory as a whole
            text = path.read_text(encoding="utf-8-sig", errors="replace")       # bytes that aren't UTF-8 become U+FFFD
            mark, blanks = r"(?m)^[^\S\n]*<\|endoftext\|>[^\S\n]*$", r"\n[^\S\n]*\n[^\S\n]*\n"
            yield from map(str.strip, re.split(mark if re.search(mark, text) else blanks, text))
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    yield json.loads(line)[column] if line.strip() else ""
        else:
            from pyarrow.parquet import ParquetFile
            for rows in ParquetFile(path).iter_batches(256, columns=[column]):
                yield from rows.column(column).to_pylist()
    except (ValueError, LookupError, TypeError) as error:       # pyarrow's errors are such errors, too
        raise UserError(f"{path}{f', line {number}' if number else ''}: no text under --text_column {column} "
                        f"({one_line(error)})") from None


def find_files(patterns):
    """Files of paths, globs and folders (and the folders in them), in the order given; those of one pattern sorted."""
    files = []
    for pattern in map(os.path.expanduser, patterns):
        names = glob.glob(f"{pattern}/**" if os.path.isdir(pattern) else glob.escape(pattern)
                          if os.path.exists(pattern) else pattern, recursive=True)
        found = [Path(name) for name in sorted(names) if name.endswith(FILES)]
        insist(found, f"--source {pattern}: no {', '.join(FILES)} file there; other sources are builtin, "
                      f"{', '.join(KNOWN)}, and OWNER/NAME of a hub data set")
        files += found
    return files


def clean(documents):
    """Leaves out empty documents (two marks in a row would teach nothing), cuts endless ones, refuses what isn't text,
    and mends halves of characters: JSON may say "\\ud83d\\ude00" for an emoji. A half on its own becomes U+FFFD."""
    for text in documents:
        if not isinstance(text, (str, type(None))):     # `insist` would first write out each text for its message
            raise UserError(f"not a text: {text!r:.60} (--text_column)")
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield from (text[i:i + LONGEST] for i in range(0, len(text or ""), LONGEST))


def some(documents, size):
    """Takes documents from an iterator until they make up `size` characters or more."""
    for text in documents:
        yield text
        size -= len(text)
        if size <= 0:
            break


def split_documents(documents, val_fraction, seed):
    """An iterator over a local corpus -> (val, train, rest): two lists in an order drawn from `seed`, which share out
    the first SHUFFLED characters, and what comes after them, for most corpora nothing."""
    block = list(some(documents, SHUFFLED))
    is_val = np.random.default_rng(seed).permutation(len(block)) < max(1, round(len(block) * val_fraction))
    if len(block) == 1:
        cut = int(len(block[0]) * (1 - val_fraction))
        cut = block[0].rfind("\n", 0, cut) + 1 or cut       # at the start of a line, if there is one
        block, is_val = [block[0][:cut], block[0][cut:]], [False, True]
        print(f"only one document: its last {len(block[1]):,} characters are val")
    val, train = ([text for text, picked in zip(block, is_val) if picked == wanted] for wanted in (True, False))
    val, train = ([part[i] for i in np.random.default_rng(seed).permutation(len(part))] for part in (val, train))
    return val, train, documents


def open_hub(repo, config, column, revision):
    """(val, train, bytes, revision) of a hub data set. Without a validation split val is None; bytes may be None."""
    import datasets
    from huggingface_hub import HfApi
    revision = revision or HfApi().dataset_info(repo).sha       # a job that continues next week keeps this week's text
    try:
        splits = datasets.load_dataset(repo, config, streaming=True, revision=revision)
        insist("train" in splits, f"no train split, only {', '.join(splits)}")
        row = next(iter(splits["train"]), {column: ""})
        insist(column in row, f"no column {column!r}, only {', '.join(row)}")
    except ValueError as error:         # or no such configuration, or there are several to choose from
        raise UserError(f"{repo}, --config {config}, --text_column {column}: {one_line(error)}") from None
    val, train = (splits[name].select_columns([column]) if name in splits else None for name in ("validation", "train"))
    return val, train, splits["train"].info.dataset_size, revision


def patiently(job):
    """What `job()` returns. When the network fails, the job begins again, after the last finished shard, after a pause
    that grows, for an hour at most: a night's work survives a bad quarter of an hour."""
    from huggingface_hub.errors import HfHubHTTPError
    pauses = []                         # a job that fails in its first minute has a wrong name, or no network at all
    while True:
        begun = time.monotonic()
        try:
            return job()
        except (OSError, *HfHubHTTPError.__bases__) as error:       # among its bases: any error of HTTP
            if time.monotonic() - begun > 60:
                pauses = [15, 30, 60, 120, 240, 480, 900, 900, 855]         # seconds, an hour in all
            insist(pauses, f"no such data on the hub, or no network ({one_line(error)}). Without one: --source "
                           f"builtin, or files. Less to fetch: --pretokenized N. {KEPT}")
            print(f"{one_line(error)}; next try in {pauses[0]} s", file=sys.stderr)
        time.sleep(pauses.pop(0))


# ---- 3 tokenizers ---------------------------------------------------------------------------------------------------
# A byte-level BPE is a list of byte strings: the 256 bytes, then longer ones, each merged from two before it. The
# place in the list is the id, and also the rank: of all the merges that a word allows, the earliest is done first.
# "gpt2", "bytes" (no merges) and "bpe:N" are such lists. `tokenizers` trains, saves and reads them; tiktoken encodes.

def byte_letters():
    """{letter: byte}: tokenizer files hold text, so GPT-2 writes each byte as a letter. The 188 that print as
    themselves are their own letters, the others get those from chr(256) on: a space is "Ġ"."""
    from tokenizers.pre_tokenizers import ByteLevel
    letters = sorted(ByteLevel.alphabet())
    return dict(zip(letters, sorted(range(256), key=lambda byte: (chr(byte) not in letters, byte))))


def bpe_json(tokens, merges):
    """The text of a tokenizer.json with these tokens, the rules of GPT-2, and `<|endoftext|>` as the last id."""
    from tokenizers import ByteLevelBPETokenizer
    library = ByteLevelBPETokenizer({token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in merges])
    library.add_special_tokens([EOT])
    return library.to_str()


def train_tokenizer(documents, size):
    """Byte-level BPE of `size` ids, learned from an iterator of texts: 256 bytes, the merges, and `<|endoftext|>`."""
    from tokenizers import ByteLevelBPETokenizer
    library, texts = ByteLevelBPETokenizer(), some(clean(documents), BPE_SAMPLE)
    library.train_from_iterator(texts, vocab_size=size - 1, min_frequency=0, show_progress=False)
    most, model = library.get_vocab_size() + 1, json.loads(library.to_str())["model"]
    insist(most == size, f"the text is too short for {size} ids: use --tokenizer bpe:{most} or bytes")
    return Tokenizer(bpe_json(sorted(model["vocab"], key=model["vocab"].get), model["merges"]), f"bpe:{size}")


def load_tokenizer(source):
    """The tokenizer called "gpt2" or "bytes", or that of a folder: of shards, of a log, of any model with a
    tokenizer.json. It has `encode_ordinary(text)`, for which `<|endoftext|>` is text like any other, `decode(ids)`,
    `n_vocab`, `eot_token` and `name`."""
    kind = source if source in ("gpt2", "bytes") else read_record(source).get("tokenizer")
    if kind == "gpt2":
        import tiktoken
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UserError(f"GPT-2's vocabulary is not here ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a "
                            "folder that has it, copied from elsewhere, or use --tokenizer bytes, bpe:N") from None
    if kind == "bytes":
        return Tokenizer(bpe_json(sorted(letters := byte_letters(), key=letters.get), []), "bytes")
    path = Path(source, "tokenizer.json").resolve()
    insist(path.exists(), f"no tokenizer {source}: neither gpt2, nor bytes, nor a folder with tokenizer.json")
    config = path.with_name("tokenizer_config.json")
    eos = read_json(config).get("eos_token") if config.exists() else None
    return Tokenizer(path.read_text(encoding="utf-8", errors="replace"), kind or path.parent.name,
                     eos["content"] if isinstance(eos, dict) else eos)


class Tokenizer:
    """A tokenizer.json: `tokenizers` reads any, and tiktoken encodes six times faster where it gives the same ids.
    `eot` is the end-of-text token, or its id, of one that has no `<|endoftext|>`."""

    def __init__(self, text, name, eot=None):
        import tokenizers
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:      # it raises nothing more specific
            raise UserError(f"tokenizer {name}: not a tokenizer.json ({one_line(error)})") from None
        library.no_truncation()         # a file may ask for 512 ids of any text
        library.no_padding()
        library.encode_special_tokens = True        # <|endoftext|> within a text is text
        self.json, self.name, self.library, self.fast = text, name, library, None
        ids, model = library.get_vocab(), json.loads(library.to_str())["model"]
        self.n_vocab, self.eot_token = max(ids.values(), default=-1) + 1, ids.get(EOT, ids.get(eot, eot))
        insist(isinstance(self.eot_token, int), f"tokenizer {name} has no {EOT}, nor the eos_token {eot}")
        tokens, letters = sorted(model["vocab"], key=ids.get) if model["type"] == "BPE" else [], byte_letters()
        # tiktoken does the merge with the lowest id first, so the ids must be in the order of the merges.
        if set(tokens[:256]) == set(letters) and tokens[256:] == ["".join(pair) for pair in model["merges"]]:
            if library.to_str() == bpe_json(tokens, model["merges"]):       # and everything else as GPT-2 has it
                import tiktoken
                from tiktoken_ext.openai_public import r50k_pat_str         # how it cuts text into words
                ranks = {bytes(map(letters.get, token)): i for i, token in enumerate(tokens)}
                self.fast = tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})

    def encode_ordinary(self, text):
        if self.fast:
            return self.fast.encode_ordinary(text)
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.library.decode(ids, skip_special_tokens=False)

    def __reduce__(self):               # on its way to a worker process
        return Tokenizer, (self.json, self.name, self.eot_token)


tokenizer_from_json = Tokenizer


def tokenizer_to_json(tokenizer):
    """The text of a tokenizer.json, from which `tokenizer_from_json(text, name)` makes the same tokenizer."""
    if hasattr(tokenizer, "json"):
        return tokenizer.json
    from tiktoken.load import read_file_cached          # GPT-2's list of merges, which tiktoken has here
    merges = [line.split() for line in read_file_cached(GPT2_MERGES).decode().split("\n")[1:-1]]
    return bpe_json([*byte_letters(), *map("".join, merges)], merges)


def save_tokenizer(tokenizer, folder):
    """Writes tokenizer.json and tokenizer_config.json; with them transformers.AutoTokenizer cuts the same. One
    difference stays: transformers takes the letters `<|endoftext|>` within a text for the mark."""
    text, eot = tokenizer_to_json(tokenizer), tokenizer.decode([tokenizer.eot_token])
    write_file(Path(folder, "tokenizer.json"), lambda file: file.write(text.encode()))
    write_json(Path(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot,
        "model_max_length": 1024, "clean_up_tokenization_spaces": False})


# ---- 4 shards -------------------------------------------------------------------------------------------------------
# As in section 1, but workers tokenize batches of documents, which are put in order again and cut every shard_size ids.
# The cuts depend on the documents alone. To continue after a cut, go to the batch that was cut and drop its first ids.
# So progress.json holds, besides the list of finished shards, one such position:

START = {"stream": 0, "place": 0, "tokens": 0}          # which stream of texts, where in it, how many ids further


def tokenize(text, tokenizer):
    """One document as ids: the mark, then its tokens.

    >>> tokenize("hi", load_tokenizer("bytes"))
    array([256, 104, 105], dtype=uint16)
    """
    encode = tokenizer.encode_ordinary
    if hasattr(fast := getattr(tokenizer, "fast", tokenizer), "encode_to_numpy"):
        encode = partial(fast.encode_to_numpy, disallowed_special=())   # without a Python object for each id
    try:
        ids = encode(text)
    except ValueError:              # a million blanks in a row are too many for tiktoken's regex engine
        ids = np.concatenate([encode(text[i:i + 50_000]) for i in range(0, len(text), 50_000)])
    tokens = np.empty(len(ids) + 1, np.uint16)
    tokens[0], tokens[1:] = tokenizer.eot_token, ids
    return tokens


def tokenize_batch(texts, tokenizer=None):
    return np.concatenate([tokenize(text, tokenizer or WORKER["tokenizer"]) for text in texts])


def start_worker(tokenizer):
    """Runs once in each worker process. Ctrl-C is for the parent; when that is gone, even killed, the worker goes."""
    WORKER["tokenizer"] = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def batches(documents, position):
    """(position, texts) from a position in the documents on. A data set of `datasets` has places of its own and goes
    there at once; in anything else a place is the number of documents before it."""
    place, jumps = position["place"], hasattr(documents, "load_state_dict")
    if jumps and place:
        documents.load_state_dict(place)
    texts = (text for row in documents for text in row.values()) if jumps else documents        # a row has one column
    rest = islice(clean(texts), 0 if jumps else place, None)
    while batch := list(some(rest, BATCH)):
        yield position, batch
        place = documents.state_dict() if jumps else place + len(batch)
        position = position | {"place": place, "tokens": 0}


def tokenized(work, tokenizer, workers):
    """(position, ids) for each (position, texts), in order, for any number of workers. 32 batches for each are under
    way, half a second of work, so that memory stays bounded; `Pool.imap` would read ahead without end."""
    if workers == 1:
        yield from ((position, tokenize_batch(texts, tokenizer)) for position, texts in work)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tokenizer,)) as pool:
        submitted = ((position, pool.submit(tokenize_batch, texts)) for position, texts in work)
        pending = deque(islice(submitted, 32 * workers))
        while pending:
            position, ids = pending.popleft()
            yield position, ids.result()
            pending.extend(islice(submitted, 1))


def fill(work, left, size, bar):
    """Up to `size` ids from `work`, after those that the last shard left -> (the shard, what it leaves)."""
    shard, filled = np.empty(size, np.uint16), 0
    for position, tokens in chain([left], work):
        at = position["tokens"]
        piece = tokens[at:at + size - filled]
        shard[filled:filled + len(piece)] = piece
        filled, position = filled + len(piece), position | {"tokens": at + len(piece)}
        if bar is not None:
            bar.update(len(piece))
        if filled == size:
            break
    return shard[:filled], (position, tokens)


def write_shards(documents, out, tokenizer="gpt2", *, val=None, name="corpus", shard_size=100_000_000,
                 max_tokens=None, val_fraction=0.1, workers=1, facts=None, bar=None):
    """Tokenizes texts into shards in the folder `out`; returns the content of its meta.json. A finished folder is left
    alone, an unfinished one continued from the same documents, one that was made with other settings refused.

    `documents` and `val` are iterables of str, or data sets of one column; without `val`, the first shard is val.
    `facts` are more entries for meta.json: source, revision, seed ...; `bar` is something with `update(tokens)`.
    """
    out, tokenizer = Path(out), load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    insist(tokenizer.n_vocab <= 1 << 16, f"{tokenizer.name} has {tokenizer.n_vocab:,} ids; a shard has room for 65,536")
    settings = {"name": name, "tokenizer": tokenizer.name, "shard_size": shard_size, "max_tokens": max_tokens,
                "val_fraction": val_fraction} | (facts or {})
    record = read_record(out, settings) or settings | {
        "vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token, "complete": False, "shards": [], "next": START}
    if record["complete"]:
        return record
    if tokenizer.name not in ("gpt2", "bytes"):
        save_tokenizer(tokenizer, out)
    write_json(out / "progress.json", record)
    # An id stands for the same bytes anywhere: a shard's bytes are exact, though its last document may go on elsewhere.
    ranks = getattr(getattr(tokenizer, "fast", tokenizer), "_mergeable_ranks", {})
    lengths = np.zeros(tokenizer.n_vocab, np.uint16)
    lengths[list(ranks.values())] = list(map(len, ranks))
    limit = {"val": max(1, int(max_tokens * val_fraction)) if max_tokens else sys.maxsize}
    limit["train"] = max_tokens - limit["val"] if max_tokens else sys.maxsize
    streams = [documents] if val is None else [val, documents]
    for number in range(record["next"]["stream"], len(streams)):
        work, left = tokenized(batches(streams[number], record["next"]), tokenizer, workers), (START, ())
        while True:
            split = "train" if number or val is None and record["shards"] else "val"
            done = sum(shard["tokens"] for shard in record["shards"] if shard["split"] == split)
            tokens, left = fill(work, left, min(shard_size, limit[split] - done), bar)
            if not len(tokens):
                break
            path, record["next"] = out / f"{record['name']}_{split}_{len(record['shards']):06d}.npy", left[0]
            write_file(path, lambda file: np.save(file, tokens))
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = int(lengths[tokens].sum(dtype=np.int64)) if ranks else None
            record["shards"].append({
                "file": path.name, "split": split, "tokens": len(tokens), "bytes": size,
                "documents": int((tokens == tokenizer.eot_token).sum()), "sha256": digest})
            write_json(out / "progress.json", record)
        record["next"] = START | {"stream": number + 1}
    for split in "val", "train":
        insist(split in [shard["split"] for shard in record["shards"]], f"no text for {split}: the source is empty, or "
               f"too short for this --shard_size or --max_tokens (to try others, remove {out})")
    record = {key: value for key, value in record.items() if key != "next"} | {"complete": True}
    write_json(out / "meta.json", record)
    (out / "progress.json").unlink(missing_ok=True)
    return record


def fetch_ready_made(out, count):
    """Fetches val and the first `count` train shards of READY_MADE, FineWeb-Edu in shards of 100M tokens. What is here
    already is not fetched again. They have no meta.json: the bytes of their text are unknown."""
    from huggingface_hub import snapshot_download
    names = [f"finewebedu_{'train' if i else 'val'}_{i:06d}.bin" for i in range(min(count, 99) + 1)]
    insist(not read_record(out), f"{out} holds shards of another kind: choose another --out")
    check_disk(out, 200_001_024 * sum(not (out / name).exists() for name in names))
    snapshot_download(READY_MADE, repo_type="dataset", local_dir=out, allow_patterns=names)
    return {"shards": [{"split": split, "tokens": len(ids), "documents": int((ids == 50256).sum())}
                       for split in ("val", "train") for _, ids in open_shards(out, split)]}


# ---- 5 files, whole or not at all ------------------------------------------------------------------------------------

def write_file(path, write):
    """Makes a file with `write(file)`: after kill -9 there is the old one, or the new one with all its bytes."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())     # down to the disk, before the name says that it is there
        os.replace(temporary, path)     # happens at once, or does not happen
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(file):
    """A file that holds one JSON object -> dict; UserError if it is anything else."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} can't be read as JSON ({one_line(error)})") from None


def read_record(folder, settings=None):
    """What meta.json (finished) or else progress.json (begun) of a folder says; {} if it has neither. A UserError if
    it was made with other settings, or, where these are given, if there are shards without a record."""
    for path in Path(folder, "meta.json"), Path(folder, "progress.json"):
        if path.exists():
            record = read_json(path)
            for key, value in (settings or {}).items():
                insist(record.get(key) == value, f"{folder} was made with {key} {record.get(key)!r}, not {value!r}: "
                                                 "choose another --out, or remove it")
            return record
    unknown = [path.name for path in Path(folder).glob("*") if settings and path.suffix in (".npy", ".bin")]
    insist(not unknown, f"{folder} holds shards of unknown origin ({', '.join(unknown)}): choose another --out")
    return {}


def read_meta(data_dir):
    """What meta.json tells of a folder of shards: tokenizer, vocab_size, eot, shards and more. Shards from elsewhere,
    which have no meta.json, are taken to be GPT-2's ids. UserError for unfinished ones."""
    record = read_record(data_dir)
    insist(record.get("complete", True), f"{data_dir} is not finished: the same fineweb.py command continues")
    return {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "shards": []} | record


def open_shards(data_dir, split):
    """The shards of a split in their order, [(file, ids)]; ids is a row of uint16 that stays on disk. UserError if
    there are none, or one is damaged. Besides .npy, the .bin of llm.c and modded-nanogpt is read: 256 int32 (20240520,
    1, number of ids, zeros), then the ids."""
    shards, name = [], re.compile(rf".*_{split}_\d+\.(npy|bin)")
    for file in sorted(f for f in Path(data_dir).glob("*") if name.fullmatch(f.name)):
        try:
            if file.suffix == ".npy":
                ids = np.load(file, mmap_mode="r", allow_pickle=False)      # nothing in a file is executed
            else:
                ids = np.memmap(file, dtype=np.uint16, mode="r", offset=1024)
                insist(np.fromfile(file, np.int32, 3).tolist() == [20240520, 1, len(ids)], "header and length differ")
            insist(ids.dtype == np.uint16 and ids.ndim == 1,
                   f"{ids.ndim}-dimensional {ids.dtype}, where a shard is a row of uint16")
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it and make it again with fineweb.py") from None
        shards.append((file, ids))
    insist(shards, f"no {split} shards in {Path(data_dir).resolve()}: `python fineweb.py --out {data_dir}` makes them "
                   "from FineWeb-Edu, --source from other text; --preset laptop needs none")
    return shards


# ---- 6 the command line ----------------------------------------------------------------------------------------------

def parse_args(argv):
    parser = Parser("fineweb.py", description="Turns text into shards of tokens for train_gpt2.py.")
    add = parser.add_argument
    add("--source", nargs="+", default=["fineweb-edu"], help=f"{', '.join(KNOWN)}, builtin, OWNER/NAME (hub), or files")
    add("--config", help="configuration of a hub data set")
    add("--text_column", default="text", help="where .jsonl, .parquet and hub data sets have their text")
    add("--tokenizer", default="gpt2", help="gpt2, bytes, or bpe:N, learned from the text, N ids in all")
    add("--out", type=Path, help="folder for the shards (default: data/NAME)")
    add("--max_tokens", type=int, help="tokens in all, val included (default: the whole text)")
    add("--shard_size", type=int, default=100_000_000, help="tokens in a shard (default: %(default)s)")
    add("--val_fraction", type=float, default=0.1, help="share of val, if none (default: %(default)s)")
    add("--seed", type=int, default=1337, help="for the order of local documents (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenize (default: one per core)")
    add("--pretokenized", type=int, nargs="?", const=10 ** 6, metavar="N", help=f"fetch N shards of {READY_MADE}")
    args = parser.parse_args(argv)
    ids = re.fullmatch("gpt2|bytes|bpe:([0-9]+)", args.tokenizer)
    insist(ids and 257 <= int(ids[1] or 257) <= 65536,
           f"--tokenizer {args.tokenizer}: it is gpt2, bytes, or bpe:N with N from 257 to 65536")
    for flag, least in {"max_tokens": 2, "shard_size": 1, "workers": 1, "seed": 0, "pretokenized": 0}.items():
        value = getattr(args, flag)
        insist(value is None or value >= least, f"--{flag} {value}: it must be at least {least}")
    insist(0 < args.val_fraction < 1, f"--val_fraction {args.val_fraction}: it must lie between 0 and 1")
    insist(args.pretokenized is None or (args.tokenizer, args.source) == ("gpt2", ["fineweb-edu"]),
           "--pretokenized is FineWeb-Edu in GPT-2's tokens: leave out --source and --tokenizer")
    return args


def check_disk(out, need):
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    print(f"{out}: about {need / 1e9:,.2f} GB needed, {free / 1e9:,.2f} GB free")
    insist(need <= free, f"not enough room in {place}: make some, choose another --out, or use --max_tokens")


def make_shards(args, out, facts, repo, files):
    """Does what the flags say, --pretokenized excepted."""
    from tqdm import tqdm
    flags = {key: getattr(args, key) for key in ("max_tokens", "shard_size", "val_fraction")}
    record = read_record(out, facts | flags | {"tokenizer": args.tokenizer})
    if record.get("complete"):
        return record
    if repo:
        val, train, size, facts["revision"] = open_hub(repo, facts["config"], args.text_column, record.get("revision"))
        sample = chain.from_iterable(texts for _, texts in batches(train, START))
    else:
        documents = chain(*(file_documents(path, args.text_column) for path in files)) if files else builtin_documents()
        val, sample, rest = split_documents(clean(documents), args.val_fraction, args.seed)
        train = chain(sample, rest)
        size = max(sum(map(len, val + sample)), sum(path.stat().st_size for path in files))
    # What to expect: a token is about 4.6 bytes of FineWeb-Edu (gpt2), 2.6 of builtin (bpe:1024).
    tokens = FINEWEB_TOKENS if facts["config"] == "sample-10BT" else int(
        (size or 0) / {"gpt2": 4.6, "bytes": 1}.get(args.tokenizer, 2.6))
    tokens = min(filter(None, (tokens, args.max_tokens)), default=None)
    done = sum(shard["tokens"] for shard in record.get("shards", []))
    print(f"{facts['source']} ({facts['revision']:.14}) as {args.tokenizer}, {tokens or 'an unknown number of'} tokens")
    check_disk(out, 2 * max(0, (tokens or 0) - done))
    if args.tokenizer.startswith("bpe:") and not record:
        tokenizer = train_tokenizer(sample, int(args.tokenizer[4:]))
    else:
        tokenizer = load_tokenizer(out if record else args.tokenizer)
    workers = args.workers if not size or size > 1 << 23 else 1     # 8 MB are cut before the workers are up
    with tqdm(total=tokens, initial=done, unit=" tokens", unit_scale=True) as bar:
        return write_shards(train, out, tokenizer, val=val, workers=workers, bar=bar, facts=facts, **flags)


def main(argv=None):
    """Makes the shards that the flags ask for; returns the content of their meta.json. Raises UserError."""
    args = parse_args(argv)
    source, repo, files = args.source[0], None, []
    facts = {"config": args.config, "text_column": args.text_column, "seed": args.seed}
    if args.source == ["builtin"]:
        facts |= {"name": source, "source": source, "revision": f"Python {sys.version.split()[0]}"}
    elif len(args.source) == 1 and (source in KNOWN or source.count("/") == 1 and not (
            os.path.exists(source) or glob.has_magic(source) or source.endswith(FILES))):
        repo, config, name = KNOWN.get(source) or (source, None, source.split("/")[1])
        facts |= {"name": name, "source": repo, "config": args.config or config}
    else:
        files = find_files(args.source)
        sizes = [[path.name, path.stat().st_size] for path in files]        # another size means another text
        facts |= {"name": files[0].stem, "source": ", ".join(path.name for path in files[:3]),
                  "revision": hashlib.sha256(repr(sizes).encode()).hexdigest()}
    out = args.out or Path("data", facts["name"])
    job = partial(make_shards, args, out, facts, repo, files)
    if args.pretokenized is not None:
        job = partial(fetch_ready_made, out, args.pretokenized)
    meta = patiently(job) if repo else job()
    for split in "val", "train":
        shards = [shard for shard in meta["shards"] if shard["split"] == split]
        tokens, documents = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
        print(f"{split}: {tokens:,} tokens, {documents:,} documents in {len(shards)} shards, "
              f"the last one of {shards[-1]['tokens']:,} tokens")
    print(f"{out} is ready: an epoch is {tokens / 524_288:,.2f} steps of 524,288 tokens")
    return meta


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")        # a console may lack the letters of a name
    try:
        main()
    except (UserError, OSError, BrokenExecutor) as error:
        print(f"fineweb.py: {error if isinstance(error, UserError) else f'{one_line(error)}. {KEPT}'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"fineweb.py: stopped. {KEPT}", file=sys.stderr)
        sys.exit(130)
