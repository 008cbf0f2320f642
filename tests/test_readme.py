"""The README and the pages it leads to are true: their commands are commands, their links lead somewhere, their sums
are right, and what they tell a newcomer to do works in that order."""
import json
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
from train_gpt2 import TrainConfig, UserError, main

sys.path.insert(0, str(ROOT / "lessons"))
import explore  # noqa: E402  (found through the line above)
import measure_speed  # noqa: E402
import plot_log  # noqa: E402

NAMES = ["README.md", "lessons/questions.md", "lessons/measured/README.md", "tests/README.md"]
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README, QUESTIONS = PAGES["README.md"], PAGES["lessons/questions.md"]
RUN_TOKENS = TrainConfig.max_steps * TrainConfig.total_batch_size


def section(title):
    """The text under a heading, up to the next one of its level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


# ---- commands

def commands(text):
    """The shell commands of a text, as lists of words: indented lines, and code in sentences that is one."""
    text = re.sub(r" *\\\n *", " ", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:python|torchrun|pip|hf) [^`]+)`", re.sub(r"\n(?! )", " ", text))
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [w for w in words if w]


def check_train_gpt2(words):
    action = words.pop(0) if words and not words[0].startswith("-") else "train"
    assert action in train_gpt2.ACTIONS
    given = vars(train_gpt2.make_parser(action).parse_args(words))
    if action == "train" and not {"init", "config"} & given.keys():  # these would look for files
        train_gpt2.parse_config(action, words)


def runs_until_it_misses_its_input(program):
    def check(words):
        with pytest.raises(UserError, match="no log.txt|no such checkpoint|no benchmark here"):
            program(words)
    return check


CHECKS = {"train_gpt2.py": check_train_gpt2, "fineweb.py": fineweb.parse_args, "hellaswag.py": hellaswag.parse_args,
          **{f"lessons/{module.__name__}.py": runs_until_it_misses_its_input(module.main)
             for module in (plot_log, explore, measure_speed)}}
OTHERS = (r"python (-m pytest( -m not slow| tests/test_\w+.py)?|\S+ --help)|pip install (-r requirements.txt|wandb)|"
          r"hf auth login|hf upload \S+ \S+|(lm_eval|head=\$\(scontrol) .*")


def check(words):
    """Fails unless a program takes these words."""
    words = words[words[0] == "srun":]
    assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser
        given = get_args_parser().parse_args([word.replace("$SLURM_NNODES", "2") for word in words[1:]])
        words = ["python", given.training_script, *given.training_script_args]
    if not re.fullmatch(OTHERS, " ".join(words)):
        assert words[0] == "python", words
        CHECKS[words[1]](words[2:])


@pytest.mark.parametrize("page, least", [*zip(NAMES, [30, 15, 3, 3])])
def test_commands_are_commands(page, least, tmp_path, monkeypatch):
    def bench(**how):
        raise UserError("no benchmark here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure_speed, "BENCHES", dict.fromkeys(measure_speed.BENCHES, bench))
    found = commands(PAGES[page])
    assert len(found) >= least
    for words in found:
        check(words)


def test_the_readme_is_short_and_shows_every_action_and_two_commands():
    """.ci/run takes the second of them from here, word for word; GitHub's workflow has it too."""
    shown = {words[2] for words in commands(README) if words[:2] == ["python", "train_gpt2.py"] and len(words) > 2}
    assert shown >= train_gpt2.ACTIONS.keys() - {"train"} and len(README.splitlines()) <= 260
    assert "    pip install -r requirements.txt && python train_gpt2.py --preset laptop\n" in README
    found = re.findall(r"^ *(pip install -r requirements.txt && python -m pytest.*)$", README, re.MULTILINE)
    assert found == ["pip install -r requirements.txt && python -m pytest"]
    assert f"run: {found[0]}\n" in (ROOT / ".github/workflows/test.yml").read_text()


# ---- links and names

def anchors(text):
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    text, folder = PAGES[page], (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        file, _, anchor = link.partition("#")
        assert not file or (folder / file).exists(), link
        assert not anchor or anchor in anchors((folder / file).read_text() if file else text), link


def test_files_and_names_that_are_named_exist():
    tests = {file.name for file in (ROOT / "tests").glob("test_*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", PAGES["tests/README.md"])) == tests
    source = (ROOT / "train_gpt2.py").read_text()
    figure = re.findall(r"^(\w[\w.]+)", section("How to read the code").split("```")[1], re.MULTILINE)
    table = re.findall(r"`([A-Za-z_][\w.]*)`", section("For research").split("|---|")[1].split("\n\n")[0])
    assert len(figure) >= 9 and len(table) >= 9
    for name in {*figure, *table} - {"fineweb.py"}:
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), name


# ---- numbers

def test_hours_are_tokens_over_pace():
    rows = re.findall(r"^\| .* \| ([\d,]{6,}) \| ([\d.]+) \|", section("On eight GPUs: the paper run"), re.MULTILINE)
    assert len(rows) == 5
    for rate, hours in rows:
        exact = RUN_TOKENS / float(rate.replace(",", "")) / 3600
        assert hours == f"{exact:.{len(hours.partition('.')[2])}f}"


