"""Text in, shards of tokens out: everything that `train_gpt2.py` reads is made here.
    python fineweb.py                                           # FineWeb-Edu sample-10BT: 100 shards of 100M tokens
    python fineweb.py --pretokenized 10                         # the same, ready-made: val and 10 train shards
    python fineweb.py --source tinystories                      # or any data set of the hub: --source OWNER/NAME
    python fineweb.py --source builtin --tokenizer bpe:1024     # no network: the text inside every Python
    python fineweb.py --source books/*.txt --tokenizer bytes    # your own .txt, .jsonl, .parquet, folders

A hub data set with a validation split keeps it as val; of any other, the first shard is val. Of files and the builtin
text, the first 67 million characters are shuffled by --seed; --val_fraction of these documents (or the end of a single
one) are val. Stop a job when you like, even by kill -9: the same command continues, and ends with the same bytes.
"""
import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# ---- 1 the idea, in thirty lines ------------------------------------------------------------------------------------
# Start here: this is how training data is made, by a script with a single process. The rest of the file does the same
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
    "tinystories": ("roneneldan/TinyStories", None, "tinystories")}
FINEWEB_TOKENS = 9_953_989_101      # GPT-2 tokens in sample-10BT: 99 shards of 100M, and a shorter one
READY_MADE = "kjj0/finewebedu10B-gpt2"
FILES = (".txt", ".jsonl", ".parquet")
SAMPLE = 1 << 26        # characters of a text that are shuffled, and that a bpe:N tokenizer learns from
BATCH = 1 << 18         # characters that a thread gets at a time: some 15 ms of work
AHEAD = 32              # batches for each thread that are under way: more would fill the memory
KEPT = "Finished shards are kept: the same command continues"


