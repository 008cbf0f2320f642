"""--wandb: what a run sends. With a stand-in that takes it down."""
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest

import train_gpt2
from launch import run, saved, words, write_data
from train_gpt2 import UserError, main, parse_config


class StandIn(SimpleNamespace):
    """A module `wandb` that remembers: .init_args, .logged [(step, values)], .finished."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__(logged=[], finished=0, id="abc")

    def init(self, **arguments):
        self.init_args = arguments
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


RUN = words(data_dir="data", max_steps=6, sample_every=3, checkpoint_every=3, wandb="mine")


def test_what_a_run_sends(wandb):
    values = main(RUN)
    assert wandb.init_args == dict(project="mine", dir="log", config=asdict(parse_config("train", RUN)[0]))
    sent = {}
    for step, streams in wandb.logged:
        for stream, value in streams.items():
            sent.setdefault(stream, {})[step] = value
    assert sent == values and set(sent) == {"train", "val", "lr", "norm", "tok/s"}  # the log, number for number
    assert [step for step, _ in wandb.logged] == sorted(step for step, _ in wandb.logged)  # wandb drops what is late
    assert wandb.finished == 1


def test_a_run_that_was_stopped_is_finished_too(wandb, monkeypatch):
    monkeypatch.setattr(train_gpt2, "evaluate_loss", lambda *_: train_gpt2.signal.raise_signal(train_gpt2.signal.SIGTERM) or (1.0, 1))
    main(RUN)
    assert saved("log", 1)["step"] == 1 and wandb.finished == 1


def test_nothing_is_sent_unless_asked(wandb):
    main([*RUN, "--wandb="])
    assert not hasattr(wandb, "init_args") and wandb.logged == []


def test_one_line_where_the_package_is_missing(tmp_path):
    """And before an earlier run has been moved aside."""
    data = write_data(tmp_path / "data")
    run(words(data_dir=data, max_steps=2), tmp_path)
    before = {f.name: f.read_bytes() for f in (tmp_path / "log").iterdir()}

    done = run(words(data_dir=data, max_steps=2, wandb="mine"), tmp_path, patch=hide_wandb, status=2)
    assert done.err.startswith("train_gpt2.py: --wandb mine: ") and done.err.count("\n") == 1 and "wandb" in done.err
    assert {f.name: f.read_bytes() for f in (tmp_path / "log").iterdir()} == before


def hide_wandb():
    sys.modules["wandb"] = None


def test_one_line_where_wandb_refuses(wandb, monkeypatch):
    def refuse(**_):
        raise StandIn.Error("no key.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="--wandb mine: Error: no key. Use `wandb login`"):
        main(RUN)
