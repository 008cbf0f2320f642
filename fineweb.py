"""Text in, shards of tokens out: everything that `train_gpt2.py` reads is made here.

    python fineweb.py                                           # FineWeb-Edu sample-10BT: 100 shards of 100M tokens
    python fineweb.py --pretokenized 10                         # the same, ready-made: val and 10 train shards
    python fineweb.py --source tinystories                      # or any data set of the hub: --source OWNER/NAME
    python fineweb.py --source builtin --tokenizer bpe:1024     # no network: the text inside every Python
    python fineweb.py --source books/*.txt --tokenizer bytes    # your own .txt, .jsonl, .parquet, folders

A shard is a flat array of uint16 token ids, in numpy's .npy format. Documents stand in it one after the other, each as
`<|endoftext|>` and then its tokens; the last one may run on into the next shard. Beside the shards lies meta.json:
where the text is from, which tokenizer cut it, what each shard holds. A folder that has it is finished.

Stop a job as you like, kill -9 included: the same command goes on after the last finished shard, and ends with the
same bytes as if nothing had happened. For that, progress.json notes with each shard how far in the text it reaches.

Which text is val? A hub data set with a validation split keeps it; of any other, the first shard is val. Files and the
builtin text are shuffled by --seed, and the first --val_fraction of the documents are val (the tail of a single one).

The file goes the way of the text: 1 documents, 2 tokenizers, 3 shards, 4 ready-made shards, 5 the command line.
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
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"
KNOWN = {   # name: (repository on the hub, configuration, folder under data/)
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "edu_fineweb10B"),
    "tinystories": ("roneneldan/TinyStories", None, "tinystories"),
}
FINEWEB_TOKENS = 9_953_989_101          # GPT-2 tokens in sample-10BT: 99 shards of 100M, and a shorter one
READY_MADE = "kjj0/finewebedu10B-gpt2"
LONGEST = 1 << 24       # characters: a longer document of a .txt is cut, so that memory stays bounded
SHUFFLED = 1 << 26      # characters shuffled at a time: most local corpora are shuffled as a whole
BPE_SAMPLE = 1 << 26    # characters of the training text that a bpe:N tokenizer learns from
BATCH = 1 << 18         # characters that a worker gets at a time: some 15 ms of work
WORKER = {}             # what a worker process keeps from one batch to the next
KEPT = "Finished shards are kept, the same command goes on"


class UserError(ValueError):
    """Wrong input, told in one line that says what to do. A command prints it and exits with status 2."""


def insist(condition, message):
    if not condition:
        raise UserError(message)


def one_line(error):
    """An error that comes from elsewhere, to be told in a message of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is a UserError: one line instead of a page of usage."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


# ---- 1 documents ----------------------------------------------------------------------------------------------------
# A document is a str, a corpus is whatever yields documents: a file, a folder, a data set still on its way. All are
# read one document after the other, so a terabyte takes no more memory than a megabyte.

