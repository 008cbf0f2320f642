"""
HellaSwag: can a language model tell which of four endings is the sensible one? Guessing scores 0.25.

    python hellaswag.py --model gpt2                  OpenAI's 124M: the baseline in the plots of such runs
    python hellaswag.py --model log                   the newest checkpoint of a training run
    python hellaswag.py --model FOLDER --limit 100    a GPT-2 in Hugging Face's layout, on 100 questions
    python hellaswag.py --model gpt2 --show 10        print questions, the losses of the endings, the picks
    python hellaswag.py --model gpt2 --harness        with the text rules of EleutherAI's lm-evaluation-harness

A question is the beginning of a video caption or of a how-to article, and four endings: the real one, and three that a
machine wrote and that fooled other machines. A small model could not follow an instruction to choose. So it reads each
ending after the context, and the ending that it finds likeliest is its answer:

    context     The baker takes the tray out of the oven. She          label 1
    ending 0    parks the tray under a bridge.                         log p of the tokens of " parks the ..."
    ending 1    sets it on the counter to cool.                        log p of the tokens of " sets it ..."

"Likeliest" can mean three things, and published numbers differ by which one was meant:

    acc               the highest sum of log p: favors short endings
    acc_norm          the highest mean per token: build-nanogpt's number, the one in the plots of such runs
    acc_norm_chars    the highest sum per character of the ending: what the harness calls acc_norm

The data: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?" (2019), arXiv:1905.07830.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fineweb import Parser, UserError, insist, load_tokenizer, one_line, write_file

HUB = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet")  # the author's copy on the Hugging Face hub
SHA256 = "148f8efb84d40214a08c6a1dd0702f980d326148811411b4b5316e397b9b2fc6"         # its content_sha256
DEFAULT = Path("data", "hellaswag", "hellaswag_val.jsonl")                          # where we keep it
RULES = ("acc", "acc_norm", "acc_norm_chars")


# ---------------------------------------------------------------------------------------------------- 1 the plain way
# These two functions are all there is to the score. The rest of the file finds the same numbers sooner.

def render_example(example, encode=None):
    """A record -> (data, tokens, mask, label), as in build-nanogpt. encode: text -> ids, GPT-2's by default. One row
    for each ending, here for a context of two tokens, 7 8, and endings of 1, 3, 2 and 1 tokens:

        tokens   7 8 1 0 0      mask   0 0 1 0 0
                 7 8 2 3 4             0 0 1 1 1
                 7 8 5 6 0             0 0 1 1 0
                 7 8 9 0 0             0 0 1 0 0
    """
    context, endings = encode_question(example, encode or load_tokenizer("gpt2").encode_ordinary)
    tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)  # (4, N)
    mask = torch.zeros_like(tokens)                                                 # (4, N)
    for row, ending in enumerate(endings):
        end = len(context) + len(ending)
        tokens[row, :end] = torch.tensor(context + ending)
        mask[row, len(context):end] = 1
    data = {"label": example["label"], "ctx_tokens": context, "ending_tokens": endings}
    return data, tokens, mask, example["label"]


@torch.no_grad()
def plain_score(model, example, encode=None):
    """One question -> the sum of log p (nats) of each ending, and its number of tokens: (4,), (4,)."""
    _, tokens, mask, _ = render_example(example, encode)                            # (4, N)
    tokens, mask = (t.to(model.lm_head.weight.device) for t in (tokens, mask))      # (4, N)
    logits, _ = model(tokens)                                                       # (4, N, V)
    # Position t predicts token t + 1: the logits lose their last column, tokens and mask their first.
    log_p = logits[:, :-1, :model.n_vocab].log_softmax(dim=2)                       # (4, N-1, n_vocab)
    log_p = log_p.gather(2, tokens[:, 1:, None])[..., 0]                            # (4, N-1)
    return (log_p * mask[:, 1:]).sum(dim=1), mask.sum(dim=1)


# -------------------------------------------------------------------------------------------------------- 2 questions

def question(example, harness=False):
    """A record -> its context and its four endings, as text. harness: by the rules of lm-evaluation-harness, which put
    the topic in front and tidy up what the scraping of WikiHow left in the text:

    >>> question({"activity_label": "Tea", "ctx_a": "[header] How to brew [title] Boil water.",
    ...           "ctx_b": "then pour it", "endings": ["on  the leaves. [substeps] Wait."]}, harness=True)
    ('Tea: How to brew. Boil water. Then pour it', ['on the leaves. Wait.'])
    """
    if not harness:
        return example["ctx"], example["endings"]
    # capitalize() also makes the rest of ctx_b small ("then Tom" -> "Then tom"), but the point is to match the harness.
    context = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
    return tidy(context), [tidy(ending) for ending in example["endings"]]


def tidy(text):
    """The harness's clean-up of a text. The spaces around a bracket meet when it goes, and only then become one."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_question(example, encode, harness=False):
    """A record -> token ids: of the context, a list, and of its endings, a list of four lists. GPT-2's tokens carry the
    space before a word, so the ending "sets it" is the tokens of " sets it"."""
    context, endings = question(example, harness)
    if not harness:
        return list(encode(context)), [list(encode(" " + ending)) for ending in endings]
    # The harness moves all space at the context's end to the ending, tokenizes both as one string, and cuts where the
    # context alone would end. Where a merge reaches across the cut, the tokens differ from ours.
    stripped = context.rstrip()
    ids, space = list(encode(stripped)), context[len(stripped):] + " "
    return ids, [list(encode(stripped + space + ending))[len(ids):] for ending in endings]