class UserError(ValueError):
    """Wrong input, told in one line that says what to do. A command prints it and exits with status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):           # one line instead of a page of usage
        raise UserError(f"{message} (--help lists the flags)")


def insist(condition, message):
    if not condition:
        raise UserError(message)


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"

# ---- 2 documents: a corpus is anything that yields texts, one after another, so that few are in memory ---------------
def builtin_documents():
    """English that every Python carries: the Language Reference, then the library's docstrings, module by module."""
    from pydoc_data.topics import topics
    yield from dict.fromkeys(topics.values())       # some are listed under several names
    library, seen = Path(os.__file__).parent, {None, ""}
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(library).parts):
            with suppress(SyntaxError, ValueError):     # some Pythons ship files that don't parse
                nodes = ast.walk(ast.parse(path.read_bytes()))      # never imported: antigravity opens a browser
                owners = (node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
                if texts := [text for text in dict.fromkeys(map(ast.get_docstring, owners)) if text not in seen]:
                    seen.update(texts)
                    yield "\n\n".join(texts)


def file_documents(path, column):
    """Documents of a .txt, or those in `column` of a .jsonl (an object a line) or .parquet. In a .txt, lines that read
    `<|endoftext|>` part documents, or, if it has none, two blank lines in a row."""
    if path.suffix == ".txt":       # the only kind that is in memory as a whole
        text = path.read_text(encoding="utf-8-sig", errors="replace")       # bytes that aren't UTF-8 become U+FFFD
        mark, blanks = r"(?m)^[^\S\n]*<\|endoftext\|>[^\S\n]*$", r"\n[^\S\n]*\n[^\S\n]*\n"
        yield from map(str.strip, re.split(mark if re.search(mark, text) else blanks, text))
    elif path.suffix == ".jsonl":
        for line in filter(str.strip, path.open(encoding="utf-8-sig", errors="replace")):
            yield json.loads(line)[column]
    else:
        from pyarrow.parquet import ParquetFile
        for rows in ParquetFile(path).iter_batches(256, columns=[column]):
            yield from rows.column(column).to_pylist()


def clean(documents):
    """The texts that aren't empty: two marks in a row teach nothing. Half an emoji, as JSON may hold, becomes "?"."""
    number = 0
    try:
        for number, text in enumerate(documents, 1):
            text = [*text.values()][0] if isinstance(text, dict) else text      # a hub data set has rows of one column
            if text:
                yield text.encode(errors="replace").decode()
    except (ValueError, LookupError, TypeError, AttributeError) as error:       # pyarrow's errors are such errors, too
        raise UserError(f"near document {number}: no text, or not under --text_column ({one_line(error)})") from None


def some(documents, size):
    """Takes documents, none of them empty, from an iterator until they make up `size` characters or more."""
    while size > 0 and (text := next(documents, None)):
        yield text
        size -= len(text)


def split_documents(documents, val_fraction, seed):
    """Splits the first SAMPLE characters of an iterator -> [val, train], shuffled. What stays in it is train, too."""
    block = list(some(documents, SAMPLE))
    if len(block) == 1:
        cut = int(len(block[0]) * (1 - val_fraction))
        cut = block[0].rfind("\n", cut // 2, cut) + 1 or cut        # at the start of a line, if one is near
        return [block[0][cut:]], [block[0][:cut]]
    is_val = np.random.default_rng(seed).permutation(len(block)) < max(1, round(len(block) * val_fraction))
    orders = [np.random.default_rng(seed).permutation(np.flatnonzero(part)) for part in (is_val, ~is_val)]
    return [[block[i] for i in order] for order in orders]


def patiently(job):
    """Does `job()`, and does it again when the network fails: it continues after the last finished shard."""
    from huggingface_hub.errors import HfHubHTTPError
    begun = time.monotonic()
    for pause in 15, 30, 60, 120, 240, 480, 960, 1695, 0:       # seconds, an hour in all
        try:
            return job()
        except (OSError, *HfHubHTTPError.__bases__) as error:       # among its bases: any error of HTTP
            if not pause or time.monotonic() - begun < 60:      # at once: a wrong name, or no network at all
                raise UserError(f"{one_line(error)}. {KEPT}. No network? --source builtin, or files") from None
            print(f"{one_line(error)}; next try in {pause} s", file=sys.stderr)
            time.sleep(pause)

# ---- 3 tokenizers ---------------------------------------------------------------------------------------------------
# A byte-level BPE is a list of byte strings: the 256 bytes, then longer ones, each merged from two before it. The
# place in the list is the id, and also the rank: of all the merges that a word allows, the earliest is done first.
# "gpt2", "bytes" (no merges) and "bpe:N" are such lists. `tokenizers` trains, tiktoken encodes, 4 to 20 times faster.
def train_tokenizer(documents, size):
    """Byte-level BPE of `size` ids, learned from an iterator of texts: 256 bytes, the merges, and `<|endoftext|>`."""
    from tokenizers import ByteLevelBPETokenizer
    library, texts = ByteLevelBPETokenizer(), some(clean(documents), SAMPLE)
    library.train_from_iterator(texts, vocab_size=size - 1, min_frequency=0, show_progress=False)
    got = library.get_vocab_size() + 1
    insist(got == size, f"this text gives {got} ids, not {size}: use --tokenizer bpe:{got} or bytes")
    return tokenizer_from_json(library.to_str(), f"bpe:{size}")


def load_tokenizer(source):
    """The tokenizer called "gpt2" or "bytes", or that of a folder with tokenizer.json. It has `encode_ordinary(text)`,
    for which `<|endoftext|>` is text like any other, `decode(ids)`, `n_vocab`, `eot_token` and `name`."""
    kind = source if source in ("gpt2", "bytes") else read_record(source).get("tokenizer")
    import tiktoken
    if kind == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str="(?s).", mergeable_ranks=ranks, special_tokens={EOT: 256})
    if kind == "gpt2":
        with suppress(OSError, ValueError):
            return tiktoken.get_encoding("gpt2")
        raise UserError("GPT-2's vocabulary can't be fetched: set TIKTOKEN_CACHE_DIR to a copy, or use bytes or bpe:N")
    path = Path(source, "tokenizer.json")
    insist(path.exists(), f"no tokenizer {source}: neither gpt2, nor bytes, nor a folder with tokenizer.json")
    config = Path(source, "tokenizer_config.json")
    eos = read_json(config).get("eos_token") if config.exists() else None
    return tokenizer_from_json(path.read_text(encoding="utf-8"), kind or str(path.resolve().parent), eos)


def tokenizer_from_json(text, name, eot=None):
    """The tokenizer of a tokenizer.json. `eot` is the end-of-text token, or its id, of one without `<|endoftext|>`."""
    from tiktoken import Encoding
    from tiktoken_ext.openai_public import r50k_pat_str         # GPT-2's rule for where words end
    from tokenizers import Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    library = Tokenizer.from_str(text)
    ids = library.get_vocab()
    if name.startswith(("bytes", "bpe:")):          # made here; GPT-2 writes each byte as a letter: a space is "Ġ"
        byte = {letter: byte for byte, letter in bytes_to_unicode().items()}
        ranks = {bytes(map(byte.get, token)): i for token, i in ids.items() if token != EOT}
        return Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})
    library.no_truncation()                         # a file may ask for 512 ids of any text
    library.encode_special_tokens = True            # <|endoftext|> within a text is text
    eot = ids.get(EOT, ids.get(eot["content"] if isinstance(eot, dict) else eot, eot))
    insist(isinstance(eot, int), f"tokenizer {name} has no {EOT}, and tokenizer_config.json names no other eos_token")
    return SimpleNamespace(json=text, name=name, n_vocab=max(ids.values()) + 1, eot_token=eot,
                           encode_ordinary=lambda text: library.encode(text, add_special_tokens=False).ids,
                           decode=lambda ids: library.decode(ids, skip_special_tokens=False))


