"""The lessons: their form, their exercises, their table of bugs (each planted, each noticed), and every cell (slow)."""
import ast
import base64
import functools
import importlib.util
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

from conftest import ROOT

LESSONS = ROOT / "lessons"
NOTEBOOKS = sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))
EXERCISE = re.compile(r"\bex\d\d_\d\b")
README = (LESSONS / "README.md").read_text()
sys.path.append(str(LESSONS))
import solutions  # noqa: E402

# tests/ has a helpers.py of its own, so the lessons' goes by another name here.
spec = importlib.util.spec_from_file_location("lesson_helpers", LESSONS / "helpers.py")
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


@functools.cache
def read(file):
    nb = nbformat.read(file, as_version=4)
    nbformat.validate(nb)
    return nb


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def prose(nb):
    return "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


# ---- form

def test_the_fourteen_lessons_are_there_and_the_readme_knows_them():
    """Each is in the README's table, with the minutes that it names itself; their sum is the total of hours there."""
    assert [int(file.name[:2]) for file in NOTEBOOKS] == list(range(1, 15))
    rows = dict(re.findall(r"^\| \[[^]]+\]\((\d\d_\w+\.ipynb)\) \|.*\| (\d+) \|[^|]*\|$", README, re.MULTILINE))
    said = {file.name: re.search(r"\*\*Minutes\*\* about (\d+)", read(file).cells[0].source)[1] for file in NOTEBOOKS}
    assert rows == said
    hours = int(re.search(r"takes about (\d+) hours", README)[1])
    assert abs(sum(map(int, said.values())) / 60 - hours) <= 0.5
    assert len((LESSONS / "helpers.py").read_text().splitlines()) <= 80


@each_notebook
def test_was_executed_from_top_to_bottom_without_an_error(file):
    cells = code_cells(read(file))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", (cell.source, output)


