"""README.md is true: its commands are commands, its names exist, its links lead somewhere, its sums are right, and
what it tells a newcomer to do works in that order."""
import math
import re
import shlex
import sys
from itertools import islice

import pytest

import fineweb
import hellaswag
import train_gpt2
from conftest import ROOT
from train_gpt2 import TrainConfig, main

README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)  # without the Python snippets
RUN_TOKENS = TrainConfig.max_steps * TrainConfig.total_batch_size


def commands(text):
    """The shell commands of a text, as lists of words: indented lines, and code in sentences that is one.

    >>> commands('''Do
    ...
    ...     pip install x && python a.py 1 \\\\
    ...          2
    ... or `python b.py "c d"`, but not `b.py`.''')
    [['pip', 'install', 'x'], ['python', 'a.py', '1', '2'], ['python', 'b.py', 'c d']]
    """
    text = re.sub(r" *\\\n *", " ", text)
    lines = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:python|torchrun|pip|hf) [^`]+)`", re.sub(r"\n(?! )", " ", text))
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [w for w in words if w]


COMMANDS = commands(PROSE)


def check_train_gpt2(words):
    action = words.pop(0) if words and not words[0].startswith("-") else "train"
    if words == ["--help"]:
        return
    given = vars(train_gpt2.make_parser(action).parse_args(words))
    if action == "train" and not {"init", "config"} & given.keys():  # these would look for files
        train_gpt2.parse_config(action, words)


def check_measure_speed(words):
    sys.path.insert(0, str(ROOT / "lessons"))
    import measure_speed
    names = words[:words.index("--device")] if "--device" in words else words
    assert set(names) <= {*measure_speed.BENCHES, "ladder"} and words[len(names) + 1:] in ([], ["cuda"], ["cpu"]), words


CHECKS = {"train_gpt2.py": check_train_gpt2, "fineweb.py": fineweb.parse_args, "hellaswag.py": hellaswag.parse_args,
          "lessons/measure_speed.py": check_measure_speed}


def check(words):
    """Does a program with these words exist? Returns its name."""
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser
        words = ["8" if word.startswith("$SLURM") else word for word in words]
        words = [re.sub(r"\$SLURM_NNODES", "2", word) for word in words]
        words += ["train_gpt2.py"] * (words[-1] == "3")  # a flag that is spoken of, without a program
        given = get_args_parser().parse_args(words[1:])
        CHECKS[given.training_script](list(given.training_script_args))
        return "torchrun"
    if words[:3] == ["python", "-m", "pytest"]:
        assert words[3:] in ([], ["-m", "not slow"])
        return "pytest"
    if words[0] == "python":
        CHECKS[words[1]](words[2:])
        return words[1]
    if words[0] == "pip":
        assert words[:2] == ["pip", "install"] and words[2:] in (["-r", "requirements.txt"], ["wandb"])
    elif words[0] == "jupyter":
        assert words[1] == "lab" and (ROOT / words[2]).exists()
    elif words[0] == "hf":
        assert words[1:3] == ["auth", "login"] or words[1] == "upload" and len(words) == 4
    else:
        assert words[0] in ("lm_eval", "head=$(scontrol"), words
    return words[0]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_commands(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(list(words))


def test_none_is_passed_over():
    assert len(COMMANDS) >= 40
    programs = {check(list(words)) for words in COMMANDS}
    assert programs >= {*CHECKS, "torchrun", "pytest", "pip", "jupyter", "hf", "lm_eval"}
    actions = {words[2] for words in COMMANDS if words[:2] == ["python", "train_gpt2.py"] and len(words) > 2}
    assert actions >= train_gpt2.ACTIONS.keys() - {"train"}


@pytest.mark.parametrize("words", ["python train_gpt2.py --max_step 3", "python train_gpt2.py plott --log_dir a",
                                   "torchrun --processes=2 train_gpt2.py", "torchrun nowhere.py", "python fineweb.py --tokenizer bpe:1",
                                   "python lessons/measure_speed.py nothing", "python nowhere.py",
                                   "python train_gpt2.py --n_head 5", "rm -rf x"])
def test_what_is_none_is_seen(words):
    with pytest.raises((train_gpt2.UserError, SystemExit, AssertionError, KeyError)):
        check(shlex.split(words))


def test_the_two_commands_stand_as_they_are():
    """CI takes the second from here, word for word."""
    assert "    pip install -r requirements.txt && python train_gpt2.py --preset laptop\n" in README
    found = re.findall(r"^ *(pip install -r requirements.txt && python -m pytest.*)$", README, re.MULTILINE)
    assert found[0] == "pip install -r requirements.txt && python -m pytest"


# ---- links and names

def headings():
    return re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)


def test_links_lead_somewhere():
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings()}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 10
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_tests_that_are_named_exist():
    """`test_x.py`, `test_x.py::test_y`, with * for any ending."""
    named = re.findall(r"`(test_\w+\.py)(?:::([\w*]+))?`", README)
    assert len({file for file, _ in named}) >= 14
    for file, name in named:
        source = (ROOT / "tests" / file).read_text()
        assert re.search(rf"def {name.replace('*', '')}", source) if name else source, (file, name)
    for name in re.findall(r", `(test_\w+\*?)`", README):  # the second of two in one file
        if not name.endswith(".py"):
            assert any(f"def {name.rstrip('*')}" in f.read_text() for f in (ROOT / "tests").glob("test_*.py")), name