def builtin_documents():
    """English that every Python carries: the Language Reference, as `help("topics")` shows it, then the docstrings of
    the library, one document per module. It is parsed, never imported: `import antigravity` would open a browser."""
    from pydoc_data.topics import topics
    yield from dict.fromkeys(topics.values())       # some stand there under several names
    library, seen = Path(os.__file__).parent, {None, ""}
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(library).parts):
            try:
                with warnings.catch_warnings(action="ignore"):      # some old modules hold bad escapes,
                    nodes = ast.walk(ast.parse(path.read_bytes()))
            except (SyntaxError, ValueError):                       # and in some Pythons a few are no Python
                continue
            owners = (node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
            texts = [text for text in dict.fromkeys(map(ast.get_docstring, owners)) if text not in seen]
            seen.update(texts)
            if texts:
                yield "\n\n".join(texts)


def text_documents(path, column=None):
    """Documents of a .txt file, without the white space around them, by the first of three rules that applies:

    - lines that read `<|endoftext|>` part them (TinyStories); within a line it is text like any other;
    - two or more blank lines in a row part them (chapters of a book). One blank line does not: it stands between the
      paragraphs, or the speeches, *of* a document;
    - a file with neither is one document (Tiny Shakespeare).
    """
    def lines():
        with open(path, encoding="utf-8-sig", errors="replace") as file:    # what is no UTF-8 becomes U+FFFD
            yield from iter(partial(file.readline, LONGEST), "")            # a file may be one endless line
    marked, blanks = any(line.strip() == EOT for line in lines()), 0

    def parts(line):
        nonlocal blanks
        blanks = 0 if line.strip() else blanks + 1
        return line.strip() == EOT if marked else blanks == 2
    for between, group in groupby(lines(), parts):
        while not between and (text := "".join(some(group, LONGEST))):
            yield text.strip()


def jsonl_documents(path, column):
    """Documents of a .jsonl file: one object per line, the text under the key `column`."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)[column]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number}: not JSON with a key {column!r} (--text_column): "
                                f"{line.strip():.60}") from None


def parquet_documents(path, column):
    """Documents of a .parquet file, 256 rows in memory at a time."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            insist(column in names, f"{path}: no column {column!r} in {names} (--text_column)")
            for rows in file.iter_batches(batch_size=256, columns=[column]):
                yield from rows.column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({one_line(error)})") from None


READERS = {".txt": text_documents, ".jsonl": jsonl_documents, ".parquet": parquet_documents}


def find_files(patterns):
    """Files of paths, globs and folders (and the folders in them), as given; those of one pattern sorted."""
    files = []
    for pattern in map(os.path.expanduser, patterns):
        names = glob.glob(f"{pattern}/**" if os.path.isdir(pattern) else pattern, recursive=True)
        names = [pattern] if os.path.isfile(pattern) else sorted(names)         # a file's name may look like a glob
        found = [Path(name) for name in names if Path(name).suffix in READERS]
        insist(found, f"--source {pattern}: no {', '.join(READERS)} file there; other sources are builtin, "
                      f"{', '.join(KNOWN)}, and OWNER/NAME of a hub data set")
        files += found
    return files


def clean(documents):
    """Leaves out empty documents (two marks in a row would teach nothing) and refuses what is no text."""
    for text in documents:
        if not isinstance(text, (str, type(None))):
            raise UserError(f"a document is a {type(text).__name__}, not text: {text!r:.60} (--text_column)")
        if text:
            yield text


def some(documents, size):
    """Takes documents from an iterator until they make up `size` characters or more.

    >>> texts = iter(["one", "two", "three"])
    >>> list(some(texts, 4)), list(some(texts, 4)), list(some(texts, 4))
    (['one', 'two'], ['three'], [])
    """
    for text in documents:
        yield text
        size -= len(text)
        if size <= 0:
            break


def shuffled(documents, seed):
    """The same documents in an order drawn from `seed`. SHUFFLED characters are held at most: a larger corpus is
    shuffled block by block. That will do: the trainer draws its windows from all the shards anyway."""
    rng = np.random.default_rng(seed)
    while block := list(some(documents, SHUFFLED)):
        yield from (block[i] for i in rng.permutation(len(block)))


def split_documents(read, val_fraction, seed):
    """(val, train, bytes): two functions that each return an iterator of texts, and the size of all the text. Which
    are val is drawn from `seed`. `read()` iterates over the corpus: once to count, then for val and for train, each
    time leaving out what is the other's. Thus a few bytes per document are in memory, not the text."""
    sizes = np.fromiter((len(text.encode("utf-8", "replace")) for text in read()), np.int64)
    is_val = np.random.default_rng(seed).permutation(len(sizes)) < max(1, round(len(sizes) * val_fraction))
    if len(sizes) == 1:
        text = next(read())
        cut = int(len(text) * (1 - val_fraction))
        cut = text.rfind("\n", 0, cut) + 1 or cut       # at the start of a line, if there is one
        print(f"only one document: its last {len(text) - cut:,} of {len(text):,} characters are val")
        read, is_val = partial(iter, [text[:cut], text[cut:]]), [False, True]

    def part(wanted):
        return shuffled((text for text, val in zip(read(), is_val) if val == wanted), seed)
    return partial(part, True), partial(part, False), int(sizes.sum())


def open_hub(repo, config, column, revision):
    """(val, train, bytes, revision) of a hub data set. No validation split: val is None; no size told: bytes is."""
    import datasets
    from huggingface_hub import HfApi
    try:
        # Without a network `datasets` tries for 20 s, this question fails at once. And its answer pins the text: a job
        # that goes on next week must not go on in next week's version of the data.
        revision = revision or HfApi().dataset_info(repo).sha
        splits = datasets.load_dataset(repo, config, streaming=True, revision=revision)
    except ValueError as error:         # no such configuration, or there are several to choose from
        raise UserError(f"{repo}, --config {config}: {one_line(error)}") from None
    insist("train" in splits, f"{repo} has no train split, only {', '.join(splits)}")
    row = next(iter(splits["train"]), {column: ""})
    insist(column in row, f"{repo} has no column {column!r}, only {', '.join(row)} (--text_column)")
    val, train = (partial(splits[split].select_columns, [column]) if split in splits else None
                  for split in ("validation", "train"))
    return val, train, splits["train"].info.dataset_size, revision


def ask_hub(job):
    """What `job()` returns. If hub or network are in trouble, the job is begun again after 1, 2, 4 ... 64 s; as after
    kill -9, it goes on behind the last finished shard. (`datasets` has by then tried the same read 20 times.) Raises
    UserError if the trouble does not end, and at once where waiting is no use: no such data, no permission."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    waits = [1, 2]                                      # at first: is there a network at all?
    while True:
        begun = time.monotonic()
        try:
            return job()
        except (OSError, *HfHubHTTPError.__bases__) as error:       # among its bases: any error of HTTP
            told = one_line(error)
            status = getattr(getattr(error, "response", None), "status_code", None)
            missing = isinstance(error, FileNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if missing or status in (401, 403, 404):
                raise UserError(f"the hub refuses; is the name right, or HF_TOKEN needed? ({told})") from None
            if time.monotonic() - begun > 60:           # there is, for this worked a while: now be patient
                waits = [1, 2, 4, 8, 16, 32, 64]
            if not waits or isinstance(error, OfflineModeIsEnabled):
                raise UserError(f"no answer from the hub. {KEPT}. With no network: --source builtin, or files; less: "
                                f"--pretokenized N ({told})") from None
        print(f"hub: {told}; next try in {waits[0]} s", file=sys.stderr)
        time.sleep(waits.pop(0))


# ---- 2 tokenizers ---------------------------------------------------------------------------------------------------
# A byte-level BPE is a list of byte strings: the 256 bytes, then longer ones, each merged from two before it. The
# place in the list is the id, and also the rank: of all merges that a word allows, the earliest is done first. "gpt2",
# "bytes" (no merges) and "bpe:N" are such lists; one class, tiktoken's, serves them all.
#
# A tokenizer file holds text, so GPT-2 writes each byte as a letter: what prints as itself ("A"), the rest as letters
# from chr(256) on (the blank as "Ġ").

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTERS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def make_encoding(name, tokens):
    """tiktoken.Encoding of a list of tokens (bytes) in the order of merging; `<|endoftext|>` comes last.

    >>> make_encoding("bytes", [bytes([byte]) for byte in range(256)]).encode_ordinary("hé")
    [104, 195, 169]
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str     # how GPT-2 parts text into words before it merges
    return tiktoken.Encoding(name, pat_str=r50k_pat_str, special_tokens={EOT: len(tokens)},
                             mergeable_ranks={token: i for i, token in enumerate(tokens)})


def train_tokenizer(documents, size):
    """Byte-level BPE of `size` ids, learnt from an iterator of texts: 256 bytes, the merges, and `<|endoftext|>`."""
    from tokenizers import ByteLevelBPETokenizer
    learner = ByteLevelBPETokenizer()
    texts = some(clean(documents), BPE_SAMPLE)
    learner.train_from_iterator(texts, vocab_size=size - 1, min_frequency=0, show_progress=False)
    most = learner.get_vocab_size()
    insist(most == size - 1, f"the text is too short for {size} ids: use --tokenizer bpe:{most + 1} or bytes")
    return make_encoding(f"bpe:{size}", [bytes(map(BYTES.get, learner.id_to_token(i))) for i in range(most)])


def load_tokenizer(folder_or_name):
    """tiktoken.Encoding called "gpt2" or "bytes", or that of a folder of shards or of an exported model. To use:
    `encode_ordinary(text)`, for which `<|endoftext|>` is like any other text, `decode(ids)`, `n_vocab`, `eot_token`."""
    record = {} if folder_or_name in ("gpt2", "bytes") else read_record(folder_or_name)
    name, path = record.get("tokenizer", folder_or_name), Path(folder_or_name, "tokenizer.json")
    if name == "bytes":
        return make_encoding("bytes", [bytes([byte]) for byte in range(256)])
    if name == "gpt2":
        import tiktoken
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UserError(f"GPT-2's vocabulary is not here ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a "
                            "folder that has it, copied from elsewhere, or use --tokenizer bytes, bpe:N") from None
    insist(path.exists(), f"no tokenizer {folder_or_name}: neither gpt2, nor bytes, nor a folder with tokenizer.json")
    return tokenizer_from_json(path.read_text(encoding="utf-8"), Path(name).name)


def tokenizer_from_json(text, name):
    """The tokenizer that the text of a tokenizer.json describes."""
    try:
        content = json.loads(text)
        vocab, rule = content["model"]["vocab"], content["pre_tokenizer"]
        letters = sorted(vocab.keys() - {EOT}, key=vocab.get)
        tokens = [bytes(map(BYTES.get, token)) for token in letters]
        # tiktoken does first the merge with the lowest id: right only if ids come in the order of the merges.
        merged = ["".join(pair).replace(" ", "") for pair in content["model"]["merges"]]
        marks = {token["content"]: token["id"] for token in content["added_tokens"]}
        ids = [vocab[token] for token in letters]
        insist((merged, ids, marks) == (letters[256:], list(range(len(ids))), {EOT: len(ids)}), "other merges or ids")
        insist((rule["type"], rule["add_prefix_space"]) == ("ByteLevel", False), "other words")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: no byte-level BPE like GPT-2's ({one_line(error)})") from None
    return make_encoding(name, tokens)


def merges_of(ranks):
    """The pair that each token was merged from, in the order of merging. tiktoken forgets the pairs, other tools want
    them. A token's pair is what is left of its bytes when all the earlier merges are done.

    >>> merges_of({b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"abc": 4})
    [(b'a', b'b'), (b'ab', b'c')]
    """
    def pair_of(token):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return tuple(parts)
    return [pair_of(token) for token in sorted(ranks, key=ranks.get) if len(token) > 1]


def save_tokenizer(encoding, folder):
    """Writes tokenizer.json and tokenizer_config.json; with them transformers.AutoTokenizer cuts the same. One
    difference stays: transformers takes the letters `<|endoftext|>` within a text for the mark."""
    write_file(Path(folder, "tokenizer.json"), lambda file: file.write(tokenizer_to_json(encoding).encode()))
    write_json(Path(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT, "unk_token": EOT,
        "model_max_length": 1024, "clean_up_tokenization_spaces": False})


def tokenizer_to_json(encoding):
    """The text of a tokenizer.json: what `tokenizer_from_json` reads again, and `tokenizers` and transformers too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    written = {token: token.decode("latin-1").translate(LETTERS) for token in encoding._mergeable_ranks}
    vocab = {written[token]: i for token, i in encoding._mergeable_ranks.items()} | {EOT: encoding.eot_token}
    merges = [(written[left], written[right]) for left, right in merges_of(encoding._mergeable_ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return tokenizer.to_str(pretty=True)


# ---- 3 shards -------------------------------------------------------------------------------------------------------
#     documents    one  two three    four five six        "<" below is <|endoftext|>, each digit a token
#     batches      [one two] [three] [four five] ...      a few documents that make up BATCH characters
#     tokens       <1111<22<33333333<444<55<6666...       workers do a batch each; they are put in order again
#     shards       <1111<22<3 3333333<44 4<55<6666...     a cut every shard_size tokens, here after 10
#
# The cuts depend on the documents alone, not on workers or batches. The end of the second shard is "3 tokens after the
# beginning of [four five]". To go on from there: seek that position, tokenise on, drop 3 tokens. Besides the list of
# finished shards, that position is all that progress.json has to hold:

START = {"stream": 0, "place": 0, "tokens": 0}          # in which stream of texts, where in it, so many tokens further


def tokenize(text, encoding):
    """One document as ids: the mark, then its tokens.

    >>> tokenize("hi", load_tokenizer("bytes"))
    array([256, 104, 105], dtype=uint16)
    """
    try:    # encode_ordinary would make a Python object of each token; this gives the same ids without
        ids = encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:      # "\ud83d" in JSON is half a character: join halves, a lone one is U+FFFD
        return tokenize(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), encoding)
    except ValueError:              # a million blanks in a row are too many for tiktoken's regex engine
        pieces = [text[i:i + 50_000] for i in range(0, len(text), 50_000)]
        ids = np.concatenate([encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])
    tokens = np.empty(len(ids) + 1, np.uint16)
    tokens[0], tokens[1:] = encoding.eot_token, ids
    return tokens


def tokenize_batch(texts, encoding=None):
    """The documents of a batch as one array. A worker process knows its encoding from the start."""
    return np.concatenate([tokenize(text, encoding or WORKER["encoding"]) for text in texts])


def start_worker(encoding):
    """Runs once in each worker process. Ctrl-C is for the parent; once that is gone, even killed, we go."""
    WORKER["encoding"] = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def batches(documents, position):
    """(position, texts) from a position in the documents on. A data set of `datasets` has places of its own, and goes
    there at once; in anything else a place is the number of documents that lie before it."""
    place, jumps = position["place"], hasattr(documents, "load_state_dict")
    if jumps and place:
        documents.load_state_dict(place)
    texts = (text for row in documents for text in row.values()) if jumps else documents        # a row has one column
    rest = islice(clean(texts), 0 if jumps else place, None)
    while batch := list(some(rest, BATCH)):
        yield position, batch
        place = documents.state_dict() if jumps else place + len(batch)
        position = position | {"place": place, "tokens": 0}


def tokenized(work, encoding, workers):
    """(position, tokens) for each (position, texts), in order: the same for any number of workers. 32 batches for each
    are under way, half a second of work: enough while this process writes a shard. Not more, so that memory stays
    bounded; `Pool.imap` would read ahead without end."""
    if workers == 1:
        yield from ((position, tokenize_batch(texts, encoding)) for position, texts in work)
        return
    try:
        with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(encoding,)) as pool:
            submitted = ((position, pool.submit(tokenize_batch, texts)) for position, texts in work)
            pending = deque(islice(submitted, 32 * workers))
            while pending:
                position, tokens = pending.popleft()
                yield position, tokens.result()
                pending.extend(islice(submitted, 1))
    except BrokenExecutor:
        raise UserError(f"a worker process died, for lack of memory? {KEPT}, best with fewer --workers") from None


def shards_to_come(record, split):
    """(split, size) of each shard that a split may still get. With --max_tokens, val gets --val_fraction of them."""
    size, limit = record["shard_size"], sys.maxsize
    if record["max_tokens"]:
        val = max(1, int(record["max_tokens"] * record["val_fraction"]))
        limit = val if split == "val" else record["max_tokens"] - val
    done = sum(shard["tokens"] for shard in record["shards"] if shard["split"] == split)
    return ((split, min(size, limit - at)) for at in range(done, limit, size))


def cut(work, shards, bar):
    """Fills shards, (split, size) each, with the tokens of `work` until one of the two ends. Yields (split, tokens,
    position behind them)."""
    position, tokens, shard = START, (), np.empty(0, np.uint16)
    for split, size in shards:
        if len(shard) < size:
            shard = np.empty(size, np.uint16)           # 200 MB, used again, and taken only as far as filled
        filled = 0
        for position, tokens in chain([(position, tokens)], work):      # first, what the last shard had no room for
            at = position["tokens"]
            piece = tokens[at:at + size - filled]
            shard[filled:filled + len(piece)] = piece
            filled, position = filled + len(piece), position | {"tokens": at + len(piece)}
            if bar is not None:
                bar.update(len(piece))
            if filled == size:
                break
        if not filled:
            return
        yield split, shard[:filled], position


def write_shards(documents, out, tokenizer="gpt2", *, val=None, name="corpus", shard_size=100_000_000,
                 max_tokens=None, val_fraction=0.1, workers=1, facts=None, bar=None):
    """Tokenises texts into shards in the folder `out`; returns the content of its meta.json. A finished folder is left
    alone, an unfinished one continued from the same documents, one that was made with other settings refused.

    `documents` and `val` are iterables of str, or data sets of one column. Without `val`, the first shard is val
    (FineWeb's rule). `tokenizer` is "gpt2", "bytes", or a tiktoken.Encoding. `facts` are more entries for meta.json:
    source, revision, seed ...; `bar` is something whose update(tokens) is called.
    """
    out, encoding = Path(out), load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    insist(encoding.n_vocab <= 1 << 16, f"{encoding.name} has {encoding.n_vocab:,} ids; a shard has room for 65,536")
    settings = {"name": name, "tokenizer": encoding.name, "shard_size": shard_size, "max_tokens": max_tokens,
                "val_fraction": val_fraction} | (facts or {})
    record = read_record(out, settings) or settings | {
        "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, "complete": False, "shards": [], "next": START}
    if record["complete"]:
        return record
    if encoding.name.startswith("bpe:"):
        save_tokenizer(encoding, out)
    write_json(out / "progress.json", record)
    # An id stands for the same bytes anywhere: a shard's bytes are exact, though documents run on into the next one.
    lengths = [*map(len, encoding.decode_tokens_bytes(range(encoding.eot_token))), 0]
    val_shards, train_shards = shards_to_come(record, "val"), shards_to_come(record, "train")
    streams = [(val, val_shards), (documents, train_shards)]
    if val is None:                 # FineWeb's rule
        streams = [(documents, chain(islice(val_shards, 0 if record["shards"] else 1), train_shards))]
    for number, (texts, shards) in list(enumerate(streams))[record["next"]["stream"]:]:
        work = tokenized(batches(texts, record["next"]), encoding, workers)
        for split, tokens, record["next"] in cut(work, shards, bar):
            path = out / f"{record['name']}_{split}_{len(record['shards']):06d}.npy"
            write_file(path, lambda file: np.save(file, tokens))
            parts = np.array_split(tokens, 1 + len(tokens) // BATCH)        # for bincount makes an int64 copy
            counts = sum(np.bincount(part, minlength=len(lengths)) for part in parts)
            record["shards"].append({
                "file": path.name, "split": split, "tokens": len(tokens), "bytes": int(counts @ lengths),
                "documents": int(counts[-1]), "sha256": hashlib.sha256(np.memmap(path, mode="r")).hexdigest()})
            write_json(out / "progress.json", record)
        record["next"] = START | {"stream": number + 1}
    return finish(out, record)


def finish(out, record):
    """The last step: meta.json takes the place of progress.json."""
    for split in "val", "train":
        insist(split in [shard["split"] for shard in record["shards"]], f"no text for {split}: the source is empty, or "
               f"too short for this --shard_size or --max_tokens (to try others, remove {out})")
    record = {key: value for key, value in record.items() if key != "next"} | {"complete": True}
    write_json(out / "meta.json", record)
    (out / "progress.json").unlink(missing_ok=True)
    return record


def read_record(folder, settings=None):
    """What meta.json (finished) or else progress.json (begun) of a folder says; {} if it has neither. A UserError if
    it was made with other settings, or, where these are given, if there are shards without a record."""
    for path in Path(folder, "meta.json"), Path(folder, "progress.json"):
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            for key, value in (settings or {}).items():
                insist(record.get(key) == value, f"{folder} was made with {key} {record.get(key)!r}, not {value!r}: "
                                                 "choose another --out, or remove it")
            return record
    unknown = [path.name for path in Path(folder).glob("*") if settings and path.suffix in (".npy", ".bin")]
    insist(not unknown, f"{folder} holds shards of unknown origin ({', '.join(unknown)}): choose another --out")
    return {}


def write_file(path, write):
    """Makes a file whole or not at all: after kill -9 there is the old one, or the new one with all its bytes."""
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}): make room. {KEPT}") from None


def read_json(file):
    """The dict that a file holds as JSON; UserError if it is anything else."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} can't be read as JSON ({one_line(error)})") from None


def open_shards(data_dir, split):
    """The shards of a split in their order, [(file, ids)]; ids is a row of uint16 that stays on disk.

    Two layouts: numpy's .npy, and the .bin of llm.c and modded-nanogpt (256 int32: 20240520, 1, number
    of ids; then the ids). Nothing in a file is executed. UserError if there are none, or one is damaged.
    """
    shards, name = [], re.compile(rf".*_{split}_\d+\.(npy|bin)")
    for file in sorted(f for f in Path(data_dir).glob("*") if name.fullmatch(f.name)):
        try:
            if file.suffix == ".npy":
                ids = np.load(file, mmap_mode="r", allow_pickle=False)
            else:
                ids = np.memmap(file, dtype=np.uint16, mode="r", offset=1024)
                if tuple(np.fromfile(file, dtype=np.int32, count=3)) != (20240520, 1, len(ids)):
                    raise ValueError("its header is not that of a shard of this length")
            if ids.dtype != np.uint16 or ids.ndim != 1:
                raise ValueError(f"{ids.ndim}-dimensional {ids.dtype}, where a shard is a row of uint16")
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it and make it again with fineweb.py") from error
        shards.append((file, ids))
    if not shards:
        raise UserError(f"no {split} shards in {Path(data_dir).resolve()}: `python fineweb.py --out {data_dir}` "
                        "makes them from FineWeb-Edu, --source from other text; --preset laptop needs none")
    return shards


def read_meta(data_dir):
    """What is noted of a folder of shards: tokenizer, vocab_size, eot, and of each shard the ids and bytes of text.

    Shards from elsewhere, which have no meta.json, are taken to be GPT-2's ids. UserError for unfinished ones.
    """
    path = Path(data_dir, "meta.json")
    if path.with_name("progress.json").exists() and not path.exists():
        raise UserError(f"{data_dir} is not finished: give the same fineweb.py command again, it goes on")
    return dict(tokenizer="gpt2", vocab_size=50257, eot=50256, shards=[]) | (read_json(path) if path.exists() else {})


def write_json(path, content):
    write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


# ---- 4 ready-made ---------------------------------------------------------------------------------------------------

def fetch_ready_made(out, count):
    """Fetches val and the first `count` train shards of READY_MADE, FineWeb-Edu in shards of 100M tokens, and checks
    them. What is here already is not fetched again, so a larger count adds to the folder."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars
    from tqdm import tqdm
    record = read_record(out, {"source": READY_MADE, "tokenizer": "gpt2"})
    if record.get("complete") and count < len(record["shards"]):
        return record
    info = HfApi().dataset_info(READY_MADE, revision=record.get("revision"), files_metadata=True)
    files = sorted((file for file in info.siblings if file.rfilename.endswith(".bin")),
                   key=lambda file: ("_val_" not in file.rfilename, file.rfilename))[:count + 1]
    check_disk(out, sum(file.size for file in files if not (out / file.rfilename).exists()))
    record = {"name": "finewebedu", "source": READY_MADE, "revision": info.sha, "seed": None, "tokenizer": "gpt2",
              "vocab_size": 50257, "eot": 50256, "complete": False, "shards": []}
    write_json(out / "progress.json", record)       # from now on the folder is known as ours
    disable_progress_bars()                         # one bar for the whole job instead of one for each file
    with tqdm(total=sum(file.size for file in files), unit="B", unit_scale=True) as bar:
        for file in files:
            hf_hub_download(READY_MADE, file.rfilename, repo_type="dataset", revision=info.sha, local_dir=out)
            record["shards"].append(check_bin(out / file.rfilename, file.lfs and file.lfs.sha256))
            bar.update(file.size)
    return finish(out, record)


def check_bin(path, digest=None):
    """The entry for meta.json of a shard in llm.c's layout: 256 int32 (20240520, 1, number of tokens, zeros) and the
    tokens as uint16. If it is damaged, it is removed, with a UserError."""
    header, tokens = np.fromfile(path, np.int32, 3).tolist(), np.fromfile(path, np.uint16)[512:]
    found, largest = hashlib.sha256(path.read_bytes()).hexdigest(), tokens.max(initial=0)
    if digest not in (None, found) or header != [20240520, 1, len(tokens)] or largest > 50256:
        path.unlink()
        raise UserError(f"{path} came damaged and is removed (header {header}, {len(tokens)} tokens, largest id "
                        f"{largest}, sha256 {found}): the same command fetches it again")
    return {"file": path.name, "split": "val" if "_val_" in path.name else "train", "tokens": len(tokens),
            "bytes": None, "documents": int((tokens == 50256).sum()), "sha256": found}


# ---- 5 main ---------------------------------------------------------------------------------------------------------

def parse_args(argv):
    parser = Parser("fineweb.py", description="Turns text into shards of tokens for train_gpt2.py.")
    add = parser.add_argument
    add("--source", nargs="+", default=["fineweb-edu"],
        help="fineweb-edu (default), tinystories, builtin, OWNER/NAME on the hub, or files")
    add("--config", help="configuration of a hub data set")
    add("--text_column", default="text", help="where .jsonl, .parquet and hub data sets have their text")
    add("--tokenizer", default="gpt2", help="gpt2, bytes, or bpe:N, learnt from the text, N ids in all")
    add("--out", type=Path, help="folder for the shards (default: data/NAME)")
    add("--max_tokens", type=int, help="tokens in all, val included (default: the whole text)")
    add("--shard_size", type=int, default=100_000_000, help="tokens in a shard (default: %(default)s)")
    add("--val_fraction", type=float, default=0.1, help="share of val, if none (default: %(default)s)")
    add("--seed", type=int, default=1337, help="for the order of local documents (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenise (default: one per core)")
    add("--pretokenized", type=int, nargs="?", const=10 ** 6, metavar="N",
        help=f"fetch val and N train shards (default: all) of {READY_MADE} instead")
    args = parser.parse_args(argv)
    kind, _, ids = args.tokenizer.partition(":")
    insist(args.tokenizer in ("gpt2", "bytes") or kind == "bpe" and ids.isdigit() and 257 <= int(ids) <= 65536,
           f"--tokenizer {args.tokenizer}: it is gpt2, bytes, or bpe:N with N from 257 to 65536")
    for flag, least in {"max_tokens": 2, "shard_size": 1, "workers": 1, "seed": 0, "pretokenized": 0}.items():
        value = getattr(args, flag)
        insist(value is None or value >= least, f"--{flag} {value}: it must be at least {least}")
    insist(0 < args.val_fraction < 1, f"--val_fraction {args.val_fraction}: it must lie between 0 and 1")
    insist(args.pretokenized is None or (args.tokenizer, args.source) == ("gpt2", ["fineweb-edu"]),
           "--pretokenized is FineWeb-Edu in GPT-2's tokens: leave out --source and --tokenizer")
    return args


def identify(args):
    """What the flags ask for, without a network: (facts for meta.json, repository or None, files)."""
    source = args.source[0]
    facts = {"config": args.config, "text_column": args.text_column, "seed": args.seed}
    if args.source == ["builtin"]:
        facts |= {"name": "builtin", "source": "builtin", "revision": f"Python {sys.version.split()[0]}"}
        return facts, None, []
    local = os.path.exists(source) or glob.has_magic(source) or Path(source).suffix in READERS
    if len(args.source) == 1 and (source in KNOWN or source.count("/") == 1 and not local):
        repo, config, name = KNOWN.get(source) or (source, None, source.split("/")[1])
        return facts | {"name": name, "source": repo, "config": args.config or config}, repo, []
    files = find_files(args.source)
    sizes = [[path.name, path.stat().st_size] for path in files]            # another size means another text
    return facts | {"name": files[0].stem, "source": ", ".join(path.name for path in files[:3]),
                    "revision": hashlib.sha256(repr(sizes).encode()).hexdigest()}, None, files


def check_disk(out, need):
    """Says how much room a job needs and how much there is; raises UserError if that is too little."""
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
    learn = args.tokenizer.startswith("bpe:") and not record
    encoding = None if learn else load_tokenizer(out if record else args.tokenizer)
    if repo:
        val, train, size, revision = open_hub(repo, facts["config"], args.text_column, record.get("revision"))
        facts = facts | {"revision": revision}
    else:
        builtin = [] if files else list(builtin_documents())
        val, train, size = split_documents(lambda: clean(chain(builtin, *(
            READERS[path.suffix](path, args.text_column) for path in files))), args.val_fraction, args.seed)
    # What to expect, in tokens: a token is about 4.6 bytes of FineWeb-Edu (gpt2), 2.6 of builtin (bpe:1024).
    tokens = size and int(size / {"gpt2": 4.6, "bytes": 1}.get(args.tokenizer, 2.6))
    tokens = FINEWEB_TOKENS if facts["config"] == "sample-10BT" and args.tokenizer == "gpt2" else tokens
    tokens = min(filter(None, (tokens, args.max_tokens)), default=None)
    done = sum(shard["tokens"] for shard in record.get("shards", []))
    print(f"{facts['source']} ({facts['revision']:.14}) as {args.tokenizer}:",
          f"about {tokens:,} tokens" if tokens else "nobody knows how many tokens")
    check_disk(out, 2 * max(0, (tokens or 0) - done))
    if learn:
        texts = chain.from_iterable(texts for _, texts in batches(train(), START))
        encoding = train_tokenizer(texts, int(args.tokenizer.removeprefix("bpe:")))
    workers = args.workers if not size or size > 1 << 23 else 1     # 8 MB are cut before the workers are up
    with tqdm(total=tokens, initial=done, unit=" tokens", unit_scale=True) as bar:
        return write_shards(train(), out, encoding, val=val and val(), workers=workers, bar=bar, facts=facts, **flags)


def main(argv=None):
    """Makes the shards that the flags ask for; returns the content of their meta.json. Raises UserError."""
    args = parse_args(argv)
    facts, repo, files = identify(args)
    out = args.out or Path("data", facts["name"])
    job = partial(make_shards, args, out, facts, repo, files)
    if args.pretokenized is not None:
        job = partial(fetch_ready_made, out, args.pretokenized)
    meta = ask_hub(job) if repo else job()
    for split in "val", "train":
        shards = [shard for shard in meta["shards"] if shard["split"] == split]
        tokens, documents, size = (sum(shard[key] or 0 for shard in shards) for key in ("tokens", "documents", "bytes"))
        print(f"{split}: {tokens:,} tokens, {documents:,} documents, {f'{size:,}' if size else '?'} bytes of text in "
              f"{len(shards)} shards, the last one of {shards[-1]['tokens']:,} tokens")
    print(f"{out} is ready: an epoch is {tokens / 524_288:,.2f} steps of 524,288 tokens")
    return meta


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"fineweb.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"fineweb.py: stopped. {KEPT}", file=sys.stderr)
        sys.exit(130)