@each_notebook
def test_is_small_and_names_no_machine(file):
    """Cells too: half of them are a thought, not a page."""
    lengths = sorted(len(cell.source.splitlines()) for cell in code_cells(read(file)))
    assert lengths[-1] <= 30 and lengths[len(lengths) // 2] <= 10
    text = file.read_text()
    assert len(text) <= 1_500_000 and not re.search(r"(?<![\w.])/(home|root|Users|tmp|usr|work|opt)/", text)


@each_notebook
def test_opens_with_its_goal_and_the_map_and_ends_equal_to_train_gpt2(file):
    """The first code cell is the same everywhere; the second draws the map, with a part of it lit."""
    nb = read(file)
    first, second, *_, last = code_cells(nb)
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith(f"# {file.name[:2]} ")
    assert all(word in nb.cells[0].source for word in ("**You will build**", "**Minutes**", "**Needs**"))
    assert first.source == code_cells(read(NOTEBOOKS[0]))[0].source
    assert re.fullmatch(r'import figures\nfigures\.gpt2_map\((?:"\w+"(?:, )?)+\)', second.source)
    assert "## Where this lives" in prose(nb) and "## Ledger" in prose(nb) and "train_gpt2.py" in prose(nb)
    assert any("train_gpt2" in cell.source for cell in code_cells(nb)) and "compare(" in last.source


@each_notebook
def test_pictures_are_wide_enough_and_ask_a_question(file):
    pictures = [[output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
                for cell in code_cells(read(file))]
    widths = [struct.unpack(">I", base64.b64decode(picture)[16:20])[0] for cell in pictures for picture in cell]
    assert pictures[1] and len(widths) >= 3 and min(widths) >= 700, widths
    source = "\n".join(cell.source for cell in code_cells(read(file)))
    assert all("?" in title for _, title in re.findall(r"title\(\s*f?([\"'])(.*?)\1", source))


def test_links_lead_somewhere_and_from_each_lesson_to_its_neighbors():
    for file in [*NOTEBOOKS, LESSONS / "README.md"]:
        text = file.read_text() if file.suffix == ".md" else prose(read(file))
        local = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")]
        assert local and all((LESSONS / link).exists() for link in local), (file, local)
    for before, file, after in zip([None, *NOTEBOOKS], NOTEBOOKS, [*NOTEBOOKS[1:], None]):
        first, *_, last = read(file).cells
        assert last.cell_type == "markdown" and first.source.endswith(last.source)
        assert re.findall(r"\]\(([^)]+)\)", last.source) == [
            *([before.name] if before else []), "README.md", *([after.name] if after else []), "../train_gpt2.py"]
        for name in re.findall(r"`(\w+)[^`]*`", last.source.split("train_gpt2.py)")[1]):
            assert re.search(rf"\b{name}\b", (ROOT / "train_gpt2.py").read_text()), name


# ---- exercises

def exercises(nb):
    """The exercises that a notebook sets: the functions or classes exNN_K that its cells define."""
    source = "\n".join(cell.source for cell in code_cells(nb))
    return sorted(set(re.findall(r"^(?:def|class) (ex\d\d_\d)\b", source, re.MULTILINE)))


@each_notebook
def test_exercises_have_one_style_of_heading_and_hints(file):
    """`### Exercise 1 · what it is · 10 minutes · ●●○`, numbered in order, each with a folded hint."""
    text, names = prose(read(file)), exercises(read(file))
    headings = re.findall(r"^#+ *Exercise .*$", text, re.MULTILINE)
    assert [int(re.fullmatch(r"### Exercise (\d) · .+ · \d+ minutes · (?:●○○|●●○|●●●)", heading)[1])
            for heading in headings] == list(range(1, len(names) + 1))
    assert 2 <= len(names) <= 4 and text.count("<details>") >= len(names)


ALL = [(file, name) for file in NOTEBOOKS for name in exercises(read(file))]


@pytest.mark.parametrize("file, name", ALL, ids=[name for _, name in ALL])
def test_the_solution_passes_the_check_and_nothing_else_does(file, name, capsys):
    """Nor does the stub that the notebook shows, in a cell that checks it."""
    helpers.check(getattr(solutions, name), name)
    assert f"{name}: right" in capsys.readouterr().out
    with pytest.raises(Exception):
        helpers.check(lambda *args, **kwargs: None, name)
    cell = next(c for c in code_cells(read(file)) if re.search(rf"^(def|class) {name}\b", c.source, re.MULTILINE))
    assert f'check({name}, "{name}")' in cell.source
    assert f"{name}: your turn" in "".join(output.get("text", "") for output in cell.outputs)


def test_every_solution_belongs_to_an_exercise():
    known = {name for _, name in ALL}
    assert {name for name in vars(solutions) if EXERCISE.fullmatch(name)} == known
    assert {name for name in vars(solutions) if name.startswith("check_")} == {f"check_{name}" for name in known}


# ---- the table of bugs in the README
# For each bug: the lesson, the code cells that its check needs (by words in them; a line that begins with > is run as
# it stands), and the change that plants the bug. Without the change all of it passes, with it something must not.

IMPORTS = """>import copy, math, torch, train_gpt2
import numpy as np, torch.nn as nn, torch.nn.functional as F
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from helpers import ROOT, compare, shake
from train_gpt2 import *
torch.manual_seed(0)
ledger = []"""
BLOCK_04 = [">V = 9", "class Config:", "class CausalSelfAttention(", "class MLP(", "class Block("]
IN_06 = [">from train_gpt2 import Block; V, twin = 30, True", "class GPT(nn.Module)",
         """>from transformers import GPT2Config, GPT2LMHeadModel
small = dict(vocab_size=V, n_layer=2, n_head=2, n_embd=16)
theirs = GPT2LMHeadModel(GPT2Config(n_positions=8, **small)).eval()
ours = GPT(train_gpt2.GPTConfig(block_size=8, **small))
turned = {n for n, p in theirs.named_parameters() if p.dim() == 2 and not n.endswith(("wte.weight", "wpe.weight"))}
x = torch.arange(8)[None]""", ">shake(theirs, std=0.2)", """>with torch.no_grad():
    want = with_dropout = theirs(x).logits""", "def import_weights(", "def plant(", "def gap("]
LOSSES_09 = [">CPU, shape = torch.device('cpu'), dict(block_size=8, vocab_size=9, n_layer=2, n_head=2, n_embd=8)",
             ">paper, cfg = TrainConfig(), TrainConfig(**shape)", ">model = shake(train_gpt2.GPT(cfg))"]
BUGS = [
    ("the exact GELU", 4, [*BLOCK_04, ">mine = shake(MLP(Config()))",
                           ">part = train_gpt2.MLP(GPTConfig(n_embd=Config.n_embd))",
                           ">part.load_state_dict(mine.state_dict()); x = torch.randn(2, 8, Config.n_embd)",
                           ">compare('our MLP and train_gpt2', part(x), mine(x), 1e-5)"],
     'nn.GELU(approximate="tanh")', "nn.GELU()"),
    ("the exact GELU", 6, [*IN_06, ">plant('nothing'); compare('logits', ours(x), want, 1e-4)"],
     "plant('nothing')", "plant('exact GELU')"),
    ("LayerNorm with eps 1e-6", 6, [*[words for words in IN_06 if "shake" not in words],
                                    ">plant('nothing'); compare('logits', ours(x), want, 1e-4)"],
     "plant('nothing')", "plant('LayerNorm with eps 1e-6')"),
    ("attention scaled by the width", 4, [">B, T, C, nh = 2, 8, 32, 4; x = torch.randn(B, T, C)", *BLOCK_04,
                                          "attn = shake(CausalSelfAttention("],
     "math.sqrt(q.size(-1))", "math.sqrt(C)"),
    ("a square `c_proj`", 6, IN_06,
     "\nimport_weights(ours, theirs, turned)",
     "\nimport_weights(ours, theirs, turned - {'transformer.h.0.attn.c_proj.weight'})"),
    ("a mask that is off by one", 3, [">T, C = 8, 32; x = torch.randn(2, T, C)", "def causal_weights(", "class Head(",
                                      ">head = shake(Head(C))", "torch.autograd.grad(head("],
     "triu(diagonal=1)", "triu(diagonal=2)"),
    ("a mask that is off by one", 4, [">B, T, C, nh = 2, 8, 32, 4; x = torch.randn(B, T, C)", *BLOCK_04,
                                      "attn = shake(CausalSelfAttention("],
     "torch.ones(T, T, device=x.device).triu(diagonal=1)", "torch.ones(T, T, device=x.device).triu(diagonal=2)"),
    ("a loss not divided", 9, [*LOSSES_09, ">x = y = torch.arange(32).view(4, 8) % 9", ">x = x.repeat(2, 1); y = x",
                               "def gradient(m, x, y, A", "exact = copy.deepcopy(model).double()"],
     "divide=True", "divide=False"),
    ("decay on biases", 9, [*LOSSES_09, "def who_decays(", "right = who_decays("],
     "configure_optimizers(m, cfg, CPU)[0]", "torch.optim.AdamW(m.parameters(), weight_decay=0.1)"),
    ("a learning rate of 0", 9, [*LOSSES_09, "def lr_by_hand(", "short = TrainConfig("], "(step + 1) / cfg.warmup",
     "step / cfg.warmup"),
    ("residual projections", 7, [">config = train_gpt2.GPTConfig(vocab_size=512, n_layer=12, n_embd=192)",
                                 "def init_by_hand(", ">model = init_by_hand(train_gpt2.GPT(config))", "kinds = {}"],
     "math.sqrt(2 * model.config.n_layer)", "1"),
    ("a head that is not tied", 7, [">V = 512", "small = GPTConfig(", "def predicted_loss(", "def spread(",
                                    "def unscale(", "def untie(", "def step0(", "bugs = {", "good, unscaled, untied ="],
     'bugs = {"healthy": lambda m: m', 'bugs = {"healthy": untie'),
    ("ranks that read the same rows", 10, ["scratch = tempfile.TemporaryDirectory()", "def old_rule(", "def together("],
     "world = SimpleNamespace(rank=rank", "world = SimpleNamespace(rank=0"),
    ("ranks that read the same rows", 11, ["scratch = tempfile.TemporaryDirectory()", "def write_ruler(", "def loader(",
                                           "def whole_step("],
     "world = SimpleNamespace(rank=rank", "world = SimpleNamespace(rank=0"),
    ("windows that overlap", 11, ["scratch = tempfile.TemporaryDirectory()", "def write_ruler(", "everything = corpus"],
     "corpus.windows(range(corpus.n_windows))", "torch.arange(0, 240, 4)[:, None] + torch.arange(9)"),
    ("targets not shifted", 11, ["scratch = tempfile.TemporaryDirectory()", "def write_ruler(", "def loader("],
     "x, y = loader(rank=1, size=2).batch(0)", "x, y = [loader(rank=1, size=2).batch(0)[0]] * 2"),
    ("an evaluation left in train mode", 12, [
        """>cfg = TrainConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=16, dtype="float32")
folder, ledger, model, world = None, {}, shake(train_gpt2.GPT(cfg)), World(cfg)
val_text = SimpleNamespace(n_windows=64, windows=lambda n: torch.stack([torch.arange(i, i + 17) % 50 for i in n]))""",
        "def val_loss(", "fork = copy.deepcopy(model)", "compare(\"evaluate_loss, twice\""],
     "first = train_gpt2.evaluate_loss(fork, val_text, 16, few, world)[0]", "first = val_loss(fork, 64)"),
]


def run_cells(number, wanted, old="", new=""):
    file = next(LESSONS.glob(f"{number:02}_*.ipynb"))
    names, changed = {}, 0
    sources = [cell.source for cell in code_cells(read(file))]
    for words in [IMPORTS, *wanted]:
        if words.startswith(">"):
            found = [words[1:]]
        else:
            found = [source for source in sources if words in source][:1]
        assert found, f"{file.stem} has no cell with {words!r}"
        changed += bool(old) and found[0].count(old)
        exec(found[0].replace(old, new) if old else found[0], names)
    assert not old or changed == 1, f"{old!r} is there {changed} times"


@pytest.mark.parametrize("bug, number, wanted, old, new", BUGS, ids=[f"{bug[0]}, {bug[1]:02}" for bug in BUGS])
def test_the_lesson_notices_the_bug(bug, number, wanted, old, new, monkeypatch):
    monkeypatch.setitem(sys.modules, "helpers", helpers)
    run_cells(number, wanted)
    with pytest.raises(AssertionError):
        run_cells(number, wanted, old, new)


def test_each_bug_of_the_readme_is_planted_where_the_readme_says():
    table = README.split("| bug |")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.count("|") == 4][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    said = {(row[0], int(number)) for row in rows for number in row[-1].split(",")}
    assert len(said) == len(BUGS)
    for start, number in said:
        assert any(start.startswith(bug[0]) and number == bug[1] for bug in BUGS), (start, number)


# ---- every cell, in a fresh kernel

def execute(file, folder):
    from nbclient import NotebookClient
    nb = nbformat.read(file, as_version=4)
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.slow
def test_all_run_from_top_to_bottom(monkeypatch):
    """Two kernels at a time, with one thread each; started in three different folders, which stay as they were."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folders = [LESSONS, ROOT, ROOT / "tests"]

    def held():
        return [sorted({file.name for file in folder.iterdir()} - {"__pycache__"}) for folder in folders]

    before = held()
    with ThreadPoolExecutor(2) as pool:
        runs = {file.stem: pool.submit(execute, file, folders[i % 3]) for i, file in enumerate(NOTEBOOKS)}
    failed = {name: str(run.exception())[-1500:] for name, run in runs.items() if run.exception()}
    assert not failed, "\n\n".join(f"{name}: {error}" for name, error in failed.items())
    assert before == held()