# ---------------------------------------------------------------------------------------------------------- 3 packing
# The plain way computes the context four times. But what a model makes of a token depends only on what stands before
# it. So one row will do for a context 7 8 with two endings, 1 2 3 and 4 5, if we say which tokens each may look at (x)
# and which position it has. As far as 4 can tell, it is the third token of a text that begins with 7 8:
#
#                 7 8 1 2 4    position    predicts
#             7   x                0
#             8   x x              1       1 and 4, the first tokens of the endings
#             1   x x x            2       2
#             2   x x x x          3       3
#             4   x x . . x        2       5
#
# What this saves with GPT-2 (124M): a token costs 170 million operations in the blocks (two for each of 85 million
# weights) and 77 million more where it is projected to the vocabulary. On 1,000 of the questions, four padded rows are
# 198 tokens on average; packed they are 88, and 64 predictions are read off them: 20 billion operations instead of 49.

class Row(NamedTuple):
    """One row of a forward pass: a context, endings that share it, and which predictions to read off."""
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


def rows_of(context, endings, slots, block_size):
    """One question -> its Rows, none longer than block_size: one if all of it fits, else one for each ending. A context
    that is too long loses its beginning. How much depends on the ending, so it can't be shared:

    >>> [row.tokens for row in rows_of([7, 8, 9], [[1, 2], [3, 4, 5]], [0, 1], block_size=4)]
    [[7, 8, 9, 1], [8, 9, 3, 4]]
    """
    row = pack(context, endings, slots)
    if len(row.tokens) <= block_size:
        return [row]
    rows = []
    for ending, slot in zip(endings, slots):
        text = (context + ending)[-block_size - 1:]  # one more than fits: the last token is not read
        cut = max(1, len(text) - len(ending))        # something has to predict the first token
        rows.append(pack(text[:cut], [text[cut:]], [slot]))
    return rows


