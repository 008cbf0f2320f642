"""train_gpt2.py as a text: its comments are true, its map leads somewhere, and it does nothing until asked.

Comments rot, since nothing runs them. Here many do run: a trailing `# (B, T, C)` is compared with the tensor
of its line, a number in a sentence is worked out again, an example in a docstring is tried, a comment after
a setting must be its --help.
"""
import ast
import contextlib
import doctest
import io
import json
import math
import re
import shlex
import subprocess
import sys
import threading
import tokenize
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT
from helpers import TINY, FakeWorld, Letters, random_ids, tiny_model, write_shards
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

FILE = ROOT / "train_gpt2.py"
SOURCE = FILE.read_text()
LINES, TREE = SOURCE.splitlines(), ast.parse(SOURCE)
COMMENTS = [t for t in tokenize.generate_tokens(io.StringIO(SOURCE).readline) if t.type == tokenize.COMMENT]


# ---- the form of the text

def test_nothing_but_definitions_at_module_level():
    for node in TREE.body[1:-1]:
        assert isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign))
        if isinstance(node, ast.Assign):  # a table of plain values; `dict(...)` is the one call in it
            calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
            assert ast.unparse(node.targets[0]).isupper() and calls <= {"dict"}, ast.unparse(node)
    assert ast.unparse(TREE.body[-1]).startswith("if __name__ == '__main__':")


IMPORT = """
import sys, threading
import numpy, torch, torch.distributed, torch.nn.parallel, inspect
before = set(sys.modules)

def watch(event, args):
    outside = event.split(".")[0] in ("socket", "subprocess", "os", "shutil", "tempfile")
    reads = event in ("os.listdir", "os.scandir", "os.getxattr") or event == "open" and not args[2] & 3
    if (outside or event == "open") and not reads:
        print(event, args)

sys.addaudithook(watch)
import train_gpt2
found = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(*sorted(found), threading.active_count(), torch.cuda.is_initialized(), torch.distributed.is_initialized())
"""


