"""The picture of a log: what is read, what is drawn, where GPT-2's lines belong, and how the script fails."""
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from conftest import ROOT
from fineweb import UserError

sys.path.append(str(ROOT / "lessons"))
import plot_log  # noqa: E402
from plot_log import GPT2_124M, PUBLIC_RUNS, draw_logs, main, read_log  # noqa: E402

# Nothing here only rises or only falls, and no stream's last value is its best: a legend can't be right by accident.
# Out of order, and with streams that belong to no picture and values that are no numbers, which are left out.
VAL, HELLA = {0: 9.5, 100: 4.25, 200: 3.0625, 300: 3.75}, {0: 0.25, 100: 0.375, 200: 0.3125}
TRAIN = {0: 9.25, 1: 8.0, 150: 3.5, 300: 3.875}
UNEVEN = "\n".join([f"{step} {stream} {value}" for stream, points in (("val", VAL), ("train", TRAIN), ("hella", HELLA))
                    for step, value in sorted(points.items(), key=lambda p: -p[0] % 7)]) + """
300 lr 6e-05\n0 lr 8.4e-07\n0 norm 3.5\n300 norm 0.5\n0 tok/s 1234567.8\n300 tok/s 1.2e+06
200 acc 0.9\n200 hella_norm 0.8\n200 hella_chars 0.7\n400 val nan\n7 train inf
"""


def write_log(folder, text=UNEVEN, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_bytes(text.encode())
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def panels(logs):
    """What draw_logs draws -> {name: panel}."""
    titles = {title: name for name, title in plot_log.TITLES.items()}
    return {titles[panel.get_title()]: panel for panel in draw_logs(logs).axes}


def curves(panel, across=False):
    """The [(step, value)] of each curve, or of each straight line across the panel."""
    return [[tuple(map(float, xy)) for xy in line.get_xydata()] for line in panel.lines
            if (list(line.get_xdata()) == [0, 1]) == across]


def legend(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()] if panel.get_legend() else []


# ---- reading

def test_the_last_value_of_a_step_counts_and_half_a_line_does_not(tmp_path):
    text = ("0 val 10.9522\n0 train 10.955009\n1 train 10.85\n2 train 9.5\n"
            "1 train 8.25\n1 val 7e-05\r\n"            # resumed from step 1; and Windows has been here
            "2 train 1.2.3\n2 train\nhello there you\n-3 train 4\n\n"
            "3 lr -0.5\n4 lr 6.0e-4\n5 norm inf\n6 tok/s 1.2e+06\n7 tok/s 3812345.6\n8 train 3.4")  # killed here
    values, config = read_log(write_log(tmp_path, text))
    assert config == {} and values == {
        "val": {0: 10.9522, 1: 7e-5}, "train": {0: 10.955009, 1: 8.25, 2: 9.5}, "lr": {3: -0.5, 4: 6e-4},
        "norm": {5: float("inf")}, "tok/s": {6: 1.2e6, 7: 3812345.6}}
    assert read_log(tmp_path / "log.txt") == (values, config)         # the file serves as well as its folder


def test_a_public_runs_log_is_read(real_data):
    """build-nanogpt's notebook splits each line at its spaces; so does this. The table of public runs is from it."""
    expected = {}
    for line in (real_data / "logs/gpt2_124M_fineweb_edu_10B_log.txt").read_text().splitlines():
        step, stream, value = line.split()
        expected.setdefault(stream, {})[int(step)] = float(value)
    assert read_log(real_data / "logs") == (expected, {}) and len(expected["train"]) == 19073
    for stream, name, digits in ("val", "loss", 3), ("hella", "hella", 4):
        for step, value in PUBLIC_RUNS["sukhvir-notra/gpt2"][name].items():
            assert expected[stream][step] == pytest.approx(value, abs=0.6 * 10 ** -digits)


# ---- drawing

def test_each_number_is_drawn_once_and_the_legend_has_the_last_of_the_curve(tmp_path):
    a = read_log(write_log(tmp_path / "a", data_dir="data/mine", vocab_size=50304))
    b = read_log(write_log(tmp_path / "b", "7 val 3.5\n3 val 3.25\n5 train 4\n0 norm nan\n"))
    shown = panels({"a": a, "b": b})
    assert {name: curves(panel) for name, panel in shown.items()} == dict(
        loss=[sorted(TRAIN.items()), sorted(VAL.items()), [(5, 4)], [(3, 3.25), (7, 3.5)]],
        hella=[sorted(HELLA.items())],                                # acc_norm, and no other of the three scores
        lr=[[(0, 8.4e-7), (300, 6e-5)]], norm=[[(0, 3.5), (300, 0.5)]], **{"tok/s": [[(0, 1234567.8), (300, 1.2e6)]]})
    assert legend(shown["loss"])[:2] == ["a: 3.7500 on mine", "b: 3.5000"]    # a loss names its text
    assert legend(shown["hella"])[0] == "a: 0.3125"
    colors = [line.get_color() for line in shown["loss"].lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]           # one color for each run


@pytest.mark.parametrize("config, comparable", [
    ({}, True),                                                       # build-nanogpt writes none
    (dict(data_dir="data/edu_fineweb10B", vocab_size=50304), True),
    (dict(data_dir="/home/edu/data/tinystories", vocab_size=50304), False),  # another text
    (dict(data_dir="data/edu_fineweb10B", vocab_size=1024), False)])  # another vocabulary
def test_gpt2s_lines_stand_where_they_mean_something(tmp_path, config, comparable):
    longer = read_log(write_log(tmp_path / "longer", "5000 val 3\n", data_dir="data/other"))
    shown = panels({"log": read_log(write_log(tmp_path / "log", **config)), "longer": longer})
    for name, lines in ("loss", [3.2924]), ("hella", [0.294463, 0.337]):
        assert [line[0][1] for line in curves(shown[name], across=True)] == lines * comparable
        points = [tuple(map(float, xy)) for c in shown[name].collections for xy in c.get_offsets()]
        assert points == [(step, run[name][step]) for run in PUBLIC_RUNS.values() for step in run[name]
                          if step <= 300] * comparable                # no further than the run that they stand beside
    assert legend(shown["loss"])[2:] == ["GPT-2 (124M): 3.2924", *PUBLIC_RUNS] * comparable


def test_the_lines_are_the_figures_of_the_readme():
    """The table of the two public runs, and GPT-2's loss, stand in the README as well."""
    readme = (ROOT / "README.md").read_text()
    assert str(GPT2_124M["loss"]) in readme
    head, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in readme.splitlines()
                   if line.startswith(("| step |", *(f"| {name}" for name in PUBLIC_RUNS))))
    for points, row in zip(PUBLIC_RUNS.values(), rows, strict=True):
        for step, cell in zip(map(int, head[1:]), row[1:], strict=True):
            loss, _, hella = cell.partition(" / ")
            assert (points["loss"][step], points["hella"].get(step)) == (float(loss), float(hella) if hella else None)
    drawn = panels({name: ({"val": run["loss"]}, {}) for name, run in PUBLIC_RUNS.items()})
    assert len(drawn["loss"].lines) == 3 and not drawn["loss"].collections  # as a log each is drawn once


