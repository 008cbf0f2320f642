"""
HellaSwag: does a language model see which of four endings is the sensible one? Guessing scores 0.25.

    python hellaswag.py --model gpt2                 OpenAI's 124M: the baseline in the plots of such runs
    python hellaswag.py --model log                   the newest checkpoint of a training run
    python hellaswag.py --model FOLDER --limit 100    any causal language model in Hugging Face's layout
    python hellaswag.py --model gpt2 --show 10        print questions, the losses of the endings, the picks
    python hellaswag.py --model gpt2 --harness        the text rules of EleutherAI's lm-evaluation-harness

A question is the beginning of a video caption or of a how-to article, and four endings: the real one, and
three that a machine wrote and that fooled other machines. A small model could not follow an instruction to
choose. So it reads every ending behind the context, and the one that it finds likeliest is its answer:

    context     The baker takes the tray out of the oven. She          label 1
    ending 0    parks the tray under a bridge.                         log p of the tokens of " parks the ..."
    ending 1    sets it on the counter to cool.                        log p of the tokens of " sets it ..."

"Likeliest" can be meant in three ways, and published numbers differ by which one was:

    acc               the highest sum of log p: favours short endings
    acc_norm          the highest mean per token: build-nanogpt's number, the one in the plots of such runs
    acc_norm_chars    the highest sum per character of the ending: what the harness calls acc_norm

    1 questions    a record as text and as tokens
    2 rows         packing: the context once, its four endings behind it
    3 scores       log p of every ending, many rows at a time
    4 evaluate     the three accuracies, over any number of processes
    5 plumbing     the file and its download, models from anywhere, the command line

The data: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?" (2019), arXiv:1905.07830.
"""
import contextlib
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from fineweb import Parser, UserError, load_tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
FILES = {  # split: (lines, sha256 where known); the test split is published without its labels
    "val": (10042, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    "train": (39905, None),
}
RULES = {  # what can be meant by "the likeliest ending"
    "acc": "the sum of log p",
    "acc_norm": "its mean per token, as in build-nanogpt",
    "acc_norm_chars": "its mean per character, the harness's acc_norm",
}


# ----------------------------------------------------------------------------------------------------------
# 1 questions: a record becomes text, the text becomes tokens

def question(example, harness=False):
    """A record -> its context and its four endings, as text. harness: by the rules of lm-evaluation-harness.

    Those put the topic in front and tidy up what the scraping of WikiHow left behind:

    >>> question({"activity_label": "Tea", "ctx_a": "[header] How to brew [title] Boil water.",
    ...           "ctx_b": "then pour it", "endings": ["on  the leaves. [substeps] Wait."]}, harness=True)
    ('Tea: How to brew. Boil water. Then pour it', ['on the leaves. Wait.'])
    """
    if not harness:
        return example["ctx"], example["endings"]
    # capitalize() also makes the rest of ctx_b small ("then Tom" -> "Then tom"). Odd, but the numbers of the
    # harness have it, and to meet them is the point.
    context = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
    return tidy(context), [tidy(ending) for ending in example["endings"]]


def tidy(text):
    """The harness's clean-up of one text (its tasks/hellaswag/utils.py).

    The order matters: the two spaces that stood around a bracket meet when it goes, and only then become one.

    >>> tidy(" Boil water [title] Brew [step] Pour it. ")
    'Boil water. Brew Pour it.'
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_question(example, encode, harness=False, prefix=()):
    """A record -> token ids: of the context, a list, and of its endings, a list of four lists.

    encode: text -> ids. prefix: ids that this tokenizer puts before every text (Llama's <s>; GPT-2 has none).
    GPT-2's tokens carry the space before a word, so the ending "sets it" is the tokens of " sets it".
    """
    context, endings = question(example, harness)
    if not harness:
        return [*prefix, *encode(context)], [list(encode(" " + ending)) for ending in endings]
    # The harness gives all the space between the two to the ending, tokenises both as one string, and cuts it
    # where the context by itself would end: other tokens than above where a merge reaches over that border.
    stripped = context.rstrip()
    space = context[len(stripped):] + " "
    ids = list(encode(stripped))
    return [*prefix, *ids], [list(encode(stripped + space + ending))[len(ids):] for ending in endings]


def render_example(example, encode=None):
    """A record -> (data, tokens, mask, label), as in build-nanogpt. encode: text -> ids, by default GPT-2's.

    tokens (4, N): context and ending, one row an ending, filled up on the right with 0. mask (4, N): 1 on the
    ending's tokens. label: the row of the real ending. data: label, ctx_tokens and ending_tokens as lists.
    For a context of two tokens, 7 8, and endings of 1, 3, 2 and 1 tokens:

        tokens   7 8 1 0 0      mask   0 0 1 0 0
                 7 8 2 3 4             0 0 1 1 1
                 7 8 5 6 0             0 0 1 1 0
                 7 8 9 0 0             0 0 1 0 0

    The loss of token t is read off position t-1: against logits[:, :-1], both tokens and mask lose column 0.
    """
    import torch
    encode = encode or load_tokenizer("gpt2").encode_ordinary
    context, endings = encode_question(example, encode)
    tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)  # (4, N)
    mask = torch.zeros_like(tokens)                                                 # (4, N)
    for row, ending in enumerate(endings):
        end = len(context) + len(ending)
        tokens[row, :end] = torch.tensor(context + ending)
        mask[row, len(context):end] = 1
    data = {"label": example["label"], "ctx_tokens": context, "ending_tokens": endings}
    return data, tokens, mask, example["label"]


# ----------------------------------------------------------------------------------------------------------
# 2 rows: the context once, its endings behind it
#
# The usual way gives the model four rows of context and ending, and so computes the context four times. But a
# token's numbers depend only on what stands before it. With a context 7 8 and two endings, 1 2 3 and 4 5, one
# row of tokens does for both, if it is said who may look at whom (x) and which position each token has:
#
#                 7 8 1 2 4    position    predicts
#             7   x                0
#             8   x x              1       1 and 4, the first tokens of the endings
#             1   x x x            2       2
#             2   x x x x          3       3
#             4   x x . . x        2       5
#
# 4 neither sees 1 and 2 nor stands behind them: for all it knows, it is the third token of a text.

class Row(NamedTuple):
    """One row of a forward pass: a context, the endings that share it, and which predictions to read off."""
    tokens: list    # ids that the model reads
    position: list  # of each of these: where it would stand if its ending followed the context alone
    branch: list    # of each of these: 0 in the context, 1, 2, ... in the endings
    at: list        # of each token to score: the place in this row at which it is predicted
    target: list    # of each token to score: its id
    slot: list      # of each token to score: whose it is, 4 * question + ending


def pack(context, endings, slots):
    """A context and endings that share it -> one Row. An ending's last token is only predicted, never read.

    >>> pack([7, 8], [[1, 2, 3], [4, 5]], [0, 1])  # doctest: +NORMALIZE_WHITESPACE
    Row(tokens=[7, 8, 1, 2, 4], position=[0, 1, 2, 3, 2], branch=[0, 0, 1, 1, 2],
        at=[1, 2, 3, 1, 4], target=[1, 2, 3, 4, 5], slot=[0, 0, 0, 1, 1])
    """
    n = len(context)
    row = Row(list(context), list(range(n)), [0] * n, [], [], [])
    for branch, (ending, slot) in enumerate(zip(endings, slots), start=1):
        first, read = len(row.tokens), len(ending) - 1
        row.at.extend([n - 1, *range(first, first + read)])  # the context's end predicts the first
        row.tokens.extend(ending[:-1])
        row.position.extend(range(n, n + read))
        row.branch.extend([branch] * read)
        row.target.extend(ending)
        row.slot.extend([slot] * len(ending))
    return row


def rows_of(context, endings, slots, block_size, packed=True):
    """One question -> its Rows: one if packed and all fits into block_size positions, else one an ending.

    What doesn't fit loses its beginning. How much depends on the length of the ending, so the contexts then
    differ and can't be shared:

    >>> [row.tokens for row in rows_of([7, 8, 9], [[1, 2], [3, 4, 5]], [0, 1], block_size=4)]
    [[7, 8, 9, 1], [8, 9, 3, 4]]
    """
    if packed and context and len(context) + max(map(len, endings)) - 1 <= block_size:
        return [pack(context, endings, slots)]
    rows = []
    for ending, slot in zip(endings, slots):
        text = (context + ending)[-block_size - 1:]  # one more than fits: the last token is not read
        cut = max(1, len(text) - len(ending))        # something has to predict the first token
        rows.append(pack(text[:cut], [text[cut:]], [slot]))
    return rows


# ----------------------------------------------------------------------------------------------------------
# 3 scores: log p of every ending
#
# What there is to save, in GPT-2 (124M): a token costs 170 million operations in the blocks (two for each of
# 85 million weights) and 77 million more where it is projected to the vocabulary. On 1,000 of the questions,
# four padded rows are 198 tokens on average; packed they are 88, from which 64 predictions are read off. That
# makes 20 instead of 49 billion operations a question.

def log_p(model, rows, packed):
    """Log p (nats) of all targets of the Rows, in their order -> float32 (targets,) on the model's device.

    packed: take the hidden states, with our own positions and mask, and project to the vocabulary only where
    a token is scored. Else: the model's plain forward with all its logits, which every causal model has and
    which knows nothing of packing; for Rows of one ending each.
    """
    import torch
    device = next(model.parameters()).device
    T = max(len(row.tokens) for row in rows)

    def pad(lists, value):
        return torch.tensor([list_ + [value] * (T - len(list_)) for list_ in lists], device=device)

    # Rows are filled up on the right, where nobody looks: what stands there changes nothing.
    idx = pad([row.tokens for row in rows], 0)                                      # (B, T)
    at = torch.tensor([b * T + t for b, row in enumerate(rows) for t in row.at], device=device)  # (targets,)
    target = torch.tensor([token for row in rows for token in row.target], device=device)  # (targets,)
    if packed:
        branch = pad([row.branch for row in rows], -1)                              # (B, T)
        past = torch.ones(T, T, dtype=torch.bool, device=device).tril()             # (T, T)
        kin = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # (B, T, T)
        x, head = hidden(model, idx, pad([row.position for row in rows], 0), (past & kin)[:, None])
    else:
        out = model(idx)
        x, head = (out[0] if isinstance(out, tuple) else out.logits), torch.nn.Identity()
    x = x.flatten(0, 1)[at]                                                         # (targets, C or V)
    # 512 at a time, 0.1 GB of logits with GPT-2's vocabulary. And in float32: with the 8 bits of bfloat16 the
    # loss of a token, about 10 at first, would be rounded to a multiple of 1/16.
    return torch.cat([head(part).float().log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
                      for part, ids in zip(x.split(512), target.split(512))])       # (targets,)


def hidden(model, idx, position, mask):
    """What the model knows at each position, (B, T, C), and the layer that makes logits of it.

    position (B, T); mask (B, 1, T, T), True where a token may look. model: our GPT, or one of transformers.
    """
    import torch
    if hasattr(model, "hidden"):
        return model.hidden(idx, position, mask), model.lm_head
    if model.config._attn_implementation == "eager":
        # This one adds the mask to the attention scores: 0 where a token may look, very negative elsewhere.
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    out = model.base_model(input_ids=idx, position_ids=position, attention_mask=mask, use_cache=False)
    return out.last_hidden_state, model.get_output_embeddings()


def packing_works(model, row):
    """Does the model give a packed Row the log p that its endings have by themselves? Not every architecture.

    Some take no positions from outside (ALiBi), some have no attention to mask (Mamba), some do something to
    their logits after the projection (Gemma 2). One question tells: such errors are far above rounding.
    """
    context = row.tokens[:row.branch.count(0)]
    endings = [[t for t, s in zip(row.target, row.slot) if s == slot] for slot in dict.fromkeys(row.slot)]
    alone = [log_p(model, [pack(context, [ending], [0])], False) for ending in endings]
    try:
        together = log_p(model, [row], True).split([len(ending) for ending in endings])
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    error = sum((a - b).abs().sum().item() for a, b in zip(alone, together)) / len(row.target)
    return error < (0.01 if next(model.parameters()).dtype.itemsize == 4 else 0.1)


def score(model, examples, tokenizer=None, *, dtype=None, max_tokens=None, harness=False, progress=False,
          packed=None):
    """Questions -> the sum of log p (nats) of each ending, and its number of tokens: float64 (n, 4), (n, 4).

    Arguments as in evaluate. packed: True or False, to decide what is otherwise tried out on one question.
    """
    import torch
    from tqdm import tqdm
    tokenizer = tokenizer or load_tokenizer("gpt2")
    device = next(model.parameters()).device
    max_tokens = max_tokens or (512 if device.type == "cpu" else 16384)
    block_size = context_length(model)
    prefix = getattr(tokenizer, "prefix", ())
    questions = [encode_question(example, tokenizer.encode_ordinary, harness, prefix) for example in examples]
    check_vocabulary(model, questions)

    def all_rows(packed):
        rows = [row for i, (context, endings) in enumerate(questions)
                for row in rows_of(context, endings, range(4 * i, 4 * i + 4), block_size, packed)]
        # Rows of about the same length go through together and hardly need filling up. The longest go first:
        # if the memory is too small, that shows at once.
        return sorted(rows, key=lambda row: len(row.tokens), reverse=True)

    total = torch.zeros(4 * len(questions), dtype=torch.float64)                    # (4n,)
    count = torch.zeros_like(total)                                                 # (4n,)
    with evaluating(model), torch.no_grad():
        rows = all_rows(packed is not False)
        if packed is None and rows:
            fullest = max(rows, key=lambda row: max(row.branch))
            packed = packing_works(model, fullest)
            rows = rows if packed else all_rows(False)
        # One autocast region around all of it: autocast then casts the weights once and not for every batch.
        with torch.autocast(device.type, dtype=dtype, enabled=dtype not in (None, torch.float32)), \
                tqdm(total=len(total), unit="ending", desc="HellaSwag", disable=not progress) as bar:
            for batch, values in batches(model, rows, packed, max_tokens):
                slot = torch.tensor([s for row in batch for s in row.slot])
                total.index_add_(0, slot, values.double().cpu())
                count.index_add_(0, slot, torch.ones(len(slot), dtype=torch.float64))
                bar.update(len(slot.unique()))
    return total.view(-1, 4), count.view(-1, 4)


def batches(model, rows, packed, max_tokens):
    """Yields (some rows, log p of their targets) until all are done; fewer at a time if memory is short."""
    import torch
    start = 0
    while start < len(rows):
        longest = len(rows[start].tokens)
        stop = min(len(rows), start + max(1, max_tokens // longest))
        try:
            values = log_p(model, rows[start:stop], packed)
        except torch.OutOfMemoryError:
            if stop - start == 1:
                raise UserError("the device's memory can't hold one question of HellaSwag beside the model: "
                                "use --dtype bfloat16, a smaller model, or --device cpu") from None
            max_tokens = (stop - start) // 2 * longest
            continue
        yield rows[start:stop], values
        start = stop


def context_length(model):
    """How many positions the model has; without a limit where its configuration names none."""
    for name in ("block_size", "max_position_embeddings"):
        if getattr(model.config, name, None):
            return getattr(model.config, name)
    return sys.maxsize


def check_vocabulary(model, questions):
    """UserError if the tokenizer has ids that the model lacks; a GPU would only say "device-side assert"."""
    most = max((max(map(max, [context, *endings])) for context, endings in questions), default=0)
    if most >= model.config.vocab_size:
        raise UserError(f"the tokenizer has a token {most}, the model knows {model.config.vocab_size} ids: "
                        "use the tokenizer that the model was trained with")


@contextlib.contextmanager
def evaluating(model):
    """Dropout is off inside; afterwards every part of the model is in the mode that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ----------------------------------------------------------------------------------------------------------
# 4 evaluate
#
# How sure is the number? The share p of right answers in n questions scatters by sqrt(p (1 - p) / n): 0.0046
# for GPT-2 124M's 0.2955 on all 10,042 questions, 0.046 on a hundred. A hundred show that all of it runs, and
# hardly more: they can't tell this model from guessing. Two runs that differ by 0.005 may be equally good.

def evaluate(model, examples, tokenizer=None, *, rank=0, world_size=1, all_reduce=None, dtype=None,
             max_tokens=None, harness=False, progress=False):
    """The three accuracies of a model, over all processes and the same on each, as a dict: acc, acc_norm and
    acc_norm_chars, each with its ..._stderr (the standard error of a mean of n), n, and examples_per_second.

    model: our GPT or a causal model of transformers, on its device; it is left in the mode it was in.
    examples: dicts, as from iterate_examples. tokenizer: has encode_ordinary(text) -> ids; None: GPT-2's.
    rank, world_size: this process scores examples rank, rank + world_size, ..., which may be none.
    all_reduce: adds up a float64 tensor over the processes, in place or returned; all of them have to call.
    dtype: torch.bfloat16 or torch.float16 computes in autocast; None: in the dtype of the weights.
    max_tokens: of one forward pass, filling included. None: 512 on a CPU (more is slower there), else 16384.
    harness: see question. Contexts that are too long for the model lose their beginning.
    Raises UserError if there are no examples, or if the tokenizer has ids that the model lacks.
    """
    import torch
    start = time.perf_counter()
    examples = list(examples)
    if not examples:
        raise UserError("there are no HellaSwag questions to score")
    mine = examples[rank::world_size]
    total, count = score(model, mine, tokenizer, dtype=dtype, max_tokens=max_tokens, harness=harness,
                         progress=progress)
    label = torch.tensor([example["label"] for example in mine], dtype=torch.long)  # (n,)
    right = [(pick == label).sum().item() for pick in picks(total, count, mine, harness)]
    # Processes differ in their number of questions by one, so what they add up are counts: a mean of their
    # accuracies would be off.
    device = next(model.parameters()).device
    sums = torch.tensor([*right, len(mine)], dtype=torch.float64,
                        device=device if device.type == "cuda" else "cpu")          # (4,)
    if all_reduce is not None:
        returned = all_reduce(sums)
        sums = sums if returned is None else returned
    *right, n = sums.tolist()
    results = {"n": int(n), "examples_per_second": n / (time.perf_counter() - start)}
    for rule, r in zip(RULES, right):
        results[rule] = r / n
        # n - 1, because the spread is estimated from the same n answers; the harness does so too.
        results[rule + "_stderr"] = math.sqrt(r / n * (1 - r / n) / (n - 1)) if n > 1 else math.nan
    return results


def picks(total, count, examples, harness=False):
    """The number of the ending that each of the RULES picks -> a list of three tensors (n,); as from score.

    >>> import torch
    >>> total, count = torch.tensor([[-2.0, -4.5, -9.0, -9.0]]), torch.tensor([[1, 3, 1, 1]])
    >>> [pick.item() for pick in picks(total, count, [{"ctx": "", "endings": ["No", "He left", "a", "b"]}])]
    [0, 1, 1]
    """
    import torch
    chars = [[len(ending) for ending in question(example, harness)[1]] for example in examples]
    chars = torch.tensor(chars, dtype=torch.float64).view(-1, 4)                    # (n, 4)
    return [(total / unit).argmax(dim=1) for unit in (torch.ones_like(count), count, chars)]


# ----------------------------------------------------------------------------------------------------------
# 5 plumbing: the file
#
# A score means something next to the scores of others, so the questions have to be the same: a download is
# checked before it gets its name. A file that the user names is taken as it is.

def iterate_examples(split="val", path=None):
    """Yields the records of a split as dicts. path: a file, or a folder that holds hellaswag_{split}.jsonl.

    Without path: HELLASWAG_DIR, or else data/hellaswag/, to where it is downloaded the first time. A record
    must have ctx, endings (four) and label (0 to 3), and for the harness's rules activity_label, ctx_a and
    ctx_b. Raises UserError, with the file and the line, for one that is not so.
    """
    path = find_data(path, split)
    n = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))  # some editors put a mark before the first line
            except ValueError:  # neither JSON nor, perhaps, UTF-8
                raise UserError(f"{path}, line {number}: this is not JSON") from None
            fault = fault_of(record)
            if fault:
                raise UserError(f"{path}, line {number}: {fault}")
            n += 1
            yield {**record, "label": int(record["label"])}
    if n == 0:
        raise UserError(f"{path} holds no records")


