"""Wrong input ends in one clear line that says what to do, exit status 2 and no traceback; nothing is written or lost.

main raises a UserError (or Python's own OSError) with that line, which most tests read in process. A few rows go
through the program and show what becomes of it.
"""
import json
import os
import pickle
import re
import shutil
import time

import numpy as np
import pytest
import torch

from launch import TINY, flat, log_values, run, run_many, saved, words, write_data
from train_gpt2 import UserError, main, parse_config

SHARD = "text_train_000001.npy"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with good shards in `data` and a finished run of five steps in `log`."""
    folder = tmp_path_factory.mktemp("bad")
    write_data(folder / "data")
    run(words(data_dir="data", max_steps=5, warmup_steps=1), folder)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it, in which the test runs."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here"))
    return tmp_path / "here"


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(arguments, says):
    """main refuses this command line in one line, in which `says` is found."""
    with pytest.raises((UserError, OSError)) as error:
        main([str(word) for word in arguments])
    line = str(error.value)
    assert re.search(says, line) and "\n" not in line and len(line) < 500, line


# ---- shards, sizes, places

def bin_shard(version=1, length=2000):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, version, length
    return header.tobytes() + np.zeros(2000, np.uint16).tobytes()


def meta(**changes):
    return json.dumps(changes).encode()


TRAIN, VAL = ("text_train_000000.npy", SHARD), "text_val_000000.npy"
ZEROS = np.zeros(2000, np.uint16)
FOREIGN = np.where(np.arange(2000) == 7, 300, ZEROS).astype(np.uint16)

# what happens to the shards, {file: its new content, or None to delete it}; the flags; what the line says
CASES = {
    "no folder": ({}, dict(data_dir="none"), "no val shards in /.*/none: `python fineweb.py --out none` makes"),
    "no train shards": (dict.fromkeys(TRAIN), {}, "no train shards in .*fineweb.py"),
    "no val shards": ({VAL: None}, {}, "no val shards in .*fineweb.py"),
    "not an array": ({SHARD: b"a text" * 99}, {}, f"{SHARD} is damaged .*make it again"),
    "32-bit ids": ({SHARD: ZEROS.astype(np.int32)}, {}, f"{SHARD} is damaged .*int32, where .* a row of uint16"),
    "another version": ({"text_train_000002.bin": bin_shard(version=2)}, {}, "_train_000002.bin is damaged .*header"),
    "cut short": ({"text_train_000002.bin": bin_shard(length=2001)}, {}, "_train_000002.bin is damaged .*header"),
    "an id too large": ({SHARD: FOREIGN}, {}, f"{SHARD} holds the id 300, --vocab_size is 257"),
    "less than a step": ({SHARD: None, TRAIN[0]: ZEROS[:192]}, {},  # 11 rows and the last one's targets
                         "192 train tokens, less than a step: add text"),
    "less than a micro-batch": ({SHARD: None, TRAIN[0]: ZEROS[:60]}, {},
                                "60 train tokens, less than a step: add text"),
    "less val text than a row": ({VAL: ZEROS[:16]}, {}, "the val split of .* is shorter than --block_size 16"),
    "another tokenizer": ({"meta.json": meta(tokenizer="gpt2", vocab_size=50257, shards=[])}, {},
                          "has 50257 ids: leave --vocab_size out"),
    "an unknown tokenizer": ({"meta.json": None}, {}, "has 50257 ids"),
    "damaged notes": ({"meta.json": b'{"tokenizer": "by'}, {}, "meta.json can't be read as JSON"),
    "notes of another kind": ({"meta.json": b"[257]"}, {}, "meta.json can't be read as JSON"),
    "a step that can't be cut": ({}, dict(total_batch_size=250), "250 is not a multiple of 64.*use 256"),
    "a step of part of a micro-batch": ({}, dict(total_batch_size=16), "16 is not a multiple of 64.*use 64"),
    "a step of part of a row": ({}, dict(total_batch_size=100, micro_batch_size="auto"), "multiple of 16.*use 96"),
    "heads that can't be cut": ({}, dict(n_head=3), "--n_embd 16 is not a multiple of --n_head 3"),
    "the lowest rate above the highest": ({}, dict(min_lr=0.1), "--min_lr 0.1 is above --max_lr 0.01"),
    "an unknown device": ({}, dict(device="tpu9"), "--device tpu9 can't be used here .*try cpu"),
    "a GPU that isn't there": ({}, dict(device="cuda:99"), "--device cuda:99 can't be used here .*try cpu$"),
    "an unknown flag": ({}, dict(learning_rate=1), "unrecognized arguments: --learning_rate=1"),
    "a shortened flag": ({}, dict(data="x"), "unrecognized arguments: --data=x"),
    "an unknown preset": ({}, dict(preset="gpt3"), "--preset: invalid choice: 'gpt3'"),
    "an unknown setting": ({"c.json": meta(learning_rate=1)}, dict(config="data/c.json"), "unknown .*: learning_rate"),
    "a fraction in a file": ({"c.json": meta(seed=1.5)}, dict(config="data/c.json"), "--seed 1.5: must be int"),
    "nothing in a file": ({"c.json": meta(seed=None)}, dict(config="data/c.json"), "--seed None: must be int"),
    "a number for a text": ({"c.json": meta(wandb=5)}, dict(config="data/c.json"), "--wandb 5: must be str"),
    "a configuration of another kind": ({}, dict(config=f"data/{VAL}"), f"{VAL} can't be read as JSON"),
    "a log folder that is a file": ({}, dict(log_dir="data/meta.json"), "data/meta.json"),
    "a log folder where none can be": ({}, dict(log_dir="/proc/nowhere/log"), "/proc/nowhere"),
    "no such model": ({}, dict(init="nothing"), "nothing: no such checkpoint, log folder or Hugging Face folder"),
    "a folder without a model": ({}, dict(init="data"), "data/config.json can't be read"),
    "a file that is not a checkpoint": ({}, dict(init=f"data/{VAL}"), f"{VAL} is damaged, or written by another"),
}


@pytest.mark.parametrize("damage, changes, says", CASES.values(), ids=CASES)
def test_wrong_input_is_one_line_and_nothing_is_written(here, damage, changes, says):
    for name, content in damage.items():
        file = here / "data" / name
        if content is None:
            file.unlink()
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.save(file, content)
    before = contents(here)
    refused(words(**{"data_dir": "data", **changes}), says)
    assert contents(here) == before  # also the run that is in `log`


VALUES = {
    "must be int, above 0": "max_steps=0 max_steps=-3 n_layer=0 n_head=0 n_embd=-4 block_size=0 micro_batch_size=0 "
                            "micro_batch_size=-2 total_batch_size=0 val_tokens=0 keep_checkpoints=0 max_steps=many "
                            "n_layer=1.5 micro_batch_size=some",
    "must be float, above 0": "max_lr=-0.1 max_lr=nan max_lr=inf max_lr=high",
    "must be int, 0 or more": "val_every=-1 vocab_size=-1 checkpoint_every=-5 warmup_steps=-1 seed=-1",
    "must be float, 0 or more": "grad_clip=-0.5 weight_decay=-1.0 min_lr=nan",
    "choose from .*": "shuffle=maybe optimizer=lion dtype=int8 compile=yes"}


@pytest.mark.parametrize("says, wrong", VALUES.items(), ids=VALUES)
def test_a_wrong_value_is_told_with_its_flag(says, wrong):
    for flag, value in (word.split("=") for word in wrong.split()):
        with pytest.raises(UserError, match=f"^--{flag} '?{re.escape(value)}'?: {says}$"):
            parse_config("train", [f"--{flag}", value])


def tell_of_waiting():
    """Rig this process."""
    time.sleep = lambda seconds: seconds and print(f"waits {seconds} s", flush=True)


@pytest.mark.parametrize("arguments, says", [
    (["learn"], "there is no action 'learn': choose from train, eval, sample, export"),
    (["sample", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
    (["export"], "--out"), (["train", "--n_layer"], "--n_layer: expected one argument"),
    (words(data_dir="data", n_head=3), "--n_embd 16 is not a multiple of --n_head 3"),
    (words(data_dir="data", log_dir="/proc/nowhere/log"), "/proc/nowhere")])
def test_the_program_prints_one_line_and_ends_with_status_2(here, arguments, says):
    """At once, whether it is our own error, argparse's or the system's."""
    running = run(arguments, here, tell_of_waiting, status=2)
    assert running.err.startswith("train_gpt2.py: ") and says in running.err and running.err.count("\n") == 1
    assert "Traceback" not in running.out and "waits" not in running.out and "micro_batch_size" not in running.err


def test_sample_is_told_what_cannot_be_drawn(here):
    for flag in "--temperature=-1", "--top_k=0", "--max_new_tokens=-1", "--num_samples=0":
        refused(["sample", "--init", "log", flag], flag.split("=")[0])


def test_under_several_processes_only_one_says_it(here):
    """Whether all of them find it out, here that they are more than the rows, or only the first one looked."""
    for changes, says in ((dict(total_batch_size=16, micro_batch_size="auto"), "16 is not a multiple of 32.*: use 32"),
                          (dict(log_dir="/proc/nowhere/log"), "/proc/nowhere")):
        first, second = run_many(2, words(**{"data_dir": "data", **changes}), here, status=2)
        assert re.fullmatch(f"train_gpt2.py: .*{says}.*\n", first.err)
        assert second.err == "" and "Traceback" not in first.out + second.out


# ---- checkpoints

def spoil(file, change):
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)


@pytest.mark.parametrize("damage", [
    lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"PK\3\4 but no archive" * 50),
    lambda f: f.write_bytes(f.read_bytes()[:-1000]), lambda f: torch.save([1, 2, 3], f),
    lambda f: torch.save({"model": {}}, f), lambda f: spoil(f, lambda c: c.pop("optimizers")),
    lambda f: spoil(f, lambda c: c["data"].pop("json")),
    lambda f: spoil(f, lambda c: c["model"].popitem()),
    lambda f: spoil(f, lambda c: c["model"].update({"transformer.wpe.weight": torch.zeros(17, 16)})),
], ids=["empty", "garbage", "cut", "list", "other keys", "no optimizers", "an older version's", "a matrix missing",
        "another shape"])
def test_a_damaged_checkpoint_is_refused_by_all_who_read_it(here, damage):
    """A resumed run, one that begins with it, an action. None starts afresh over it."""
    damage(here / "log" / "ckpt_00000005.pt")
    before = contents(here)
    for arguments in ([*words(data_dir="data"), "--resume"],
                      words(data_dir="data", init="log/ckpt_00000005.pt", log_dir="new"),
                      ["eval", "--init", "log", "--device", "cpu"],
                      ["export", "--init", "log", "--out", "hf"]):
        refused(arguments, "ckpt_00000005.pt is damaged")
    assert contents(here) == before


@pytest.mark.parametrize("changes, says", [
    (dict(n_layer=3), "n_layer 2 -> 3"), (dict(block_size=32), "block_size 16 -> 32"),
    (dict(vocab_size=300), "vocab_size 257 -> 300"), (dict(n_embd=32, n_head=4), "n_head 2 -> 4, n_embd 16 -> 32")])
def test_a_start_from_a_checkpoint_of_another_shape(here, changes, says):
    refused(words(data_dir="data", init="log", log_dir="new", **changes), f"{says}.: leave them out")
    assert not (here / "new").exists()


def test_a_checkpoint_is_tensors_numbers_strings_lists_and_dicts(made):
    checkpoint = saved(made / "log", 5)
    assert checkpoint.keys() == {"step", "config", "data", "model", "optimizers", "scaler"}
    kinds = {type(leaf) for leaf in flat({**checkpoint, "model": dict(checkpoint["model"])}).values()}
    assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}
    assert not any("_orig_mod" in name or "module." in name for name in checkpoint["model"])
    assert log_values(made / "log")["val"].keys() == {0, 3, 5} and TINY["val_every"] == 3


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("boom",)


def test_no_file_runs_code(here):
    """A checkpoint, a shard and a Hugging Face model that hold a command are refused, and it doesn't run."""
    checkpoint, shard = here / "log" / "ckpt_00000005.pt", here / "data" / SHARD
    good = torch.load(checkpoint, weights_only=True)
    for content in (Bomb(), {**good, "data": Bomb()}):
        torch.save(content, checkpoint)
        for arguments in ([*words(data_dir="data"), "--resume"], ["eval", "--init", "log"], words(init=checkpoint)):
            refused(arguments, r"\(UnpicklingError\)")
    np.save(shard, np.array([Bomb()] * 2000, dtype=object), allow_pickle=True)
    refused(words(data_dir="data"), f"{SHARD} is damaged")
    shard.write_bytes(pickle.dumps(Bomb()))
    refused(words(data_dir="data"), f"{SHARD} is damaged")
    (here / "hf").mkdir()
    (here / "hf" / "config.json").write_bytes(meta(model_type="gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=257))
    torch.save(Bomb(), here / "hf" / "pytorch_model.bin")
    refused(["eval", "--init", "hf", "--data_dir", "data"], "safetensors")
    assert not os.path.exists("boom")
    torch.load(here / "hf" / "pytorch_model.bin", weights_only=False)
    assert os.path.exists("boom")  # it would have
