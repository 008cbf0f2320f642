"""--wandb: what a run sends. With a stand-in that takes it down, and with the real package where it is installed
(offline: it then writes a file, which we read with nothing but its protocol buffers)."""
import json
import struct
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
from launch import run, saved, words, write_data
from train_gpt2 import UserError, main, parse_config, read_log


class StandIn(SimpleNamespace):
    """A module `wandb` that remembers: .init_args, .logged [(step, values)], .artifacts, .finished."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__(logged=[], artifacts=[], finished=0, id="abc")

    def init(self, **arguments):
        self.init_args = arguments
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def Table(self, columns, data):
        return columns, data

    def log_artifact(self, file, name, type):
        self.artifacts.append((torch.load(file, weights_only=True)["step"], name, type))

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
    assert wandb.init_args == dict(project="mine", group="log", dir="log", config=asdict(parse_config("train", RUN)[0]))
    sent = {}
    for step, streams in wandb.logged:
        for stream, value in streams.items():
            sent.setdefault(stream, {})[step] = value
    samples = sent.pop("samples")
    assert sent == values and set(sent) == {"train", "val", "lr", "norm", "tok/s"}  # the log, number for number
    assert [step for step, _ in wandb.logged] == sorted(step for step, _ in wandb.logged)  # wandb drops what is late
    assert list(samples) == [0, 3, 6]
    for columns, rows in samples.values():
        assert columns == ["text"] and len(rows) == 2 and all(row[0].startswith("Hello, I'm") for row in rows)
    assert wandb.artifacts == [(6, "checkpoint-abc", "model")] and wandb.finished == 1


def test_a_run_that_was_stopped_sends_no_checkpoint(wandb, monkeypatch):
    """A scheduler gives half a minute: too little to send gigabytes."""
    def stop_now(step, *_):
        train_gpt2.signal.raise_signal(train_gpt2.signal.SIGTERM)

    monkeypatch.setattr(train_gpt2, "measure", stop_now)
    main(RUN)
    assert saved("log", 1)["step"] == 1 and wandb.artifacts == [] and wandb.finished == 1


def test_without_checkpoints_none_is_sent(wandb):
    main([*RUN, "--checkpoint_every=0"])
    assert wandb.artifacts == [] and wandb.finished == 1


def test_nothing_is_sent_unless_asked(wandb):
    main([*RUN, "--wandb="])
    assert not hasattr(wandb, "init_args") and wandb.logged == []


def test_one_line_where_the_package_is_missing(tmp_path):
    """And before an earlier run has been moved aside."""
    data = write_data(tmp_path / "data")
    run(words(data_dir=data, max_steps=2), tmp_path)
    before = {f.name: f.read_bytes() for f in (tmp_path / "log").iterdir()}

    done = run(words(data_dir=data, max_steps=2, wandb="mine"), tmp_path, patch=hide_wandb, status=2)
    assert done.err == "train_gpt2.py: --wandb needs a package that is not here: pip install wandb\n"
    assert {f.name: f.read_bytes() for f in (tmp_path / "log").iterdir()} == before


def hide_wandb():
    sys.modules["wandb"] = None


def test_one_line_where_wandb_refuses(wandb, monkeypatch):
    def refuse(**_):
        raise StandIn.Error("no key.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="--wandb mine: no key. Use `wandb login`"):
        main(RUN)


# ---- the real one

def records(file):
    """The records of a .wandb file: a magic word of 7 bytes, then blocks of 32 KiB in leveldb's log format, each
    piece with checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_wandb_offline_has_it_all(tmp_path):
    pytest.importorskip("wandb")
    write_data(tmp_path / "data")
    run(RUN, tmp_path, WANDB_MODE="offline", WANDB_DATA_DIR=str(tmp_path), WANDB_CACHE_DIR=str(tmp_path),
        WANDB_CONFIG_DIR=str(tmp_path))
    found = list(records(next((tmp_path / "log/wandb").glob("offline-run-*/*.wandb"))))
    sent, samples = {}, []
    for record in (r.history for r in found if r.WhichOneof("record_type") == "history"):
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.item}
        samples += [row["_step"]] * ("samples" in row)
        for stream in row.keys() & {"train", "val", "lr", "norm", "tok/s"}:
            sent.setdefault(stream, {})[row["_step"]] = pytest.approx(row[stream], rel=1e-7)
    assert sent == read_log(tmp_path / "log")[0] and samples == [0, 3, 6]
    config = {item.key: json.loads(item.value_json) for r in found if r.WhichOneof("record_type") == "run"
              for item in r.run.config.update}
    assert config["n_layer"] == 2 and config["max_steps"] == 6
    models = [r.artifact for r in found if r.WhichOneof("record_type") == "artifact" and r.artifact.type == "model"]
    assert [entry.path for model in models for entry in model.manifest.contents] == ["ckpt_00000006.pt"]
    assert models[0].manifest.contents[0].size == (tmp_path / "log/ckpt_00000006.pt").stat().st_size