def fault_of(record):
    """What is wrong with a record, in a few words; None if nothing is.

    >>> fault_of({"ctx": "She", "ctx_a": "She", "ctx_b": "", "activity_label": "Tea", "endings": ["runs"]})
    'endings: 1, not 4'
    """
    if not isinstance(record, dict):
        return "not a record of names and values"
    texts = ("ctx", "ctx_a", "ctx_b", "activity_label")
    for name in texts:
        if not isinstance(record.get(name), str):
            return f"no text under {name!r}"
    if not record["ctx"].strip():
        return "ctx is empty"
    endings = record.get("endings")
    if not isinstance(endings, list):
        return "no list under 'endings'"
    if len(endings) != 4:
        return f"endings: {len(endings)}, not 4"
    if not all(isinstance(ending, str) and ending.strip() for ending in endings):
        return "an ending is empty or not a text"
    if str(record.get("label")) not in ("0", "1", "2", "3"):  # some copies of the data have it as a text
        return f"label: {record.get('label')!r}, not 0, 1, 2 or 3"
    return None


def find_data(path=None, split="val"):
    """The Path of hellaswag_{split}.jsonl: the given file or folder's, else HELLASWAG_DIR's, else downloaded.

    Raises UserError at once where it is not to be had, so that a run fails at its start, not an hour later.
    """
    if split not in FILES:
        raise UserError(f"HellaSwag has no split {split!r} with labels: use {' or '.join(FILES)}")
    named = path or os.environ.get("HELLASWAG_DIR")
    if named:
        file = Path(named, f"hellaswag_{split}.jsonl") if Path(named).is_dir() else Path(named)
        if not file.is_file():
            source = "--data" if path else "HELLASWAG_DIR"
            raise UserError(f"{source} says {named}, but there is no file {file} with HellaSwag's records")
        return file
    file = Path("data", "hellaswag", f"hellaswag_{split}.jsonl")
    if not file.is_file() or fault_of_file(file.read_bytes(), split):
        download(file, split)
    return file