def tokenizer_to_json(tokenizer):
    """The text of a tokenizer.json, from which `tokenizer_from_json(text, name)` makes the same tokenizer."""
    if hasattr(tokenizer, "json"):
        return tokenizer.json
    from tokenizers import ByteLevelBPETokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    ranks, letters, merges = tokenizer._mergeable_ranks, bytes_to_unicode(), []
    for token in sorted(ranks, key=ranks.get):      # a file names the two parts of each: merge until they are left
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(tuple("".join(map(letters.get, part)) for part in parts))
    library = ByteLevelBPETokenizer({"".join(pair): i for i, pair in enumerate(merges)}, merges[256:])
    library.add_special_tokens([EOT])
    return library.to_str()


def save_tokenizer(tokenizer, folder):
    """For transformers.AutoTokenizer, which cuts the same, but takes `<|endoftext|>` within a text for the mark."""
    text, eot = tokenizer_to_json(tokenizer), tokenizer.decode([tokenizer.eot_token])
    write_file(Path(folder, "tokenizer.json"), lambda file: file.write(text.encode()))
    write_json(Path(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot,
        "model_max_length": 1024, "clean_up_tokenization_spaces": False})

# ---- 4 shards -------------------------------------------------------------------------------------------------------
# As in section 1, but threads tokenize batches of documents, which are put in order again and cut every shard_size ids.
# The cuts depend on the documents alone. To continue after a cut, go to the batch that was cut and drop its first ids.
START = {"stream": 0, "place": 0, "tokens": 0}      # a position: val or train texts, the batch, how many of its ids


def tokenize(text, tokenizer):
    """One document as ids: the mark, then its tokens. With "bytes", "hi" is 256, 104, 105."""
    encode = tokenizer.encode_ordinary
    if hasattr(tokenizer, "encode_to_numpy"):       # tiktoken's: an array, and an error where the other would panic
        encode = partial(tokenizer.encode_to_numpy, disallowed_special=())
    try:
        ids = encode(text)
    except ValueError:              # a million blanks in a row are too many for tiktoken's regex engine
        ids = np.concatenate([encode(text[i:i + 50_000]) for i in range(0, len(text), 50_000)])
    return np.concatenate([[tokenizer.eot_token], ids]).astype(np.uint16)


