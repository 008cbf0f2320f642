"""The lessons: their form, their exercises, their table of bugs (each planted, each noticed), and every cell (slow)."""
import ast
import base64
import functools
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

import train_gpt2
from conftest import ROOT

LESSONS = ROOT / "lessons"
NOTEBOOKS = sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))
README = (LESSONS / "README.md").read_text()
sys.path.append(str(LESSONS))
import solutions  # noqa: E402

helpers = SimpleNamespace(**runpy.run_path(LESSONS / "helpers.py"))  # tests/ has a helpers.py of its own
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


@functools.cache
def read(file):
    """The code cells of a notebook, and its prose."""
    nb = nbformat.read(file, as_version=4)
    nbformat.validate(nb)
    return ([cell for cell in nb.cells if cell.cell_type == "code"],
            [cell.source for cell in nb.cells if cell.cell_type == "markdown"])


# ---- form

def test_the_fourteen_lessons_are_there_and_the_readme_knows_them():
    """Each is in the README's table, with the minutes that it names itself; their sum is the total of hours there."""
    assert [int(file.name[:2]) for file in NOTEBOOKS] == list(range(1, 15))
    rows = dict(re.findall(r"^\| \[[^]]+\]\((\d\d_\w+\.ipynb)\) \|.*\| (\d+) \|[^|]*\|$", README, re.MULTILINE))
    said = {file.name: re.search(r"\*\*Minutes\*\* about (\d+)", read(file)[1][0])[1] for file in NOTEBOOKS}
    hours = int(re.search(r"takes about (\d+) hours", README)[1])
    assert rows == said and abs(sum(map(int, said.values())) / 60 - hours) <= 0.5
    assert len((LESSONS / "helpers.py").read_text().splitlines()) <= 80