class Packed(TorchFunctionMode):
    """While this is active, the model reads packed rows: with our positions (B, T), and with our mask (B, 1, T, T),
    True where a token may look, in place of is_causal. PyTorch shows us every function that is called on a tensor, and
    we change the arguments of two. So the model's own code knows nothing of packing. For uncompiled models only."""

    def __init__(self, model, position, mask):
        super().__init__()
        self.wpe, self.position, self.mask = model.transformer.wpe.weight, position, mask
        self.seen = [0, 0]  # positions and attentions that were replaced

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.embedding and args[1] is self.wpe:
            self.seen[0] += 1
            args = (self.position, *args[1:])
        elif func is F.scaled_dot_product_attention and kwargs.get("is_causal") and kwargs.get("attn_mask") is None:
            self.seen[1] += 1
            kwargs.update(attn_mask=self.mask, is_causal=False)
        return func(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------- 4 scores

def log_p(model, rows):
    """Log p (nats) of all targets of the Rows, in their order -> float32 (targets,), on the model's device."""
    device = next(model.parameters()).device
    T = max(len(row.tokens) for row in rows)

    def pad(lists, value):
        return torch.tensor([list_ + [value] * (T - len(list_)) for list_ in lists], device=device)

    # Rows are filled up at the end, where no other token looks: what stands there changes nothing.
    idx = pad([row.tokens for row in rows], 0)                                      # (B, T)
    position = pad([row.position for row in rows], 0)                               # (B, T)
    branch = pad([row.branch for row in rows], -1)                                  # (B, T)
    past = torch.ones(T, T, dtype=torch.bool, device=device).tril()                 # (T, T)
    kin = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])    # (B, T, T)
    with Packed(model, position, (past & kin)[:, None]) as packed:
        x = model.hidden(idx)                                                       # (B, T, C)
    # A model with positions or attention of another kind would otherwise get a wrong score and no error.
    assert packed.seen == [1, model.config.n_layer], "this model can't read packed rows: score it with plain_score"
    at = torch.tensor([b * T + t for b, row in enumerate(rows) for t in row.at], device=device)  # (targets,)
    target = torch.tensor([token for row in rows for token in row.target], device=device)  # (targets,)
    # 512 at a time, 0.1 GB of logits with GPT-2's vocabulary. And in float32: with the 8 bits of bfloat16 the loss of a
    # token, about 10 at first, would be rounded to a multiple of 1/16.
    losses = []
    for part, ids in zip(x.flatten(0, 1)[at].split(512), target.split(512)):
        logits = model.lm_head(part).float()                                        # (512, V)
        logits[:, model.n_vocab:] = -math.inf  # ids that only pad the vocabulary; to cut them off would copy the rest
        losses.append(F.cross_entropy(logits, ids, reduction="none"))               # (512,)
    return -torch.cat(losses)                                                       # (targets,)