def section(title):
    """The text under a heading, up to the next one of its level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def test_names_of_the_code_exist():
    """What stands in the first column of the tables on how to read and change the code."""
    source = (ROOT / "train_gpt2.py").read_text()
    tables = section("How to read the code") + section("For the researcher").split("What holds")[0]
    names = re.findall(r"`([A-Za-z_][\w.]*?)(?:\([\w, ]*\))?`", tables)
    assert len(names) > 40
    words = {"step", "train", "json", "loss"}
    for name in {name for name in names} - words:
        if not name.endswith((".py", ".txt", ".ipynb", ".json")):
            assert re.search(rf"\b{re.escape(name.split('.')[-1])}\b", source), name


def test_files_that_are_named_exist():
    table = re.findall(r"^\| `([\w./]+)` \|", README.split("## For the learner")[0], re.MULTILINE)
    assert len(table) == 6 and all((ROOT / name).exists() for name in table)


def test_the_picture_is_small():
    assert (ROOT / "lessons/measured/laptop.png").stat().st_size <= 60_000


# ---- numbers

def test_hours_and_money():
    rows = [[cell.strip() for cell in row.strip("|").split("|")]
            for row in re.findall(r"^\|.*\|$", section("On eight GPUs: the paper run"), re.MULTILINE)]
    rows = [row for row in rows if len(row) == 5][2:]
    assert len(rows) == 3
    for _, _, rate, hours, _ in rows:
        rate = float(re.search(r"[\d,]{6,}", rate)[0].replace(",", ""))
        assert float(hours) == pytest.approx(RUN_TOKENS / rate / 3600, rel=0.02)
    money, price = re.search(r"\$(\d+) at \$([\d.]+) a GPU", rows[0][4]).groups()
    assert int(money) == round(RUN_TOKENS / 1.1e6 / 3600 * 8 * float(price))
    assert float(re.search(r"([\d,]+)$", rows[1][2])[1].replace(",", "")) == pytest.approx(RUN_TOKENS / 90 / 60, rel=0.01)


N, P = 10042, 0.294463  # HellaSwag's questions, and GPT-2's share of right answers in build-nanogpt's plots
FIRST = math.log(50257) + (0.02 * math.sqrt(768)) ** 2 / 2


@pytest.mark.parametrize("words, stated, true", [
    ("ln V = 10.82", 10.82, math.log(50257)), ("0.02·√768 = 0.554", 0.554, 0.02 * math.sqrt(768)),
    ("about s²/2 more: 10.98", 10.98, FIRST), ("9.854 billion tokens, 18,795 steps", 18_795, 9.854e9 / 524_288),
    ("19,073 steps of 524,288 tokens", 19_073, TrainConfig.max_steps), ("The run is 10.0 billion", 10.0, RUN_TOKENS / 1e9),
    ("0.294463 = 2957 of 10,042", 0.294463, 2957 / N), ("0.2955 is 2967, ten more", 0.2955, 2967 / N),
    ("error is 0.0045, or 45 questions", 0.0045, round(math.sqrt(P * (1 - P) / N), 4)), ("or 45 questions", 45, 0.0045 * N),
    ("10.5 million tokens on eight GPUs with 64 rows", 10.5e6, 20 * 64 * 1024 * 8),
    ("0.3 million on one with 16", 0.3e6, 20 * 16 * 1024), ("are 12.3 GiB", 12.3, 64 * 1024 * 50304 * 4 / 2 ** 30),
    ("`--val_tokens`, 10,485,760 tokens", 10_485_760, TrainConfig.val_tokens),
    ("124,475,904 in all", 124_475_904, 124_439_808 + 47 * 768), ("the next 512 of a permutation", 512, 524_288 / 1024),
    ("(1, 64, 1024)", 1, 524_288 / 1024 / 64 / 8), ("715 steps of warm-up are GPT-3's 375 million", 715, 375e6 / 524_288),
    ("a little over one epoch", 1, 9.854e9 / 524_288 / 18_795), ("three checkpoints of 1.5 GB", 1.5, 3 * 4 * 0.1245),
    ("leaves 100 shards", 100, math.ceil(fineweb.FINEWEB_TOKENS / 100_000_000)),
    ("20 GB of shards", 20, fineweb.FINEWEB_TOKENS * 2 / 1e9)])
def test_numbers_in_sentences_are_right(words, stated, true):
    assert words in re.sub(r"\s+", " ", README)
    assert stated == (round(true) if isinstance(stated, int) else pytest.approx(true, rel=0.1 if stated == 0.3e6 else 0.01))


# ---- the questions

def test_every_question_has_a_short_answer():
    answers = re.findall(r"^\*\*(.+?)\*\*(.+?)(?=\n\n|\s*\Z)", section("Questions"), re.MULTILINE | re.DOTALL)
    assert len(answers) >= 50
    for question, answer in answers:
        plain = re.sub(r"`[^`]*`", "x", answer)
        assert 1 <= len(re.findall(r"[.?!](?:\s|$)", plain)) <= 3, question


# ---- what a newcomer does

@pytest.mark.slow
def test_the_page_works_in_its_order(tmp_path, monkeypatch, capsys):
    """"On a laptop" line by line, with a smaller model and few steps, then its Python snippets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("\n\n".join(islice(fineweb.builtin_documents(), 150)))
    smaller = ("--n_layer 2 --n_head 4 --n_embd 64 --block_size 64 --max_steps 20 --warmup_steps 2 --val_tokens 4096 "
               "--val_every 10 --checkpoint_every 10").split()
    lines = commands(section("On a laptop").split("```")[0]) + commands(section("On a laptop").split("```")[2])
    assert len([words for words in lines if words[:2] == ["python", "train_gpt2.py"]]) >= 7
    for words in lines:
        if "--help" in words:
            continue
        if words[1] == "fineweb.py":
            fineweb.main(words[2:])
        elif words[2] == "plot" and "log/earlier-1" in words:
            main(["--preset", "laptop", *smaller])         # a second run: the first is moved aside
            main(words[2:])
        else:
            main(words[2:] + smaller * words[2].startswith("-"))
    assert (tmp_path / "log/log.png").exists() and (tmp_path / "log/earlier-1").is_dir()
    assert (tmp_path / "log_book/log.txt").exists()
    main(["--init", "my-gpt2", "--data_dir", "data/builtin", "--log_dir", "log_tuned", *smaller[8:], "--hellaswag_every", "0",
          "--total_batch_size", "2048", "--sample_every", "0"])      # an exported folder can be trained further
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    capsys.readouterr()
    for snippet in snippets:
        exec(snippet, {})
        assert "Return the" in capsys.readouterr().out