def test_measurements_are_those_that_are_kept():
    page, measured = PAGES["lessons/measured/README.md"], ROOT / "lessons/measured"
    cpu, muon = (json.loads((measured / name).read_text()) for name in ("speed_cpu.json", "muon.json"))
    memory = {(row["rows"], row["computed_gb"], row["eager_gb"]) for row in cpu["rows"]["table"]
              if row["preset"] == "gpt2"}
    for text in (README, page):
        rows = re.findall(r"^\| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \|", text, re.MULTILINE)
        assert len(rows) >= 4 and {tuple(map(float, row)) for row in rows} <= memory
    assert set(re.findall(r"^\| (\w.*?) \| ([12]\.\d{3}) \|", page, re.MULTILINE)) == {
        (row["recipe"], f"{row['bits_per_byte']:.3f}") for row in cpu["laptop"]["recipes"]}
    assert "1.965 against 2.674 bits per byte" in README
    ladders = [{row["rung"]: f"{row.get('tok_s', 0):,.0f}" for row in ladder["rows"]} for ladder in cpu["ladders"]]
    large, small = [(rung["ours, by default"], rung["build-nanogpt, float32"]) for rung in ladders]
    assert f"{small[0]} against {small[1]} tokens/s (6 layers of 192), {large[0]} against {large[1]} (124M)" in README
    assert "78 % fewer tokens at 2 layers of 64, 70 % fewer at 4 layers of 128" in README
    assert [round(100 * size["saving"]) for size in muon["sizes"]] == [78, 70]


N, P = 10042, 0.294463  # HellaSwag's questions, and GPT-2's share of right answers in build-nanogpt's plots
FIRST = math.log(50257) + (0.02 * math.sqrt(768)) ** 2 / 2


@pytest.mark.parametrize("words, stated, true", [
    ("ln V = 10.82", 10.82, math.log(50257)), ("0.02·√768 = 0.554", 0.554, 0.02 * math.sqrt(768)),
    ("about s²/2 more: 10.98", 10.98, FIRST),
    ("18,794 whole steps", 18_794, math.floor((fineweb.FINEWEB_TOKENS - 1e8) / 524_288)),
    ("19,073 steps of 524,288 tokens", 19_073, TrainConfig.max_steps),
    ("The run is 10.0 billion", 10.0, RUN_TOKENS / 1e9),
    ("H100 | 3,800,000", 3.8e6, 19560 * 524_288 / 45 / 60), ("A100 80 GB | 1,850,000", 1.85e6, RUN_TOKENS / 90 / 60),
    ("0.294463 = 2957 of 10,042", 0.294463, 2957 / N), ("0.2955 is 2967, ten more", 0.2955, 2967 / N),
    ("error is 0.0045, or 45 questions", 0.0045, math.sqrt(P * (1 - P) / N)),
    ("or 45 questions", 45, 0.0045 * N),
    ("10.5 million tokens on eight GPUs with 64 rows", 10.5e6, 20 * 64 * 1024 * 8),
    ("0.3 million on one with 16", 0.33e6, 20 * 16 * 1024), ("12.3 GiB", 12.3, 64 * 1024 * 50304 * 4 / 2 ** 30),
    ("10,485,760 tokens", 10_485_760, TrainConfig.val_tokens), ("at least 17 % too low", 17, 100 - 100 * 33.1 / 40),
    ("124,475,904 in all", 124_475_904, 124_439_808 + 47 * 768), ("(512,)", 512, 524_288 / 1024),
    ("(2, 32, 1024)", 2, 524_288 / 1024 / 32 / 8),
    ("gets 32 rows at most", 32, 2 ** math.floor(math.log2(2**31 / 1024 / 50304))),
    ("715 steps of warm-up are GPT-3's 375 million", 715, 375e6 / 524_288),
    ("need 4.5 GB: three of 1.5 GB", 4.5, 9 * 4 * 0.1245),
    ("100 shards, 20 GB", 100, math.ceil(fineweb.FINEWEB_TOKENS / 1e8)),
    ("(20 GB)", 20, fineweb.FINEWEB_TOKENS * 2 / 1e9)])
def test_numbers_in_sentences_are_right(words, stated, true):
    assert words in re.sub(r"\s+", " ", README + QUESTIONS)
    assert stated == (round(true) if isinstance(stated, int) else pytest.approx(true, rel=0.02))


def test_every_question_has_a_short_answer():
    answers = re.findall(r"^### (.+?)\n+(.+?)(?=\n#|\Z)", QUESTIONS, re.MULTILINE | re.DOTALL)
    assert len(answers) >= 60
    for question, answer in answers:
        plain = re.sub(r"`[^`]*`", "x", re.sub(r"^    .*$", "", answer, flags=re.MULTILINE))
        assert 1 <= len(re.findall(r"[.?!](?:\s|$)", plain)) <= 5, question


# ---- what a newcomer does

@pytest.mark.slow
def test_the_first_fifteen_minutes(tmp_path, monkeypatch, capsys):
    """"Fifteen minutes on a laptop" line by line, with a smaller model and fewer steps, then the snippet of Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("\n\n".join(islice(fineweb.builtin_documents(), 150)))
    smaller = ("--n_layer 2 --n_head 4 --n_embd 64 --block_size 64 --max_steps 20 --warmup_steps 2 --val_tokens 4096 "
               "--val_every 10 --checkpoint_every 10").split()
    programs = {"train_gpt2.py": main, "fineweb.py": fineweb.main, "lessons/plot_log.py": plot_log.main,
                "lessons/explore.py": explore.main}
    lines = [words for words in commands(section("Fifteen minutes on a laptop")) if "--help" not in words]
    assert len(lines) == 8
    for words in lines:
        programs[words[1]](words[2:] + smaller * (words[2] == "--preset"))
    assert (tmp_path / "log/log.png").exists() and (tmp_path / "my-gpt2.html").stat().st_size > 100_000
    assert (tmp_path / "log_book/log.txt").exists()
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})
    assert "Return the" in capsys.readouterr().out
