"""The picture of a log: what is read, what is drawn, where GPT-2's line belongs, and that it never stops a run."""
import json
import subprocess
import sys

import pytest

import train_gpt2
from conftest import ROOT
from helpers import FakeWorld, tiny_config
from launch import words, write_data
from train_gpt2 import GPT2_124M, PUBLIC_RUNS, Log, UserError, draw_logs, main, read_log

PNG = b"\x89PNG\r\n\x1a\n"


def write_log(folder, text, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_bytes(text.encode())
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def long_log(steps=600, every=100):
    lines = []
    for step in range(steps + 1):
        lines += [f"{step} val {9 - step / 100:.4f}\n{step} hella {0.25 + step / 1e4:.4f}\n"] * (step % every == 0)
        lines += [f"{step} train {9 - step / 100:.6f}\n{step} lr 6e-05\n{step} norm 0.5\n{step} tok/s 1234.5\n"]
    return "".join(lines)


def curves(panel):
    """{first word of the label, or the curve's place: [(step, value)]} of all but straight lines across the panel."""
    return {line.get_label().split(":")[0]: [tuple(map(float, xy)) for xy in line.get_xydata()]
            for line in panel.lines if list(line.get_xdata()) != [0, 1]}


def panels(figure):
    return {name: panel for name, title in train_gpt2.LOG_TITLES.items() for panel in figure.axes
            if panel.get_title() == title}


def baselines(panel):
    return [line.get_ydata()[0] for line in panel.lines if list(line.get_xdata()) == [0, 1]]


# ---- reading

def test_the_last_value_of_a_step_counts_and_half_a_line_does_not(tmp_path):
    text = ("0 val 10.9522\n0 train 10.955009\n1 train 10.85\n2 train 9.5\n"
            "1 train 8.25\n1 val 7e-05\r\n"            # went on from step 1; and Windows has been here
            "2 train 1.2.3\n2 train\nhello there you\n-3 train 4\n3 train 5 6\n\n"
            "4 lr 6.0e-4\n5 norm inf\n6 tok/s 1.5e+06\n7 train 3.4")  # killed while it wrote
    values, config = read_log(write_log(tmp_path, text))
    assert config == {} and values == {"val": {0: 10.9522, 1: 7e-5}, "train": {0: 10.955009, 1: 8.25, 2: 9.5},
                                       "lr": {4: 6e-4}, "norm": {5: float("inf")}, "tok/s": {6: 1.5e6}}


def test_what_a_run_writes_is_read_back(tmp_path):
    log = Log(tiny_config(log_dir=str(tmp_path)), FakeWorld(), 0)
    for step in range(3):
        log.write(step, {"train": 2 / (step + 3), "lr": 1e-7 / 3, "tok/s": 1e7 / 3, "norm": 1e30})
    values, config = read_log(tmp_path)
    assert {s: {k: pytest.approx(v, rel=1e-7) for k, v in p.items()} for s, p in log.values.items()} == values
    assert config["n_layer"] == 3
    assert read_log(tmp_path / "log.txt") == (values, config)         # the file serves as well as its folder


@pytest.mark.parametrize("text", [None, "", "7 train 3.4", "not a log\n"])
def test_a_folder_without_a_log_is_refused(tmp_path, text):
    if text is not None:
        write_log(tmp_path / "log", text)
    with pytest.raises(UserError, match="log: there is no log.txt"):
        main(["plot", "--log_dir", str(tmp_path / "log")])


def test_a_public_runs_log_is_read(real_data):
    """build-nanogpt's notebook splits each line at its spaces; so does this. The table of public runs is from it."""
    expected = {}
    for line in (real_data / "logs/gpt2_124M_fineweb_edu_10B_log.txt").read_text().splitlines():
        step, stream, value = line.split()
        expected.setdefault(stream, {})[int(step)] = float(value)
    values, config = read_log(real_data / "logs")
    assert values == expected and config == {} and len(values["train"]) == 19073
    for stream, name in (("val", "loss"), ("hella", "hella")):
        for step, value in PUBLIC_RUNS["sukhvir-notra/gpt2"][name].items():
            assert values[stream][step] == pytest.approx(value, abs=6e-4 if name == "loss" else 6e-5)


# ---- drawing

def test_every_number_of_the_log_is_in_the_picture(tmp_path):
    a = read_log(write_log(tmp_path / "a", long_log(), data_dir="data/mine", vocab_size=50304))
    b = read_log(write_log(tmp_path / "b", "7 val 3.5\n3 val 4.5\n5 train 4\n"))  # not in order, and few
    shown = panels(draw_logs({"a": a, "b": b}))
    assert list(shown) == ["loss", "hella", "lr", "norm", "tok/s"]
    assert sorted(map(sorted, curves(shown["loss"]).values())) == sorted(
        sorted(log[0][stream].items()) for log in (a, b) for stream in ("train", "val"))
    assert curves(shown["loss"])["b"] == [(3, 4.5), (7, 3.5)]         # a line from left to right
    for stream in ("hella", "lr", "norm", "tok/s"):
        assert list(curves(shown[stream]).values()) == [sorted(a[0][stream].items())]
    labels = [text.get_text() for text in shown["loss"].get_legend().get_texts()]
    assert labels[:2] == ["a: 3.0000 on mine", "b: 3.5000"]           # a loss names its text


def test_panels_without_numbers_are_left_out(tmp_path):
    shown = draw_logs({"a": read_log(write_log(tmp_path, "0 train 3\n1 train 2\n"))})
    assert list(panels(shown)) == ["loss"] and len(shown.axes) == 1
    shown = draw_logs({"a": read_log(write_log(tmp_path, "0 train 3\n0 norm 2\n0 other 1\n"))})
    assert list(panels(shown)) == ["loss", "norm"] and len(shown.axes) == 2


@pytest.mark.parametrize("config, comparable", [
    ({}, True),                                                       # build-nanogpt writes none
    (dict(data_dir="data/edu_fineweb10B", vocab_size=50304), True),
    (dict(data_dir="/home/edu/data/tinystories", vocab_size=50304), False),  # other text
    (dict(data_dir="data/builtin", vocab_size=1024), False),
    (dict(data_dir="data/edu", vocab_size=1024), False)])             # another vocabulary
def test_gpt2s_line_stands_where_it_means_something(tmp_path, config, comparable):
    shown = panels(draw_logs({"log": read_log(write_log(tmp_path, long_log(), **config))}))
    assert baselines(shown["loss"]) == [3.2924] * comparable
    assert baselines(shown["hella"]) == [0.294463, 0.337] * comparable
    for name in ("loss", "hella"):
        points = [tuple(map(float, xy)) for c in shown[name].collections for xy in c.get_offsets()]
        assert points == [(step, run[name][step]) for run in PUBLIC_RUNS.values() for step in run[name]
                          if step <= 600] * comparable                # no further than the run has come


def test_the_lines_are_the_figures_of_the_readme():
    """The table of the two public runs, and GPT-2's loss, stand in the README as well."""
    readme = (ROOT / "README.md").read_text()
    assert str(GPT2_124M["loss"]) in readme
    for name, points in PUBLIC_RUNS.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {name}"))
        cells = [cell.strip() for cell in row.strip("| \n").split("|")][1:]
        head = next(line for line in readme.splitlines() if line.startswith("| step |"))
        for step, cell in zip([int(c) for c in head.strip("| ").split("|")[1:]], cells, strict=True):
            loss, _, hella = cell.partition(" / ")
            assert points["loss"][step] == float(loss)
            assert points["hella"].get(step) == (float(hella) if hella else None)


# ---- the action

def test_plot_writes_a_picture_without_a_screen(tmp_path):
    """In a process of its own that may not look for one: pyplot would choose a window where there is one."""
    write_log(tmp_path / "log", long_log(20, 10))
    code = ("import sys; sys.argv = ['t', 'plot', '--log_dir', 'log']; import train_gpt2; train_gpt2.main()\n"
            "assert 'matplotlib.pyplot' not in sys.modules and 'matplotlib.backends.backend_agg' in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "MPLBACKEND": "TkAgg",
                               "MPLCONFIGDIR": str(tmp_path / "mpl"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote log/log.png\n" and (tmp_path / "log/log.png").read_bytes()[:8] == PNG


def test_plot_takes_many_logs_and_a_place_for_the_picture(tmp_path, monkeypatch):
    from matplotlib.image import imread
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(train_gpt2, "draw_logs", lambda logs, draw=draw_logs: seen.append(list(logs)) or draw(logs))
    for name in "abc":
        write_log(tmp_path / name, long_log(20, 10))
    assert main(["plot", "--log_dir", "a", "b", "c/log.txt"]).samefile("a/log.png")
    assert main(["plot", "--log_dir", "c/log.txt"]).samefile("c/log.png")
    assert main(["plot", "--log_dir", "b", "--out", "x.svg"]).read_text().startswith("<?xml")
    assert seen == [["a", "b", "c/log.txt"], ["c/log.txt"], ["b"]]
    assert imread("a/log.png").shape[2] == 4                          # a whole picture
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"log.txt", "log.png"}
    for out in ("nowhere/x.png", "x.doc"):
        with pytest.raises(UserError, match=f"{out} can't be written"):
            main(["plot", "--log_dir", "a", "--out", out])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        main(["plot", "--log_dir", "a"])


# ---- while a run goes on

@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it on."""
    now = [1000.0]
    monkeypatch.setattr(train_gpt2.time, "monotonic", lambda: now[0])
    return now


def test_a_run_refreshes_its_picture_twice_a_minute(tmp_path, clock):
    cfg = tiny_config(log_dir=str(tmp_path), max_steps=9)
    log, picture = Log(cfg, FakeWorld(), 0), tmp_path / "log.png"
    log.write(0, {"train": 3.5, "val": 3.25})
    log.draw(0, cfg)
    assert not picture.exists()                                       # a run of seconds needs none
    clock[0] += 31
    log.draw(1, cfg)
    assert picture.read_bytes()[:8] == PNG
    picture.unlink()
    clock[0] += 29
    log.draw(2, cfg)
    assert not picture.exists()
    log.draw(9, cfg)                                                  # the last step
    assert picture.exists()
    second = Log(tiny_config(log_dir=str(tmp_path)), FakeWorld(), 0)  # moves the first aside
    assert not picture.exists() and (tmp_path / "earlier-1/log.png").exists()
    second.file = None                                                # any process but the first
    clock[0] += 99
    second.write(0, {"train": 3.5})
    second.draw(9, cfg)
    assert not picture.exists()


def test_a_picture_that_fails_costs_one_warning(tmp_path, clock, monkeypatch, capsys):
    cfg = tiny_config(log_dir=str(tmp_path), max_steps=9)
    log = Log(cfg, FakeWorld(), 0)
    log.write(0, {"train": 3.5})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for step in (1, 2, 9):
        clock[0] += 31
        log.draw(step, cfg)
    assert capsys.readouterr().out.count("WARNING: no picture of the log (ModuleNotFoundError") == 1


def test_a_run_draws_at_its_evaluations_only(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_gpt2.Log, "draw", lambda self, step, cfg: drawn.append(step))
    monkeypatch.chdir(tmp_path)
    main(words(data_dir=write_data(tmp_path / "data"), max_steps=5, val_every=2, checkpoint_every=0))
    assert drawn == [0, 2, 4, 5]