def tokenized(documents, position, tokenizer, workers):
    """(position, ids) of batch after batch, from a position on, in order, however many threads there are. Data sets of
    `datasets` have places of their own and go there at once; elsewhere a place is the number of documents before it."""
    place, jumps = position["place"], hasattr(documents, "load_state_dict")
    if jumps and place:
        documents.load_state_dict(place)
    rest, pending = islice(clean(documents), 0 if jumps else place, None), deque()
    with ThreadPoolExecutor(workers) as pool:
        while (batch := list(some(rest, BATCH))) or pending:
            if batch:       # a `map` waits until somebody asks: it is a thread that makes the list
                pending.append((position, pool.submit(list, map(partial(tokenize, tokenizer=tokenizer), batch))))
                place = documents.state_dict() if jumps else place + len(batch)
                position = position | {"place": place, "tokens": 0}
            if not batch or len(pending) > AHEAD * workers:
                begin, ids = pending.popleft()
                yield begin, np.concatenate(ids.result())[begin["tokens"]:]


def fill(work, rest, size, progress):
    """Up to `size` ids, first from what the last shard left, then from `work` -> (the shard, what it leaves)."""
    pieces = []
    for position, ids in chain([rest], work):
        pieces.append(ids[:size])
        progress(used := len(pieces[-1]))
        size -= used
        if size == 0:
            break
    return np.concatenate(pieces), (position | {"tokens": position["tokens"] + used}, ids[used:])