# ---- the script

def test_the_script_draws_without_a_screen_beside_the_first_log_or_where_it_is_told(tmp_path, monkeypatch, capsys):
    """So without pyplot, which may look for a screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for name in "ab":
        write_log(Path(name))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["plot_log.py", *words])
        runpy.run_path(plot_log.__file__, run_name="__main__")
        return capsys.readouterr()

    assert run("a/log.txt") == ("wrote a/log.png\n", "") and imread("a/log.png").shape[1] == 1600
    assert run("b", "a").out == "wrote b/log.png\n" and sorted(os.listdir("b")) == ["log.png", "log.txt"]
    run("a", "b/log.txt", "--out", "both.svg")
    picture = Path("both.svg").read_text()
    assert "<!-- a: 3.7500 -->" in picture and "<!-- b/log.txt: 3.7500 -->" in picture
    with pytest.raises(SystemExit, match="2"):
        run("nowhere")
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("plot_log.py: nowhere: no log.txt") and said.err.count("\n") == 1


@pytest.mark.parametrize("words, message", [
    (["a", "empty"], "empty: no log.txt"),
    (["bad"], "bad/config.json"),
    (["a", "--out", "nowhere/x.png"], "nowhere/x.png can't be written"),
    (["a", "--out", "x.doc"], "x.doc can't be written"),
    (["a", "--oops"], "--oops"),
    ([], "LOG"),
    (["a"], "pip install matplotlib")])
def test_bad_input_is_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_log(Path("a"))
    write_log(Path("empty"), "no log\n7 train 3.4")
    (write_log(Path("bad")) / "config.json").write_text("[1,")
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=message) as caught:
        main(words)
    assert "\n" not in str(caught.value)