def fault_of_file(content, split):
    """What is wrong with the bytes of a published file, in a few words; None if nothing is.

    Half a file would load without complaint and give a number, only not the number of everyone else.
    """
    lines, sha256 = FILES[split]
    found = len(content.splitlines())
    if found != lines:
        return f"{found:,} lines of {lines:,}"
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        return "its sha256 is not that of the published file"
    return None


def download(file, split="val", url=URL, tries=3, wait=1.0):
    """Fetches the published file (12 MB for val) -> its Path: complete, or not there at all and a UserError.

    wait: seconds before the second try, doubled before each further one.
    """
    file = Path(file)
    for attempt in range(tries):
        time.sleep(wait * 2 ** (attempt - 1) if attempt else 0)
        try:
            with urllib.request.urlopen(url.format(split=split), timeout=30) as response:
                content = response.read()  # an error page never gets here: its status raises HTTPError
            fault = fault_of_file(content, split)
        except (OSError, http.client.HTTPException) as error:  # no network, no such page, broken off halfway
            fault = str(error) or type(error).__name__
        if not fault:
            break
    else:
        raise UserError(f"can't download HellaSwag ({fault}). Name a copy of it, with --data FILE or in the "
                        "environment variable HELLASWAG_DIR; training does without at --hellaswag_every 0")
    part = file.with_name(f"{file.name}.{os.getpid()}.part")  # processes that start together write one each
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"can't write {file}: {error.strerror}") from None
    return file