@each_notebook
def test_is_small_and_was_executed_without_an_error(file):
    """Half of the cells are a thought, not a page; none names a folder of our machine."""
    cells, _ = read(file)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        ast.parse(cell.source)
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", (cell.source, output)
    lengths = sorted(len(cell.source.splitlines()) for cell in cells)
    assert lengths[-1] <= 30 and lengths[len(lengths) // 2] <= 10
    text = file.read_text()
    assert len(text) <= 1_500_000 and not re.search(r"(?<![\w.])/(home|root|Users|tmp|usr|work|opt)/", text)


@each_notebook
def test_opens_with_its_goal_and_the_map_and_ends_equal_to_train_gpt2(file):
    """The first code cell is the same everywhere; the second draws the map, with a part of it lit."""
    (first, second, *more, last), prose = read(file)
    assert prose[0].startswith(f"# {file.name[:2]} ")
    assert all(word in prose[0] for word in ("**You will build**", "**Minutes**", "**Needs**"))
    assert first.source == read(NOTEBOOKS[0])[0][0].source
    assert re.fullmatch(r'import figures\nfigures\.gpt2_map\((?:"\w+"(?:, )?)+\)', second.source) and second.outputs
    text = "\n\n".join(prose)
    assert "## Where this lives" in text and "## Ledger" in text and "train_gpt2.py" in text
    assert any("train_gpt2" in cell.source for cell in [*more, last]) and "compare(" in last.source


@each_notebook
def test_pictures_are_wide_enough_and_ask_a_question(file):
    """A PNG's width stands in its bytes 16 to 19."""
    cells, _ = read(file)
    pictures = [output.data["image/png"] for cell in cells for output in cell.outputs
                if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    assert all(int.from_bytes(base64.b64decode(picture)[16:20], "big") >= 700 for picture in pictures)
    titles = re.findall(r"title\(\s*f?([\"'])(.*?)\1", "\n".join(cell.source for cell in cells))
    assert all("?" in title for _, title in titles)


def test_links_lead_somewhere_and_from_each_lesson_to_its_neighbors():
    for file in [*NOTEBOOKS, LESSONS / "README.md"]:
        text = README if file.suffix == ".md" else "\n\n".join(read(file)[1])
        local = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")]
        assert local and all((LESSONS / link).exists() for link in local), (file, local)
    names = ["", *(file.name for file in NOTEBOOKS), ""]
    for before, file, after in zip(names, NOTEBOOKS, names[2:]):
        first, *_, last = read(file)[1]
        assert first.endswith(last)
        assert re.findall(r"\]\(([^)]+)\)", last) == [
            name for name in (before, "README.md", after, "../train_gpt2.py") if name]
        for name in re.findall(r"`(\w+)[^`]*`", last.split("train_gpt2.py)")[1]):
            assert re.search(rf"\b{name}\b", (ROOT / "train_gpt2.py").read_text()), name


# ---- exercises

EXERCISES = sorted({name.removeprefix("check_") for name in vars(solutions)
                    if re.fullmatch(r"(check_)?ex\d\d_\d", name)})


@each_notebook
def test_the_exercises_have_one_style_and_a_solution_and_a_hint_each(file):
    """`### Exercise 1 · what it is · 10 minutes · ●●○`, numbered in order."""
    code, text = "\n".join(cell.source for cell in read(file)[0]), "\n\n".join(read(file)[1])
    names = sorted(set(re.findall(r"^(?:def|class) (ex\d\d_\d)\b", code, re.MULTILINE)))
    assert names == [name for name in EXERCISES if name.startswith(f"ex{file.name[:2]}")]
    headings = re.findall(r"^#+ *Exercise .*$", text, re.MULTILINE)
    assert [int(re.fullmatch(r"### Exercise (\d) · .+ · \d+ minutes · (?:●○○|●●○|●●●)", heading)[1])
            for heading in headings] == list(range(1, len(names) + 1))
    assert 2 <= len(names) <= 4 and text.count("<details>") >= len(names)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes_the_check_and_nothing_else_does(name, capsys):
    """Nor does the stub that the notebook shows, in a cell that checks it."""
    helpers.check(getattr(solutions, name), name)
    assert f"{name}: right" in capsys.readouterr().out
    with pytest.raises(Exception):
        helpers.check(lambda *args, **kwargs: None, name)
    cells, _ = read(NOTEBOOKS[int(name[2:4]) - 1])
    cell = next(cell for cell in cells if re.search(rf"^(def|class) {name}\b", cell.source, re.MULTILINE))
    assert f'check({name}, "{name}")' in cell.source
    assert f"{name}: your turn" in "".join(output.get("text", "") for output in cell.outputs)


# ---- the table of bugs in the README

# For each lesson, what its proofs need after its imports: words in a cell, or after > code that is run as it stands.
CELLS = {
    3: ">T, C = 8, 32 | >x = torch.randn(2, T, C) | def causal_weights( | class Head( | >head = shake(Head(C)) | "
       "torch.autograd.grad(head(",
    4: ">V, B, T, C, nh = 9, 2, 8, 32, 4 | >x = torch.randn(B, T, C) | class Config: | class CausalSelfAttention( | "
       "class MLP( | attn = shake(CausalSelfAttention( | >mine = shake(MLP(Config(n_embd=C))) | "
       ">part = train_gpt2.MLP(train_gpt2.GPTConfig(n_embd=C)) | >part.load_state_dict(mine.state_dict()) | "
       ">compare('our MLP and train_gpt2', part(x), mine(x), 1e-5)",
    6: ">V, twin, x = 30, True, torch.arange(8)[None] | class GPT(nn.Module) | "
       ">from transformers import GPT2Config, GPT2LMHeadModel | >small = dict(vocab_size=V, n_layer=2, n_embd=16) | "
       ">theirs = GPT2LMHeadModel(GPT2Config(n_positions=8, n_head=2, **small)).eval() | "
       ">ours = GPT(GPTConfig(block_size=8, n_head=2, **small)) | "
       ">turned = {name for name in theirs.state_dict() if '.c_' in name and name.endswith('weight')} | "
       ">want = with_dropout = theirs(x).logits.detach() | def import_weights( | def plant( | def gap( | "
       ">plant('nothing')  # on plain weights | >compare('logits', ours(x), want, 1e-4) | >shake(theirs, std=0.2) | "
       ">import_weights(ours, theirs, turned=turned) | >plant('nothing')  # on shaken ones | "
       ">compare('logits', ours(x), theirs(x).logits, 1e-4)",
    7: ">V = 512 | >model = GPT(GPTConfig(vocab_size=V, n_layer=12, n_embd=192)) | def init_by_hand( | "
       ">init_by_hand(model) | kinds = {} | small = GPTConfig( | def predicted_loss( | def spread( | def unscale( | "
       "def untie( | def step0( | bugs = { | good, unscaled, untied =",
    9: ">shape = dict(block_size=8, vocab_size=9, n_layer=2, n_head=2, n_embd=8) | "
       ">paper, cfg = TrainConfig(), TrainConfig(**shape) | >model = shake(GPT(cfg)) | "
       ">x = y = torch.arange(64).view(8, 8) % 9 | def lr_by_hand( | short = TrainConfig( | "
       "def gradient(m, x, y, A | exact = copy.deepcopy(model).double() | "
       "def who_decays( | right = who_decays(",
    10: "scratch = tempfile.TemporaryDirectory() | def old_rule( | def together(",
    11: "def write_ruler( | everything = corpus | def loader( | def whole_step(",
    12: ">cfg = TrainConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=16, dtype='float32') | "
        ">folder, model, world = None, GPT(cfg), train_gpt2.World(cfg) | "
        ">rows = torch.arange(80).unfold(0, 17, 1) % 50 | "
        ">val_text = SimpleNamespace(n_windows=64, windows=lambda numbers: rows[list(numbers)]) | "
        "def val_loss( | fork = copy.deepcopy(model) | compare(\"evaluate_loss, twice\"",
}
# How each bug is planted. Without the change all of a lesson's cells pass, with it something must not.
BUGS = [
    ("the exact GELU", 4, 'nn.GELU(approximate="tanh")', "nn.GELU()"),
    ("the exact GELU", 6, "plant('nothing')  # on shaken", "plant('exact GELU')  # on shaken"),
    ("LayerNorm with eps 1e-6", 6, "plant('nothing')  # on plain", "plant('LayerNorm with eps 1e-6')  # on plain"),
    ("attention scaled by the width", 4, "math.sqrt(q.size(-1))", "math.sqrt(C)"),
    ("a square `c_proj`", 6, "\nimport_weights(ours, theirs, turned)",
     "\nimport_weights(ours, theirs, turned - {'transformer.h.0.attn.c_proj.weight'})"),
    ("a mask that is off by one", 3, "triu(diagonal=1)", "triu(diagonal=2)"),
    ("a mask that is off by one", 4, "device=x.device).triu(diagonal=1)", "device=x.device).triu(diagonal=2)"),
    ("a loss not divided", 9, "divide=True", "divide=False"),
    ("decay on biases", 9, "configure_optimizers(m, cfg, CPU)[0]",
     "torch.optim.AdamW(m.parameters(), weight_decay=0.1)"),
    ("a learning rate of 0", 9, "(step + 1) / cfg.warmup", "step / cfg.warmup"),
    ("residual projections", 7, "math.sqrt(2 * model.config.n_layer)", "1"),
    ("a head that is not tied", 7, 'bugs = {"healthy": lambda m: m', 'bugs = {"healthy": untie'),
    ("ranks that read the same rows", 10, "SimpleNamespace(rank=rank", "SimpleNamespace(rank=0"),
    ("ranks that read the same rows", 11, "SimpleNamespace(rank=rank", "SimpleNamespace(rank=0"),
    ("windows that overlap", 11, "corpus.windows(range(corpus.n_windows))",
     "torch.arange(0, 240, 4)[:, None] + torch.arange(9)"),
    ("targets not shifted", 11, "x, y = loader(rank=1, size=2).batch(0)",
     "x, y = [loader(rank=1, size=2).batch(0)[0]] * 2"),
    ("an evaluation left in train mode", 12, "first = train_gpt2.evaluate_loss(fork, val_text, 16, few, world)[0]",
     "first = val_loss(fork, 64)"),
]


@functools.cache
def run_cells(number, old="", new=""):
    cells, _ = read(NOTEBOOKS[number - 1])
    sources = [words[1:] if words[0] == ">" else next(cell.source for cell in cells if words in cell.source)
               for words in ("from helpers import", *CELLS[number].split(" | "))]
    if old and "\n".join(sources).count(old) != 1:
        raise LookupError(f"lesson {number} should say once: {old}")
    names = dict(Path=Path, SimpleNamespace=SimpleNamespace, train_gpt2=train_gpt2, ledger=[])
    torch.manual_seed(0)
    for source in sources:
        exec(source.replace(old, new), names)


@pytest.mark.parametrize("bug, number, old, new", BUGS, ids=[f"{bug[0]}, {bug[1]:02}" for bug in BUGS])
def test_the_lesson_notices_the_bug(bug, number, old, new, monkeypatch):
    monkeypatch.setitem(sys.modules, "helpers", helpers)
    run_cells(number)
    with pytest.raises(AssertionError):
        run_cells(number, old, new)


def test_each_bug_of_the_readme_is_planted_where_the_readme_says():
    table = README.split("| bug |")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .* \| (\d\d(?:, \d\d)*) \|$", table, re.MULTILINE)
    said = [(row, int(number)) for row, numbers in rows for number in numbers.split(", ")]
    assert len(said) == len(BUGS)
    for row, number in said:
        assert any(row.startswith(bug[0]) and number == bug[1] for bug in BUGS), (row, number)


# ---- every cell, in a fresh kernel

@pytest.mark.slow
def test_all_run_from_top_to_bottom(monkeypatch):
    """Two kernels at a time, with one thread each; started in three different folders, which stay as they were."""
    from nbclient import NotebookClient
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folders = [LESSONS, ROOT, ROOT / "tests"]

    def execute(file):
        nb = nbformat.read(file, as_version=4)
        place = {"metadata": {"path": str(folders[NOTEBOOKS.index(file) % 3])}}
        NotebookClient(nb, timeout=600, kernel_name="python3", resources=place).execute()

    def held():
        return [sorted({file.name for file in folder.iterdir()} - {"__pycache__"}) for folder in folders]

    before = held()
    with ThreadPoolExecutor(2) as pool:
        runs = {file.stem: pool.submit(execute, file) for file in NOTEBOOKS}
    failed = {name: str(run.exception())[-1500:] for name, run in runs.items() if run.exception()}
    assert not failed, "\n\n".join(f"{name}: {error}" for name, error in failed.items())
    assert before == held()
