"""The picture of a log: what is read, what is drawn, where GPT-2's lines belong, and how the script fails."""
import json
import runpy
import sys

import pytest

from conftest import ROOT
from fineweb import UserError

sys.path.append(str(ROOT / "lessons"))
import plot_log  # noqa: E402
from plot_log import GPT2_124M, PUBLIC_RUNS, draw_logs, main, read_log  # noqa: E402

# Nothing here only rises or only falls, and no stream's last value is its best: a legend can't be right by accident.
VAL, HELLA = {0: 9.5, 100: 4.25, 200: 3.0625, 300: 3.75}, {0: 0.25, 100: 0.375, 200: 0.3125}
TRAIN = {0: 9.25, 1: 8.0, 150: 3.5, 300: 3.875}


def write_log(folder, text, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_bytes(text.encode())
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def uneven_log():
    """The curves above, out of order, with learning rate, norm and tok/s, streams that belong to no picture, and values
    that are no numbers, which are left out."""
    lines = [f"{step} {stream} {value}" for stream, points in (("val", VAL), ("train", TRAIN), ("hella", HELLA))
             for step, value in sorted(points.items(), key=lambda p: -p[0] % 7)]
    lines += ["300 lr 6e-05", "0 lr 8.4e-07", "0 norm 3.5", "300 norm 0.5", "0 tok/s 1234567.8", "300 tok/s 1.2e+06",
              "200 acc 0.9", "200 hella_norm 0.8", "200 hella_chars 0.7", "400 val nan", "7 train inf"]
    return "".join(line + "\n" for line in lines)


def panels(figure):
    return {name: panel for name, title in plot_log.TITLES.items() for panel in figure.axes
            if panel.get_title() == title}


def curves(panel):
    """The [(step, value)] of each curve; the straight lines across the panel are in `baselines`."""
    return [[tuple(map(float, xy)) for xy in line.get_xydata()] for line in panel.lines
            if list(line.get_xdata()) != [0, 1]]


def baselines(panel):
    return [line.get_ydata()[0] for line in panel.lines if list(line.get_xdata()) == [0, 1]]


def legend(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()] if panel.get_legend() else []


# ---- reading

def test_the_last_value_of_a_step_counts_and_half_a_line_does_not(tmp_path):
    text = ("0 val 10.9522\n0 train 10.955009\n1 train 10.85\n2 train 9.5\n"
            "1 train 8.25\n1 val 7e-05\r\n"            # resumed from step 1; and Windows has been here
            "2 train 1.2.3\n2 train\nhello there you\n-3 train 4\n3 train 5 6\n\n"
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
    values, config = read_log(real_data / "logs")
    assert values == expected and config == {} and len(values["train"]) == 19073
    for stream, name in (("val", "loss"), ("hella", "hella")):
        for step, value in PUBLIC_RUNS["sukhvir-notra/gpt2"][name].items():
            assert values[stream][step] == pytest.approx(value, abs=6e-4 if name == "loss" else 6e-5)


# ---- drawing

def test_each_number_is_drawn_once_and_the_legend_has_the_last_of_the_curve(tmp_path):
    a = read_log(write_log(tmp_path / "a", uneven_log(), data_dir="data/mine", vocab_size=50304))
    b = read_log(write_log(tmp_path / "b", "7 val 3.5\n3 val 3.25\n5 train 4\n0 norm nan\n"))
    shown = panels(draw_logs({"a": a, "b": b}))
    assert list(shown) == ["loss", "hella", "lr", "norm", "tok/s"]
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
    log = read_log(write_log(tmp_path / "log", uneven_log(), **config))
    longer = read_log(write_log(tmp_path / "longer", "5000 val 3\n", data_dir="data/other"))
    shown = panels(draw_logs({"log": log, "longer": longer}))
    assert baselines(shown["loss"]) == [3.2924] * comparable
    assert baselines(shown["hella"]) == [0.294463, 0.337] * comparable
    lines = ["GPT-2 (124M): 3.2924", *PUBLIC_RUNS] * comparable
    assert [label for label in legend(shown["loss"]) if "log" != label.split(":")[0] != "longer"] == lines
    for name in ("loss", "hella"):
        points = [tuple(map(float, xy)) for c in shown[name].collections for xy in c.get_offsets()]
        assert points == [(step, run[name][step]) for run in PUBLIC_RUNS.values() for step in run[name]
                          if step <= 300] * comparable                # no further than the run that they stand beside


def test_the_lines_are_the_figures_of_the_readme():
    """The table of the two public runs, and GPT-2's loss, stand in the README as well."""
    readme = (ROOT / "README.md").read_text()
    assert str(GPT2_124M["loss"]) in readme
    head = next(line for line in readme.splitlines() if line.startswith("| step |"))
    for name, points in PUBLIC_RUNS.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {name}"))
        cells = [cell.strip() for cell in row.strip("| \n").split("|")][1:]
        for step, cell in zip([int(c) for c in head.strip("| ").split("|")[1:]], cells, strict=True):
            loss, _, hella = cell.partition(" / ")
            assert points["loss"][step] == float(loss)
            assert points["hella"].get(step) == (float(hella) if hella else None)
    drawn = panels(draw_logs({name: ({"val": run["loss"]}, {}) for name, run in PUBLIC_RUNS.items()}))
    assert len(drawn["loss"].lines) == 3 and not drawn["loss"].collections  # as a log each is drawn once


# ---- the script

def test_the_script_draws_without_a_screen_and_fails_in_one_line(tmp_path, monkeypatch, capsys):
    """So without pyplot, which may look for one."""
    from matplotlib.image import imread
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    write_log(tmp_path / "log", uneven_log())

    def run(word):
        monkeypatch.setattr(sys, "argv", ["plot_log.py", word])
        runpy.run_path(str(ROOT / "lessons/plot_log.py"), run_name="__main__")
        return capsys.readouterr()

    assert run("log/log.txt") == ("wrote log/log.png\n", "")
    assert {file.name for file in (tmp_path / "log").iterdir()} == {"log.txt", "log.png"}
    assert imread("log/log.png").shape[1] == 1600
    with pytest.raises(SystemExit, match="2"):
        run("nowhere")
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("plot_log.py: nowhere: no log.txt") and said.err.count("\n") == 1


def test_several_logs_and_a_place_for_the_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(plot_log, "draw_logs", lambda logs, draw=draw_logs: seen.append(list(logs)) or draw(logs))
    for name in "abc":
        write_log(tmp_path / name, "0 val 9\n")
    assert main(["a", "b", "c/log.txt"]).samefile("a/log.png")
    assert main(["b", "--out", "x.svg"]).read_text().startswith("<?xml")
    assert seen == [["a", "b", "c/log.txt"], ["b"]]


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
    write_log(tmp_path / "a", "0 val 9\n")
    write_log(tmp_path / "empty", "no log\n7 train 3.4")
    (write_log(tmp_path / "bad", "0 val 9\n") / "config.json").write_text("[1,")
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=message) as caught:
        main(words)
    assert "\n" not in str(caught.value)
