"""train_gpt2.py as a text: its comments are true, its map leads somewhere, and it does nothing until asked.

Comments rot, since nothing runs them. Here many do run: a trailing `# (B, T, C)` is compared with the tensor
of its line, a number in a sentence is worked out again, an example in a docstring is tried, a comment behind
a setting must be its --help.
"""
import ast
import contextlib
import doctest
import io
import json
import math
import re
import subprocess
import sys
import tokenize
import types
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT
from helpers import TINY, FakeWorld, random_ids, write_shards
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

FILE = ROOT / "train_gpt2.py"
SOURCE = FILE.read_text()
TREE = ast.parse(SOURCE)


def comments_of(source):
    return [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]


COMMENTS = comments_of(SOURCE)


# ---- the form of the text

def test_nothing_but_definitions_at_module_level():
    """Imports, constants, functions, classes, and the guard that starts main."""
    for node in TREE.body[1:]:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'" and node is TREE.body[-1]
        else:
            kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
            assert isinstance(node, kinds), ast.unparse(node)
        if isinstance(node, ast.Assign):  # a table of plain values; `dict(...)` is the one call in it
            calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
            assert ast.unparse(node.targets[0]).isupper() and calls <= {"dict"}, ast.unparse(node)


def test_heavy_libraries_are_imported_where_they_are_used():
    top = {a.name.split(".")[0] for n in TREE.body if isinstance(n, ast.Import) for a in n.names}
    top |= {n.module.split(".")[0] for n in TREE.body if isinstance(n, ast.ImportFrom)}
    assert top - set(sys.stdlib_module_names) == {"numpy", "torch", "fineweb", "hellaswag"}


IMPORT = """
import json, sys, threading
import numpy, torch, torch.distributed, torch.nn.parallel, inspect
before, seen = set(sys.modules), []

def watch(event, args):
    if event.split(".")[0] in ("socket", "subprocess", "os", "shutil", "urllib", "http", "tempfile"):
        if event not in ("os.listdir", "os.scandir", "os.getxattr"):
            seen.append([event, str(args)])
    if event == "open" and (args[2] & 3 or str(args[1]).strip("rbtU")):
        seen.append([event, str(args)])

sys.addaudithook(watch)
import train_gpt2
done = list(seen)
heavy = {"transformers", "datasets", "tiktoken", "tokenizers", "pyarrow", "matplotlib", "wandb",
         "safetensors", "huggingface_hub", "requests"}
print(json.dumps(dict(seen=done, heavy=sorted(heavy & set(sys.modules)), threads=threading.active_count(),
                      cuda=torch.cuda.is_initialized(), ddp=torch.distributed.is_initialized())))
"""