# ----------------------------------------------------------------------------------------------------------
# 5 plumbing: models from anywhere, the command line

class HubTokenizer:
    """A tokenizer of transformers, with what evaluate asks for: encode_ordinary and prefix."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        bare, full = self.encode_ordinary("a"), tokenizer.encode("a")
        self.prefix = full[:len(full) - len(bare)] if full[-len(bare):] == bare else []  # Llama's <s>

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)


def load(source, device, dtype):
    """What --model names -> (the model on the device, its tokenizer, the dtype for evaluate)."""
    from train_gpt2 import load_model
    if is_gpt2(source):
        model, tokenizer = load_model(source)
        return model.to(device), tokenizer, dtype
    if "/" not in source and not os.path.exists(source):  # a slip, most likely; the hub would take a minute
        raise UserError(f"--model {source}: no such file or folder (and models on the hub are OWNER/NAME)")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(source))
        # With weights in the dtype of the computation. Float32 and autocast would be a little more exact, but
        # this is where the models of billions of parameters arrive.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except Exception as error:  # no network, no such name, a missing file or package, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {source} is nothing that transformers can load: {reason}") from error
    return model.to(device), tokenizer, None


def is_gpt2(source):
    """Is it for train_gpt2.load_model (GPT-2 in any form)? All else is left to transformers."""
    from train_gpt2 import PRESETS, read_hf_config
    try:
        config = json.loads(Path(source, "config.json").read_text())
    except (OSError, ValueError):  # a checkpoint, a folder without config.json, or nothing that is there
        return source in PRESETS or os.path.exists(source)
    if "model_type" not in config:  # then it's the configuration of a training run
        return True
    try:
        return bool(read_hf_config(source))
    except UserError:  # another architecture, or a GPT-2 with a twist
        return False


def show(examples, total, count, harness=False):
    """Prints questions and endings with their mean loss (nats a token); > is the pick, * the real ending."""
    pick_of = picks(total, count, examples, harness)[list(RULES).index("acc_norm")].tolist()
    for i, (example, losses) in enumerate(zip(examples, (-total / count).tolist())):
        context, endings = question(example, harness)
        pick, label = pick_of[i], example["label"]
        print(f"\n{i + 1}. {context}")
        for j, (ending, loss) in enumerate(zip(endings, losses)):
            print(f"  {'>' if j == pick else ' '}{'*' if j == label else ' '} {loss:6.3f}  {ending}")
        print(f"     {'right' if pick == label else 'wrong'}: it picked {pick}, the real ending is {label}")


def parse_args(argv):
    parser = Parser("hellaswag.py", description="Scores a language model on HellaSwag.")
    add = parser.add_argument
    add("--model", required=True, help="gpt2 (-medium, -large, -xl), a checkpoint, a log folder, a Hugging "
                                       "Face folder or name")
    add("--data", help="hellaswag_val.jsonl or its folder; default HELLASWAG_DIR, else it's downloaded")
    add("--limit", type=int, help="score the first so many questions only")
    add("--show", type=int, default=0, metavar="N", help="print the first N questions and the picks")
    add("--harness", action="store_true", help="the text rules of lm-evaluation-harness")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: the best there is")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of activations")
    add("--max_tokens", type=int, help="tokens of a forward pass, by default 512 on a CPU, else 16384")
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("show", 0), ("max_tokens", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    return args


def main(argv=None):
    """Scores the model that the flags name, prints and returns what evaluate found. Raises UserError."""
    args = parse_args(argv)
    # The questions first: a fault in the file should show before a large model is loaded.
    examples = list(itertools.islice(iterate_examples(path=args.data), args.limit))
    from train_gpt2 import pick_device, pick_dtype
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    model, tokenizer, autocast = load(args.model, device, dtype)
    if args.show:
        some = examples[:args.show]
        show(some, *score(model, some, tokenizer, dtype=autocast, harness=args.harness), args.harness)
        print()
    results = evaluate(model, examples, tokenizer, dtype=autocast, max_tokens=args.max_tokens,
                       harness=args.harness, progress=True)
    print(f"HellaSwag val, {results['n']:,} questions{', by the rules of the harness' * args.harness}: "
          f"{args.model}, {str(dtype)[6:]} on {device}, {results['examples_per_second']:.1f} examples/s")
    for rule, meaning in RULES.items():
        print(f"  {rule:14s}  {results[rule]:.4f} +- {results[rule + '_stderr']:.4f}   by {meaning}")
    return results


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"hellaswag.py: {error}", file=sys.stderr)
        sys.exit(2)