def test_import_does_nothing_and_loads_no_heavy_library(tmp_path):
    """In a fresh process that listens to the interpreter: it hears of any file written or socket opened."""
    child = subprocess.run([sys.executable, "-B", "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True,
                           env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    assert child.stderr == "" and child.stdout == "fineweb hellaswag train_gpt2 1 False False\n"


def definitions(*kinds):
    return [node for node in ast.walk(TREE) if isinstance(node, kinds)]


def test_a_function_fits_on_a_page_and_a_line_on_a_screen():
    """But for the run itself: it is the page that people come for."""
    assert {f.name for f in definitions(ast.FunctionDef) if f.end_lineno - f.lineno >= 60} <= {"train"}
    assert [line for line in LINES if len(line) > 120 or "\t" in line or line.endswith(" ")] == []


def test_the_text_explains_itself():
    """Six letters of explanation to ten of code. In the sections that hold the ideas also six lines to ten,
    where a remark after code is a line: there it gives shapes, units and reasons."""
    explains = {t.start[0]: len(t.string) for t in COMMENTS}  # letters in each line
    for node in definitions(ast.Module, ast.ClassDef, ast.FunctionDef):
        if ast.get_docstring(node):
            for n in range(node.body[0].lineno, node.body[0].end_lineno + 1):
                explains[n] = len(LINES[n - 1].strip())
        assert ast.get_docstring(node) or node not in TREE.body, f"{node.name} has no docstring"
    computes = {n: len(line.strip()) - explains.get(n, 0) for n, line in enumerate(LINES, 1)}
    assert sum(explains.values()) / sum(computes.values()) >= 0.6
    above = range(*(n for n, line in enumerate(LINES, 1) if re.match(r"# -{20,} 1\.|# The line\.", line)))
    assert sum(explains.get(n, 0) > 0 for n in above) / sum(computes[n] > 0 for n in above) >= 0.6


def test_the_map_leads_to_sections_in_this_order():
    titles = dict(re.findall(r"^ *# -{20,} (\d+)\. (.+)$", SOURCE, re.MULTILINE))
    entries = dict(re.findall(r"^    (\d+) +(\S+(?: \S+)*)  +\S", train_gpt2.__doc__, re.MULTILINE))
    assert list(titles) == list(entries) == [str(n) for n in range(1, 12)]
    for number, name in entries.items():
        assert name.split()[-1] in titles[number], f"the map calls section {number} {name!r}"


def test_the_launch_lines_are_commands():
    lines = re.findall(r"^    (?:torchrun .*|python )train_gpt2\.py(.*?)(?: {2,}[^ -].*)?$", train_gpt2.__doc__, re.M)
    assert len(lines) == 7
    for words in map(shlex.split, lines):
        action = words.pop(0) if words and not words[0].startswith("-") else "train"
        train_gpt2.make_parser(action).parse_args(words)


# ---- settings

def test_every_setting_is_a_flag_and_its_comment_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        train_gpt2.main(["--help"])
    help = " ".join(capsys.readouterr().out.split())
    comments = {t.start[0]: t.string.lstrip("# ") for t in COMMENTS}
    settings = {}
    for cls in definitions(ast.ClassDef):
        for line in cls.body[1:] if cls.name in ("GPTConfig", "TrainConfig") else ():
            assert isinstance(line, ast.AnnAssign)  # without a type it's no field, and no flag would ever set it
            settings[line.target.id] = " ".join(comments[line.end_lineno].split())
    assert len(settings) == len(fields(TrainConfig))
    assert all(f"--{name} " in help and comment in help for name, comment in settings.items())
    assert "--preset" in help and "--config" in help


def test_presets_set_what_exists():
    for values in PRESETS.values():
        TrainConfig(**values)


# ---- numbers in sentences

def n_params(name="gpt2", **changes):
    shape = {k: v for k, v in PRESETS[name].items() if k.startswith("n_")}
    with torch.device("meta"):
        return GPT(GPTConfig(**shape, **changes)).num_params()


C, V, HEADS, SEEN = 768, 50257, 12, 1024
# Words of the file, the number that they state, and the same number worked out. Change one, and look at both.
NUMBERS = [
    ("saves 38.6M of", 38.6e6, V * C),
    ("163M parameters", 163e6, n_params() + V * C),
    ("124,439,808 for the smallest GPT-2", 124_439_808, n_params()),
    ("50 MB per layer and row in float32 at T = 1024", 50e6, HEADS * SEEN * SEEN * 4),
    ("10.98 for 124M", 10.98, math.log(V) + (0.02 * math.sqrt(C)) ** 2 / 2),
    ("not ln V = 10.82", 10.82, math.log(V)),
    ("256 bytes + 50,000 merges + <|endoftext|>", V, 256 + 50_000 + 1),
    ("50257 (padded to 50304 in training)", 50304, math.ceil(V / 128) * 128),
    ("all four sizes of GPT-2 have 64 channels per head", 64, C / HEADS),
    ("width of a head, C / nh = 64", 64, C / HEADS),
    ("at most block_size = 1024", SEEN, GPTConfig.block_size),
    ("channels, n_embd = 768", C, GPTConfig.n_embd),
    ("attention heads, 12", HEADS, GPTConfig.n_head),
    ("vocabulary, 50257", V, GPTConfig.vocab_size),
    ("2^19, GPT-3's 0.5M", TrainConfig.total_batch_size, 2 ** 19),
    ("10e9 tokens / 524,288", TrainConfig.max_steps, 10e9 / 2 ** 19),
    ("375M tokens, / 524,288", TrainConfig.warmup_steps, 375e6 / 2 ** 19),
    ("a tenth of max_lr", TrainConfig.min_lr, TrainConfig.max_lr / 10),
    ("20 x 64 x 1024 x 8", TrainConfig.val_tokens, 20 * 64 * 1024 * 8),
    ("1.5 GB at 124M", 1.5e9, 3 * 4 * n_params(vocab_size=50304)),
    ("over about 20 steps", 20, 1 / (1 - 0.95)),
    ("0.999, averages over 1,000", 1000, 1 / (1 - 0.999)),
    ("smaller than 6e-8", 6e-8, float(np.finfo(np.float16).smallest_subnormal)),
    ("# 355M", 355e6, n_params("gpt2-medium")),
    ("# 774M", 774e6, n_params("gpt2-large")),
    ("# 1558M", 1558e6, n_params("gpt2-xl")),
    ("GPT-3's warm-up would be a quarter of such a run", 1 / 4, TrainConfig.warmup_steps / 3000),
    ("3,000 steps.", PRESETS["tinystories"]["max_steps"], 3000),
]
WORDS = re.sub(r"\s+", " ", re.sub(r"\n *#", " ", SOURCE))  # comments as running text


@pytest.mark.parametrize("sentence, stated, true", NUMBERS, ids=[row[0] for row in NUMBERS])
def test_numbers_in_sentences_are_right(sentence, stated, true):
    assert sentence in WORDS, "the sentence is gone: change its row here too"
    if isinstance(stated, int):
        assert stated == round(true)
    else:
        assert stated == pytest.approx(true, rel=0.05 if "a quarter" in sentence else 0.01)


def test_examples_in_docstrings_are_right():
    result = doctest.testmod(train_gpt2)
    assert result.attempted >= 2 and result.failed == 0


# ---- shapes

CLAIM = re.compile(r"# *\(([\w ,+*/-]*)\)\s*")
CLAIMS = {t.start[0]: m[1] for t in COMMENTS if t.line[:t.start[1]].strip() and (m := CLAIM.fullmatch(t.string))}
# The statements that end in such a comment, by each of their lines.
MAKERS = {n: node for node in definitions(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)
          if node.end_lineno in CLAIMS for n in range(node.lineno, node.end_lineno + 1)}


class Watch:
    """Follows the lines of train_gpt2.py as they run, and keeps the shapes of what MAKERS have made."""

    def __init__(self):
        self.letters = {}  # what the letters stand for just now
        self.seen = {}     # line -> [(shape, letters and whole numbers at that time)]

    def __call__(self, frame, event, arg):  # for sys.settrace
        if frame.f_code.co_filename != str(FILE) or frame.f_code.co_name.startswith("<"):
            return None
        maker = None

        def follow(frame, event, result):
            nonlocal maker
            if maker and (event == "return" or MAKERS.get(frame.f_lineno) is not maker):
                self.note(maker, frame, result)
            maker = MAKERS.get(frame.f_lineno)
            return follow

        return follow

    def note(self, maker, frame, result):
        numbers = {name: value for name, value in frame.f_locals.items() if isinstance(value, int)} | self.letters
        names = [] if isinstance(maker, ast.Return) else getattr(maker, "targets", None) or [maker.target]
        names = [part for name in names for part in getattr(name, "elts", [name])]
        made = [eval(ast.unparse(name), frame.f_globals, frame.f_locals) for name in names] or [result]
        self.seen.setdefault(maker.end_lineno, []).extend((tuple(tensor.shape), numbers) for tensor in made)

    @contextlib.contextmanager
    def where(self, **letters):
        """Inside, the letters of the comments stand for these numbers, no two for the same one."""
        assert len(letters) == len(set(letters.values())), letters
        before, self.letters = self.letters, letters
        yield
        self.letters = before


def run_every_claim(watch, folder):
    """What the file can do, with sizes that are all different."""
    t = train_gpt2
    size = dict(C=24, nh=4, hs=6, V=37, n_vocab=28)
    model = tiny_model()
    model.n_vocab = 28
    # One step: a loader that reads the next one ahead would do so while the letters stand for something else.
    cfg = TrainConfig(**TINY, total_batch_size=42 * 11, val_tokens=8 * 11, max_steps=1, val_every=0,
                      hellaswag_every=0, sample_every=0, checkpoint_every=0)
    with watch.where(B=2, T=5, **size):
        model(random_ids(2, 5), random_ids(2, 5, seed=3))
    with watch.where(B=2, T=11, **size):  # a prompt as long as the context: it stays that long
        model.generate(random_ids(2, 11), 2, temperature=0)
        model.generate(random_ids(2, 11), 2, temperature=0.7, top_k=9, stop=30)
    with watch.where(R=8, K=9):
        matrix = torch.nn.Parameter(torch.randn(8, 9))
        matrix.grad = torch.randn(8, 9)
        t.Muon([matrix], lr=0.1).step()
    corpus = t.Corpus(write_shards(folder, [np.arange(5000) % 37, np.arange(600) % 37]), "train", 11, 37)
    with watch.where(A=2, B=3, W=7, T=11):
        x, y = t.DataLoaderLite(corpus, 3, cfg, FakeWorld(size=7)).batch(0)
    with watch.where(A=2, B=3, T=11, **size):
        t.train_step(model, [torch.optim.SGD(model.parameters(), lr=0.1)], x, y, 0.1, cfg, FakeWorld(size=7))
    with watch.where(B=3, T=11, **size):  # eight windows in batches of three; a prompt of eleven letters
        t.evaluate_loss(model, corpus, 3, cfg, FakeWorld())
        t.continue_text(model, Letters(), "one two six", 3, 1, seed=0)
    write_shards(folder, [np.arange(200) % 31], "val")
    (folder / "meta.json").write_text(json.dumps(dict(tokenizer="lost", vocab_size=31, eot=30, shards=[])))
    with watch.where(A=14, W=1, B=3, T=11, **size):
        t.train(replace(cfg, data_dir=str(folder), log_dir=str(folder / "log"), micro_batch_size=3, device="cpu"))
    with watch.where(B=42, T=11, **size):
        # Only on a GPU are sizes tried out. A string that is a CPU to torch and a GPU to the file will do.
        gpu = FakeWorld()
        gpu.device = type("Device", (str,), {"type": "cuda"})("cpu")
        assert t.fit_micro_batch(model, cfg, gpu) == 42


def test_shape_comments_are_true(tmp_path):
    """All of them are met, and fit. Turned around, longer, shorter, or with another letter, none would fit."""
    watch, before = Watch(), sys.gettrace()
    threading.settrace(watch)
    sys.settrace(watch)
    try:
        run_every_claim(watch, tmp_path)
    finally:
        sys.settrace(before)
        threading.settrace(None)
    assert len(CLAIMS) > 35 and watch.seen.keys() == CLAIMS.keys()
    for line, claim in CLAIMS.items():
        def fits(parts):
            return all(shape == tuple(eval(part, dict.fromkeys("BTCV", -1), numbers) for part in parts)
                       for shape, numbers in watch.seen[line])

        parts = [part.strip() for part in claim.split(",") if part.strip()]
        lies = [parts + ["1"], parts[:-1], parts[::-1]]
        lies += [parts[:i] + [letter] + parts[i + 1:] for i, part in enumerate(parts) for letter in "BTCV"
                 if letter not in part]
        assert fits(parts), f"line {line} says ({claim}), but makes {watch.seen[line][0][0]}"
        for lie in lies:
            # The one pair of names for one thing: the rows that continue_text asks for are the B of generate.
            alias = (claim, lie) == ("rows, T", ["B", "T"])
            assert lie == parts or alias or not fits(lie), f"line {line}: {lie} passes for ({claim})"