def test_import_prints_nothing_writes_nothing_and_takes_no_gpu(tmp_path):
    """In a fresh process that listens to the interpreter: it hears of any file written or socket opened."""
    child = subprocess.run([sys.executable, "-B", "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True,
                           env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    assert child.returncode == 0 and child.stderr == "", child.stderr
    assert child.stdout.count("\n") == 1, child.stdout
    assert json.loads(child.stdout) == dict(seen=[], heavy=[], cuda=False, threads=1, ddp=False)
    assert list(tmp_path.iterdir()) == []


def functions(tree=TREE):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_no_function_is_longer_than_a_page():
    assert len(functions()) > 50
    """The run itself is the page that people come for, and may be longer."""
    assert {f.name for f in functions() if f.end_lineno - f.lineno + 1 > 60} <= {"train"}


def test_no_line_is_wider_than_a_screen():
    assert [n for n, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 120] == []
    assert "\t" not in SOURCE and not re.search(r" +$", SOURCE, re.MULTILINE)


def count_lines(source):
    """(lines that explain, lines of code) as sets: comments and docstrings; what is neither that nor blank.

    >>> count_lines('''x = 1  # a remark behind code\\n\\n# why\\ndef f():\\n    "What."\\n    return 2''')
    ({3, 5}, {1, 4, 6})
    """
    lines = dict(enumerate(source.splitlines(), 1))
    explaining = {n for n, line in lines.items() if line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            explaining |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = {n for n, line in lines.items() if not line.strip()}
    return explaining - blank, set(lines) - explaining - blank


def test_the_text_explains_itself():
    """Six letters of explanation to ten of code. In the sections that hold the ideas also six lines to ten,
    where a remark behind code is a line: there it gives shapes, units and reasons."""
    remarks = [t for t in COMMENTS if t.line[:t.start[1]].strip()]
    lines = SOURCE.splitlines()
    explaining, code = count_lines(SOURCE)
    letters = sum(len(lines[n - 1].strip()) for n in explaining) + sum(len(t.string) for t in remarks)
    assert letters / (sum(len(line.strip()) for line in lines) - letters) >= 0.6

    banner = {m[1]: n for n, line in enumerate(lines, 1) if (m := re.match(r" *# -{20,} (\d+)\.", line))}
    ideas = range(banner["1"], SOURCE[:SOURCE.index("# The line.")].count("\n"))
    remarks = [t for t in remarks if t.start[0] in ideas]
    assert (len(explaining & set(ideas)) + len(remarks)) / len(code & set(ideas)) >= 0.6


def test_everything_public_says_what_it_is():
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_the_map_leads_to_sections_in_this_order():
    titles = dict(re.findall(r"^ *# -{20,} (\d+)\. (.+)$", SOURCE, re.MULTILINE))
    assert list(titles) == [str(n) for n in range(1, 12)]
    entries = re.findall(r"^    (\d+) +(\S+(?: \S+)*)  +\S", train_gpt2.__doc__, re.MULTILINE)
    assert [number for number, _ in entries] == [str(n) for n in range(1, 12)]
    for number, name in entries:
        assert name.split()[-1] in titles[number], f"the map calls section {number} {name!r}"


def test_the_launch_lines_name_what_exists():
    lines = re.findall(r"^    (?:torchrun .*|python )train_gpt2\.py(.*?)(?:  |$)", train_gpt2.__doc__, re.M)
    assert len(lines) == 7
    flags = {f.name for f in fields(TrainConfig)} | {"preset", "config", "out"}
    for line in lines:
        words = line.split()
        if words and not words[0].startswith("-"):
            assert words[0] in train_gpt2.ACTIONS
        assert {w[2:] for w in words if w.startswith("--")} <= flags, line
        if "--preset" in words:
            assert words[words.index("--preset") + 1] in PRESETS


# ---- settings

@pytest.mark.parametrize("cls", [GPTConfig, TrainConfig])
def test_every_setting_is_a_field_with_a_comment(cls):
    """A default without an annotation is no field: dataclass passes it over, and no flag ever sets it."""
    plain = {name for name, value in vars(cls).items() if not name.startswith("_") and not callable(value)}
    assert plain <= set(cls.__annotations__)
    node = next(n for n in TREE.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    behind = {t.start[0]: t.string for t in COMMENTS}
    for statement in node.body[1:]:
        assert isinstance(statement, ast.AnnAssign) and statement.value is not None
        assert len(behind.get(statement.end_lineno, "")) > 5, f"no comment behind {ast.unparse(statement)}"


def test_every_flag_and_its_comment_are_in_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        train_gpt2.main(["--help"])
    help = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    comments = {m[1]: t.string.lstrip("# ") for t in COMMENTS if (m := re.match(r"    (\w+): .* = ", t.line))}
    for field in fields(TrainConfig):
        assert f"--{field.name} " in help and " ".join(comments[field.name].split()) in help
    assert "--preset" in help and "--config" in help


def test_presets_set_what_exists():
    for values in PRESETS.values():
        assert set(values) <= {f.name for f in fields(TrainConfig)}
        TrainConfig(**values)


# ---- numbers in sentences

def n_params(name="gpt2", **changes):
    shape = {k: v for k, v in PRESETS[name].items() if k.startswith("n_")}
    with torch.device("meta"):
        return GPT(GPTConfig(**shape, **changes)).num_params()


C, V, LAYERS, HEADS, SEEN = 768, 50257, 12, 12, 1024
# Words of the file, the number that they state, and the same number worked out. Change one, and look at both.
NUMBERS = [
    ("saves 38.6M of", 38.6e6, V * C),
    ("163M parameters", 163e6, n_params() + V * C),
    ("124,439,808 for the smallest GPT-2", 124_439_808, n_params()),
    ("50 MB a row and layer in float32 at T = 1024", 50e6, HEADS * SEEN * SEEN * 4),
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
    assert doctest.testmod(sys.modules[__name__]).failed == 0


# ---- shapes

CLAIM = re.compile(r"# *\(([\w ,+*/-]*)\)\s*")


def evaluate(claim, letters):
    """The numbers that a shape comment states.

    >>> evaluate("B, T+1, 4*C", dict(B=2, T=5, C=24)), evaluate("", {})
    ((2, 6, 96), ())
    """
    return tuple(eval(part, {"__builtins__": {}}, dict(letters)) for part in claim.split(",") if part.strip())


class Checks(ast.NodeTransformer):
    """Behind each line that ends in a shape comment, a call that compares it with what the line has made."""

    def __init__(self, source):
        self.letters = {}  # what the letters stand for just now
        self.seen = {}     # line -> [(shape met, letters at that time)]
        self.placed = set()
        self.claims = {t.start[0]: m[1] for t in comments_of(source)
                       if t.line[:t.start[1]].strip() and (m := CLAIM.fullmatch(t.string))}
        tree = ast.fix_missing_locations(self.visit(ast.parse(source)))
        self.module = types.ModuleType("checked_train_gpt2")
        self.module.__file__, self.module.__check__ = str(FILE), self.check
        sys.modules[self.module.__name__] = self.module  # dataclass looks its module up there
        exec(compile(tree, str(FILE), "exec"), self.module.__dict__)

    def call(self, line, values):
        self.placed.add(line)
        return ast.Call(ast.Name("__check__", ast.Load()), [ast.Constant(line), *values], [])

    def behind(self, node):
        if node.end_lineno not in self.claims:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        targets = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        values = [ast.parse(ast.unparse(t), mode="eval").body for t in targets if ast.unparse(t) != "_"]
        return [node, ast.copy_location(ast.Expr(self.call(node.end_lineno, values)), node)]

    visit_Assign = visit_AugAssign = visit_AnnAssign = behind

    def visit_Return(self, node):
        if node.end_lineno in self.claims:
            node.value = self.call(node.end_lineno, [node.value])
        return node

    def check(self, line, *values):
        want = evaluate(self.claims[line], self.letters)
        for value in values:
            shape = tuple(value.shape)
            assert shape == want, f"line {line}: the comment says ({self.claims[line]}) {want}, it is {shape}"
            self.seen.setdefault(line, []).append((shape, self.letters))
        return values[0]

    @contextlib.contextmanager
    def where(self, **letters):
        """Inside, the letters of the comments stand for these numbers, no two for the same one."""
        distinct = [v for k, v in letters.items() if k not in ("rows", "n")]
        assert len(distinct) == len(set(distinct)), letters
        before, self.letters = self.letters, letters
        yield
        self.letters = before


class Tokens:
    """As much of a tokenizer as writing a sample takes: every character is some id."""

    eot_token = 30

    def encode_ordinary(self, text):
        return [ord(c) % 30 for c in text]

    def decode(self, ids):
        return " ".join(map(str, ids))


def visit_every_claim(checks, folder):
    """Run what the file can do with sizes that are all different, so that each shape comment is met."""
    m = checks.module
    size = dict(C=24, nh=4, hs=6, V=37, n_vocab=31)
    model = m.GPT(m.GPTConfig(**TINY))
    model.n_vocab = 31
    # One step: a loader that reads the next one ahead would do so while the letters stand for something else.
    cfg = m.TrainConfig(**TINY, total_batch_size=42 * 11, val_tokens=8 * 11, max_steps=1, val_every=0,
                        hellaswag_every=0, sample_every=0, checkpoint_every=0)
    world = FakeWorld(size=7)

    with checks.where(B=2, T=5, **size):
        model(random_ids(2, 5), random_ids(2, 5, seed=3))
    with checks.where(B=2, T=11, **size):  # a prompt as long as the context: it stays that long
        model.generate(random_ids(2, 11), 2, temperature=0)
        model.generate(random_ids(2, 11), 2, temperature=0.7, top_k=9, stop=30)

    with checks.where(R=8, K=9):
        matrix = torch.nn.Parameter(torch.randn(8, 9))
        matrix.grad = torch.randn(8, 9)
        m.Muon([matrix], lr=0.1).step()

    windows = m.Corpus.windows

    def asked(self, numbers):  # n differs: the first windows of a shard, those of a step, a short last batch
        with checks.where(T=11, n=len(numbers)):
            return windows(self, numbers)

    m.Corpus.windows = asked
    corpus = m.Corpus(write_shards(folder, [np.arange(5000) % 37, np.arange(600) % 37]), "train", 11, 37)
    with checks.where(A=2, B=3, W=7, T=11, rows=42):
        x, y = m.DataLoaderLite(corpus, 3, cfg, world).batch(0)
    with checks.where(A=2, B=3, T=11, **size):
        m.train_step(model, [torch.optim.SGD(model.parameters(), lr=0.1)], x, y, 0.1, cfg, world)
    with checks.where(B=3, T=11, **size):  # eight windows in batches of three
        m.evaluate_loss(model, corpus, 3, cfg, FakeWorld())

    with checks.where(B=3, rows=3, T=11, **size):
        m.continue_text(model, Tokens(), "as long as.", 3, 1, seed=0)
    write_shards(folder, [np.arange(200) % 31], "val")
    meta = dict(tokenizer="lost", vocab_size=31, eot=30, shards=[])
    (folder / "meta.json").write_text(json.dumps(meta))
    with checks.where(A=14, W=1, B=3, T=11, rows=42, **size):
        m.train(replace(cfg, data_dir=str(folder), log_dir=str(folder / "log"), micro_batch_size=3, device="cpu"))
    with checks.where(B=42, T=11, **size):
        # Only on a GPU are sizes tried out. A string that is a CPU to torch and a GPU to the file will do.
        gpu = FakeWorld()
        gpu.device = type("Device", (str,), {"type": "cuda"})("cpu")
        assert m.fit_micro_batch(model, cfg, gpu) == 42


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    checks = Checks(SOURCE)
    visit_every_claim(checks, tmp_path_factory.mktemp("shards"))
    return checks


def test_shape_comments_are_true(checks):
    """The fixture has compared them all; here we see that it passed none over."""
    assert len(checks.claims) > 35
    assert checks.claims.keys() - checks.placed == set(), "shape comments on lines that give nothing a value"
    assert checks.claims.keys() - checks.seen.keys() == set(), "shape comments that were never met"


def test_a_lie_in_any_shape_comment_would_be_seen(checks):
    """Turned around, longer or shorter, or with one letter changed, no claim fits all that was met."""
    for line, claim in checks.claims.items():
        parts = [p.strip() for p in claim.split(",") if p.strip()]
        lies = [parts + ["1"]]
        if parts:
            lies += [parts[:-1]]
        if len(set(parts)) > 1:
            lies += [parts[::-1]]
        for i, part in enumerate(parts):
            lies += [parts[:i] + [letter] + parts[i + 1:] for letter in "BTCV" if letter not in part]
        for lie in lies:
            met = [shape == evaluate(",".join(lie), {**dict.fromkeys("BTCV", -1), **letters})
                   for shape, letters in checks.seen[line]]
            # The one pair of names for one thing: the rows that continue_text asks for are the B of generate.
            alias = (claim, lie) == ("rows, T", ["B", "T"])
            assert alias or not all(met), f"line {line}: {lie} passes for ({claim})"


@pytest.mark.parametrize("true, lie", [("# (B, nh, T, hs)", "# (B, T, nh, hs)"), ("# (rows,)", "# (A,)"),
                                       ("# (B, T, 4*C)", "# (B, T, 3*C)")])
def test_a_planted_lie_fails(tmp_path, true, lie):
    assert true in SOURCE
    with pytest.raises((AssertionError, NameError), match="the comment says|not defined"):
        visit_every_claim(Checks(SOURCE.replace(true, lie, 1)), tmp_path)