def write_shards(documents, out, tokenizer="gpt2", *, val=None, workers=1, progress=lambda tokens: None, name="corpus",
                 shard_size=100_000_000, max_tokens=None, val_fraction=0.1, **facts):
    """Tokenizes texts (iterables of str, or data sets of one column) into shards in the folder `out`, which is left
    alone if it is finished, continued from the same texts if not, and refused if other settings made it. Without `val`,
    the first shard is val. `facts` are more entries for meta.json. Returns what that says in the end."""
    out, tokenizer = Path(out), load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    insist(tokenizer.n_vocab <= 1 << 16, f"{tokenizer.name} has {tokenizer.n_vocab:,} ids; a shard has room for 65,536")
    settings = {"name": name, "tokenizer": tokenizer.name, "shard_size": shard_size, "max_tokens": max_tokens,
                "val_fraction": val_fraction} | facts
    record = read_record(out, settings)
    insist(record or not any(out.glob("*_[0-9]*.*")), f"{out} holds other shards: choose another --out")
    record = record or settings | {
        "vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token, "complete": False, "shards": [], "next": START}
    if record["complete"]:
        return record
    if tokenizer.name not in ("gpt2", "bytes"):
        save_tokenizer(tokenizer, out)
    ranks, lengths = getattr(tokenizer, "_mergeable_ranks", {}), np.zeros(tokenizer.n_vocab, np.uint16)
    lengths[list(ranks.values())] = list(map(len, ranks))       # bytes of each id: the same wherever it stands
    most = max_tokens or sys.maxsize
    room = {"val": int(most * val_fraction), "train": most - int(most * val_fraction)}
    streams, shards = [documents] if val is None else [val, documents], record["shards"]
    for number in range(record["next"]["stream"], len(streams)):
        work, rest = tokenized(streams[number], record["next"], tokenizer, workers), (START, np.uint16([]))
        while True:
            write_json(out / "progress.json", record)
            split = "train" if number or val is None and shards else "val"      # without val: the first shard
            done = sum(shard["tokens"] for shard in shards if shard["split"] == split)
            ids, rest = fill(work, rest, min(shard_size, room[split] - done), progress)
            if not len(ids):
                break
            path, record["next"] = out / f"{name}_{split}_{len(shards):06d}.npy", rest[0]
            write_file(path, lambda file: np.save(file, ids))
            shards.append({"file": path.name, "split": split, "tokens": len(ids),
                           "bytes": int(lengths[ids].sum(dtype=np.int64)) if ranks else None,
                           "documents": int((ids == tokenizer.eot_token).sum()),
                           "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
        record["next"] = START | {"stream": number + 1}
    insist({shard["split"] for shard in shards} == {"val", "train"}, "too little text for a val and a train shard: "
           f"remove {out}, then try another --shard_size, --max_tokens or --val_fraction")
    write_json(out / "meta.json", {key: record[key] for key in record if key != "next"} | {"complete": True})
    (out / "progress.json").unlink()
    return read_meta(out)


def check_disk(out, need):
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    print(f"{out}: about {need / 1e9:,.2f} GB needed, {free / 1e9:,.2f} GB free")
    insist(need <= free, f"not enough room in {out}: make some, choose another --out, or take less text")

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
        temporary.unlink(missing_ok=True)       # half a checkpoint would fill the disk for good


def write_json(path, content):
    write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(file):
    """A file that holds one JSON object -> dict; UserError if it is anything else."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} can't be read as JSON ({one_line(error)})") from None


def read_record(folder, settings={}):
    """What meta.json (finished) or else progress.json (begun) says; a UserError if other settings made the folder."""
    paths = [path for path in (Path(folder, "meta.json"), Path(folder, "progress.json")) if path.exists()]
    record = read_json(paths[0]) if paths else {}
    other = {key: record.get(key) for key in settings if paths and record.get(key) != settings[key]}
    insist(not other, f"{folder} was made with {other}: choose another --out, or remove it")
    return record


def read_meta(data_dir):
    """What meta.json tells of finished shards. Those from elsewhere, which have none, are taken to be GPT-2's ids."""
    record = read_record(data_dir)
    insist(record.get("complete", True), f"{data_dir} is not finished: the same fineweb.py command continues")
    return {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "shards": []} | record


def open_shards(data_dir, split):
    """The shards of a split, [(file, ids)]; ids is a row of uint16 that stays on disk. Besides .npy, the .bin of llm.c
    and modded-nanogpt is read: 256 int32 (20240520, 1, number of ids, zeros), then the ids."""
    shards, name = [], re.compile(rf".*_{split}_\d+\.(npy|bin)")
    for file in sorted(f for f in Path(data_dir).glob("*") if name.fullmatch(f.name)):
        try:
            if file.suffix == ".npy":
                ids = np.load(file, mmap_mode="r", allow_pickle=False)      # nothing in a file is executed
                insist(ids.dtype == np.uint16 and ids.ndim == 1, f"{ids.dtype}, where a shard is a row of uint16")
            else:
                ids = np.memmap(file, dtype=np.uint16, mode="r", offset=1024)
                insist(np.fromfile(file, np.int32, 3).tolist() == [20240520, 1, len(ids)], "header and length differ")
            shards.append((file, ids))
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{file} is damaged ({error}): remove {data_dir}, make it again by fineweb.py") from None
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
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads that tokenize (default: one per core)")
    add("--pretokenized", type=int, nargs="?", const=99, metavar="N", help=f"fetch N shards of {READY_MADE}")
    args = parser.parse_args(argv)
    insist(re.fullmatch("gpt2|bytes|bpe:[0-9]{3,5}", args.tokenizer), "--tokenizer: gpt2, bytes, or bpe:N, N from 257")
    insist(0 < args.val_fraction < 1 and min(args.workers, args.shard_size, args.max_tokens or 1, args.seed + 1) > 0,
           "--val_fraction must lie between 0 and 1, --workers, --shard_size, --max_tokens above 0, --seed not below 0")
    insist(args.pretokenized is None or (args.tokenizer, args.source) == ("gpt2", ["fineweb-edu"]),
           "--pretokenized is FineWeb-Edu in GPT-2's tokens: leave out --source and --tokenizer")
    return args


def main(argv=None):
    """Makes the shards that the flags ask for; returns the content of their meta.json. Raises UserError."""
    args = parse_args(argv)
    settings = {key: getattr(args, key) for key in ("text_column", "seed", "max_tokens", "shard_size", "val_fraction")}
    source, paths, files = args.source[0], list(map(Path, args.source)), []
    if source in KNOWN or source.count("/") == 1 and not (os.path.exists(source) or source.endswith(FILES)):
        repo, config, name = KNOWN.get(source) or (source, None, source.split("/")[1])
        settings |= {"name": name, "source": repo, "config": args.config or config}
    elif source == "builtin":
        settings |= {"name": source, "source": source, "revision": f"Python {sys.version.split()[0]}"}
    else:
        files = [file for path in paths for file in [path, *sorted(path.rglob("*"))] if file.suffix in FILES]
        insist(files and all(path.exists() for path in paths), f"--source {' '.join(args.source)}: no such {FILES} or "
               f"folder; other sources are builtin, {', '.join(KNOWN)} and OWNER/NAME of a hub data set")
        settings |= {"name": files[0].stem, "source": ", ".join(path.name for path in files[:3]),
                     "revision": f"{sum(path.stat().st_size for path in files):,} bytes in {len(files)} files"}
    args.out = args.out or Path("data", settings["name"])
    job = partial(make_shards, args, settings, files)
    if args.pretokenized is not None:
        from huggingface_hub import snapshot_download
        insist(not read_record(args.out), f"{args.out} holds shards of another kind: choose another --out")
        names = [f"*_{i:06d}.bin" for i in range(args.pretokenized + 1)]        # 0 is val, 1 to 99 are train
        check_disk(args.out, 200_001_024 * sum(not list(args.out.glob(name)) for name in names[:100]))
        job = partial(snapshot_download, READY_MADE, repo_type="dataset", local_dir=args.out, allow_patterns=names)
    patiently(job) if "config" in settings else job()       # a data set of the hub has one
    for split in "val", "train":
        print(f"{split}: {sum(len(ids) for _, ids in open_shards(args.out, split)):,} tokens")
    return read_meta(args.out)


def make_shards(args, settings, files):
    """From the source to the shards; after a failure of the network it is called again."""
    from tqdm import tqdm
    record = read_record(args.out, settings | {"tokenizer": args.tokenizer})
    if record.get("complete"):
        return
    if "config" not in settings:
        documents = chain.from_iterable(file_documents(path, args.text_column) for path in files)
        documents = clean(documents if files else builtin_documents())
        val, sample = split_documents(documents, args.val_fraction, args.seed)
        train = chain(sample, documents)
        size = max(sum(map(len, chain(val, sample))), sum(path.stat().st_size for path in files))
    else:
        from datasets import load_dataset
        from huggingface_hub import HfApi
        repo, config, revision = settings["source"], settings["config"], record.get("revision")
        settings["revision"] = revision = revision or HfApi().dataset_info(repo).sha    # for good: the text may change
        try:
            splits = load_dataset(repo, config, streaming=True, revision=revision).select_columns([args.text_column])
            val, train, sample = splits.get("validation"), splits["train"], splits["train"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{repo}: wrong --config or --text_column, or no train split ({one_line(error)})") from None
        size = 4.6 * FINEWEB_TOKENS if config == "sample-10BT" else train.info.dataset_size or 0
    # What to expect: a token is about 4.6 bytes of FineWeb-Edu (gpt2), 2.6 of builtin (bpe:1024).
    tokens = int(size / {"gpt2": 4.6, "bytes": 1}.get(args.tokenizer, 2.6)) or args.max_tokens or 0
    tokens, done = min(tokens, args.max_tokens or tokens), sum(shard["tokens"] for shard in record.get("shards", []))
    check_disk(args.out, 2 * max(0, tokens - done))
    tokenizer = str(args.out) if record else args.tokenizer
    if tokenizer.startswith("bpe:"):
        tokenizer = train_tokenizer(sample, int(tokenizer[4:]))
    with tqdm(total=tokens, initial=done, unit=" tokens", unit_scale=True) as bar:
        write_shards(train, args.out, tokenizer, val=val, workers=args.workers, progress=bar.update, **settings)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(f"fineweb.py: {error if isinstance(error, UserError) else f'{one_line(error)}. {KEPT}'}", file=sys.stderr)
        sys.exit(2)