def score(model, examples, tokenizer=None, *, harness=False, dtype=None, max_tokens=None, progress=False):
    """Questions -> the sum of log p (nats) of each ending, and its number of tokens: float64 (n, 4), (n, 4).

    model: our GPT, uncompiled (raw_model in train_gpt2.py), on its device. tokenizer: by default GPT-2's.
    dtype: torch.bfloat16 or torch.float16 computes in autocast. max_tokens: of one forward pass, filling included.
    """
    from tqdm import tqdm
    tokenizer = tokenizer or load_tokenizer("gpt2")
    # Asked here, because a GPU would only say "device-side assert".
    insist(tokenizer.n_vocab <= model.n_vocab, f"the tokenizer has {tokenizer.n_vocab} ids, the model knows "
           f"{model.n_vocab}: use the tokenizer that the model was trained with")
    device = next(model.parameters()).device
    max_tokens = max_tokens or (256 if device.type == "cpu" else 16384)  # more is slower on a CPU
    rows = [row for i, example in enumerate(examples)
            for row in rows_of(*encode_question(example, tokenizer.encode_ordinary, harness),
                               range(4 * i, 4 * i + 4), model.config.block_size)]
    # Rows of similar length go through together and need little filling; the longest first, as they need most memory.
    rows.sort(key=lambda row: len(row.tokens), reverse=True)
    found = [torch.empty(0, device=device)]
    # One autocast region around all of it: autocast then casts the weights once and not for every batch.
    with evaluating(model), tqdm(total=len(rows), unit="row", desc="HellaSwag", disable=not progress) as bar, \
            torch.autocast(device.type, dtype=dtype, enabled=dtype not in (None, torch.float32)):
        start = 0
        while start < len(rows):
            batch = rows[start:start + max(1, max_tokens // len(rows[start].tokens))]
            found.append(log_p(model, batch))  # left on the device: to read it would make a GPU wait for Python
            start += len(batch)
            bar.update(len(batch))
    slot = torch.tensor([s for row in rows for s in row.slot], dtype=torch.long)    # (targets,)
    found = torch.cat(found).cpu().double()  # in this order: MPS has no float64    # (targets,)
    total = torch.zeros(4 * len(examples), dtype=torch.float64).index_add_(0, slot, found)  # (4n,)
    count = slot.bincount(minlength=len(total)).double()                            # (4n,)
    return total.view(-1, 4), count.view(-1, 4)


@contextlib.contextmanager
def evaluating(model):
    """Inside, dropout is off and no gradient is kept; afterwards each part of the model is in its old mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


# --------------------------------------------------------------------------------------------------------- 5 evaluate
# How sure is the number? The share p of right answers in n questions scatters by sqrt(p (1 - p) / n): 0.0046 for GPT-2
# 124M's 0.2955 on all 10,042 questions, 0.046 on a hundred. A hundred show that everything runs, but they can't tell
# this model from guessing. Two runs that differ by 0.005 may be equally good.

def evaluate(model, examples, tokenizer=None, *, rank=0, world_size=1, all_reduce=None, harness=False, **how):
    """The three accuracies of a model, over all processes and the same on each, as a dict: acc, acc_norm and
    acc_norm_chars, each with its ..._stderr (the standard error of a mean of n), n, and examples_per_second.

    rank, world_size: this process scores examples rank, rank + world_size, ..., which may be none.
    all_reduce: returns the sum of a tensor over the processes, all of which have to call. The rest is as in score.
    """
    start = time.perf_counter()
    examples = list(examples)
    insist(examples, "there are no HellaSwag questions to score")
    mine = examples[rank::world_size]
    total, count = score(model, mine, tokenizer, harness=harness, **how)
    label = torch.tensor([example["label"] for example in mine], dtype=torch.long)  # (n,)
    right = [(pick == label).sum().item() for pick in picks(total, count, mine, harness)]
    # Processes differ in their number of questions, so they add up counts: whole numbers, which float32 holds exactly.
    sums = torch.tensor([*right, len(mine)], dtype=torch.float32, device=next(model.parameters()).device)  # (4,)
    *right, n = (all_reduce(sums) if all_reduce else sums).tolist()
    results = {"n": int(n), "examples_per_second": n / (time.perf_counter() - start)}
    for rule, r in zip(RULES, right):
        results[rule] = r / n
        # n - 1, because the spread is estimated from the same n answers; the harness does so too.
        results[rule + "_stderr"] = math.sqrt(r / n * (1 - r / n) / (n - 1)) if n > 1 else math.nan
    return results


def picks(total, count, examples, harness=False):
    """What score found -> the number of the ending that each of the RULES picks: a list of three tensors (n,)."""
    chars = [[len(ending) for ending in question(example, harness)[1]] for example in examples]
    chars = torch.tensor(chars, dtype=torch.float64).view(-1, 4)                    # (n, 4)
    return [(total / unit).argmax(dim=1) for unit in (torch.ones_like(count), count, chars)]


def describe(results):
    """What evaluate found -> the three accuracies in one line: acc 0.2859 +- 0.0045, acc_norm ..."""
    return ", ".join(f"{rule} {results[rule]:.4f} +- {results[rule + '_stderr']:.4f}" for rule in RULES)


# --------------------------------------------------------------------------------------------------------- 6 the file
# A score means something next to the scores of others, so the questions have to be the same: our own copy is checked
# each time it is read. A file that the user names is taken as it is.

def iterate_examples(split="val", path=None):
    """Yields the 10,042 records of the validation set as dicts; path: as in find_data. A record has ctx, endings (four)
    and label (0 to 3), and for the harness activity_label, ctx_a and ctx_b. UserError with file and line otherwise."""
    assert split == "val", "only the validation set is scored: the test set's labels are secret"
    file, records = find_data(path), []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                records.append(checked(json.loads(line.decode("utf-8-sig"))))  # some editors put a mark first
            except (ValueError, KeyError, TypeError):  # no JSON, perhaps no UTF-8, or not a record of a question
                raise UserError(f"{file}, line {number}: not a question. It takes ctx, ctx_a, ctx_b and "
                                "activity_label as text, four endings, and a label from 0 to 3") from None
    insist(file != DEFAULT or content_sha256(records) == SHA256,
           f"{file} doesn't hold the 10,042 published questions: delete it, and it is fetched again")
    yield from records


def checked(record):
    """A record, with its label as a number (the hub has a text); ValueError, KeyError or TypeError if it isn't one."""
    filled, rest = [record["ctx"]] + record["endings"], [record[name] for name in ("ctx_a", "ctx_b", "activity_label")]
    if len(filled) != 5 or not all(map(str.strip, filled)) or not all(isinstance(text, str) for text in rest):
        raise ValueError
    return {**record, "label": ("0", "1", "2", "3").index(str(record["label"]))}


def content_sha256(records):
    """A hash of what is scored (without --harness): one for the authors' .jsonl, the hub's parquet and our copy."""
    lines = (json.dumps([record["ctx"], record["endings"], int(record["label"])]) + "\n" for record in records)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_data(path=None):
    """The file with the questions: path or else HELLASWAG_DIR, a file or the folder of hellaswag_val.jsonl; or else
    data/hellaswag/hellaswag_val.jsonl, which is fetched the first time. UserError if it can't be had."""
    if named := path or os.environ.get("HELLASWAG_DIR"):
        file = Path(named, DEFAULT.name) if Path(named).is_dir() else Path(named)
        insist(file.is_file(), f"{'--data' if path else 'HELLASWAG_DIR'} says {named}: there is no file {file}")
        return file
    if not DEFAULT.is_file():
        download(DEFAULT)
    return DEFAULT


def download(file):
    """Writes the hub's validation set into a file, as its authors published it: one JSON record a line."""
    try:
        import pyarrow.parquet
        from huggingface_hub import HfApi, hf_hub_download
        # This asks the hub once. Without a network, hf_hub_download by itself repeats its question for 23 s.
        HfApi().dataset_info(HUB[0], timeout=10)
        table = pyarrow.parquet.read_table(hf_hub_download(*HUB, repo_type="dataset"))
        records = [checked(record) for record in table.to_pylist()]
        insist(content_sha256(records) == SHA256, "what it has are other questions")
    except Exception as error:  # no network, no such data set, a broken file: a dozen classes of error
        raise UserError(f"HellaSwag can't be fetched from the Hugging Face hub ({one_line(error)}): bring {file} from "
                        "a machine that has it, name it in HELLASWAG_DIR, or train with --hellaswag_every 0") from error
    write_file(file, lambda out: out.writelines(json.dumps(record).encode() + b"\n" for record in records))


# ------------------------------------------------------------------------------------------------- 7 the command line

def show(examples, total, count, harness=False):
    """Prints questions and endings with their mean loss (nats a token); > is acc_norm's pick, * the real ending."""
    for i, (example, losses) in enumerate(zip(examples, (-total / count).tolist()), start=1):
        context, endings = question(example, harness)
        print(f"\n{i}. {context}")
        for j, (ending, loss) in enumerate(zip(endings, losses)):
            mark = (">" if loss == min(losses) else " ") + ("*" if j == example["label"] else " ")
            print(f"  {mark} {loss:6.3f}  {ending}")


def parse_args(argv):
    parser = Parser("hellaswag.py", description="Scores a GPT-2 on HellaSwag, by log p of the endings: acc takes the "
                    "highest sum, acc_norm the highest mean per token, acc_norm_chars per character.")
    add = parser.add_argument
    add("--model", required=True, help="gpt2 (-medium, -large, -xl), a checkpoint, a log or Hugging Face folder")
    add("--data", help="hellaswag_val.jsonl or its folder; default HELLASWAG_DIR, else it's downloaded")
    add("--limit", type=int, help="score the first so many questions only")
    add("--show", type=int, default=0, metavar="N", help="print the first N questions and the picks")
    add("--harness", action="store_true", help="the text rules of lm-evaluation-harness")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: the best there is")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of activations")
    add("--max_tokens", type=int, help="tokens of a forward pass, by default 256 on a CPU, else 16384")
    args = parser.parse_args(argv)
    insist(all(n is None or n > 0 for n in (args.limit, args.max_tokens)) and args.show >= 0,
           "--limit and --max_tokens must be at least 1, --show at least 0")
    return args


def main(argv=None):
    """Scores the model that the flags name, prints and returns what evaluate found. Raises UserError."""
    args = parse_args(argv)
    # The questions first: a fault in the file should show before a large model is loaded.
    examples = list(iterate_examples(path=args.data))[:args.limit]
    from train_gpt2 import load_model, pick_device, pick_dtype
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer = load_model(args.model)
    model = model.to(device)
    how = dict(dtype=dtype, max_tokens=args.max_tokens, harness=args.harness)
    if some := examples[:args.show]:
        show(some, *score(model, some, tokenizer, **how), args.harness)
    results = evaluate(model, examples, tokenizer, progress=True, **how)
    print(f"HellaSwag val, {results['n']:,} questions{', by the rules of the harness' * args.harness}: "
          f"{args.model}, {str(dtype)[6:]} on {device}, {results['examples_per_second']:.1f} examples/s\n"
          f"  {describe(results)}")
    return results


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # some questions have characters that some terminals lack
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"hellaswag.py: {error}", file=sys.stderr)
        sys.exit(2)
