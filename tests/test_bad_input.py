"""Wrong input ends in one clear line on standard error that says what to do, and exit status 2.

The table CASES is the promise. Each row is started as a user would start it. There is no traceback, and
nothing is written or lost.
"""
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
from launch import TINY, log_values, run, saved, words, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("bad") / "data")


@pytest.fixture(scope="module")
def log(data):
    """A finished run of five steps, for cases that begin with a checkpoint."""
    run(words(data_dir=data, log_dir="log", max_steps=5, warmup_steps=1), data.parent)
    return data.parent / "log"


# ---- what is made of a good folder of shards

SHARD = "text_train_000001.npy"


def empty(folder):
    for file in folder.glob("*.npy"):
        file.unlink()


def no_val(folder):
    (folder / "text_val_000000.npy").unlink()


def cut(folder):
    file = folder / SHARD
    file.write_bytes(file.read_bytes()[:-100])


def empty_file(folder):
    (folder / SHARD).write_bytes(b"")


def no_npy(folder):
    (folder / SHARD).write_bytes(b"a text, and no array" * 99)


def wide(folder):
    np.save(folder / SHARD, np.zeros(2000, np.int32))


def real_numbers(folder):
    np.save(folder / SHARD, np.zeros(2000, np.float32))


def square(folder):
    np.save(folder / SHARD, np.zeros((40, 50), np.uint16))


def foreign(folder):
    ids = np.load(folder / SHARD)
    ids[7] = 300
    np.save(folder / SHARD, ids)


def bin_shard(folder, magic=20240520, version=1, length=2000, written=2000):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, length
    (folder / "text_train_000002.bin").write_bytes(header.tobytes() + np.zeros(written, np.uint16).tobytes())


def wrong_magic(folder):
    bin_shard(folder, magic=20240801)


def wrong_version(folder):
    bin_shard(folder, version=2)


def cut_bin(folder):
    bin_shard(folder, written=1500)


def tiny_bin(folder):
    (folder / "text_train_000002.bin").write_bytes(b"12")


def short(folder):
    empty(folder)
    np.save(folder / "text_train_000000.npy", np.zeros(200, np.uint16))
    np.save(folder / "text_val_000000.npy", np.zeros(200, np.uint16))


def very_short(folder):
    short(folder)
    np.save(folder / "text_train_000000.npy", np.zeros(60, np.uint16))


def short_val(folder):
    np.save(folder / "text_val_000000.npy", np.zeros(16, np.uint16))


def other_vocabulary(folder):
    (folder / "meta.json").write_text(json.dumps(dict(tokenizer="gpt2", vocab_size=50257, shards=[])))


def damaged_meta(folder):
    (folder / "meta.json").write_text('{"tokenizer": "by')


def list_meta(folder):
    (folder / "meta.json").write_text('["bytes", 257]')


def no_meta(folder):
    (folder / "meta.json").unlink()


def meta_of_nothing(folder):
    (folder / "meta.json").write_text("{}")


# ---- the table: its name, what the shards become, which settings are changed, and what the one line says

CASES = [
    # shards
    ("no folder", None, dict(data_dir="nowhere"),
     r"no train shards in /.*/nowhere: `python fineweb.py --out nowhere` makes"),
    ("a file as folder", None, dict(data_dir="data/meta.json"), "no train shards"),
    ("no shards", empty, {}, "no train shards in .*fineweb.py"),
    ("no val shard", no_val, {}, "no val shards in .*fineweb.py"),
    ("a truncated shard", cut, {}, f"{SHARD} is damaged .*make it again"),
    ("an empty shard", empty_file, {}, f"{SHARD} is damaged .*make it again"),
    ("a shard that is none", no_npy, {}, f"{SHARD} is damaged .*make it again"),
    ("32-bit ids", wide, {}, f"{SHARD} is damaged .*int32, where a shard is a row of uint16"),
    ("real numbers", real_numbers, {}, f"{SHARD} is damaged .*float32, where a shard is a row of uint16"),
    ("two dimensions", square, {}, f"{SHARD} is damaged .*2-dimensional"),
    ("another magic number", wrong_magic, {}, "text_train_000002.bin is damaged .*header"),
    ("another version", wrong_version, {}, "text_train_000002.bin is damaged .*header"),
    ("a truncated .bin", cut_bin, {}, "text_train_000002.bin is damaged .*header"),
    ("a .bin without header", tiny_bin, {}, "text_train_000002.bin is damaged"),
    ("an id past the vocabulary", foreign, {}, f"{SHARD} holds the id 300, but --vocab_size is 257"),
    ("less text than a step", short, {},
     "has 200 train tokens, less than a step of 256: .*--total_batch_size 192"),
    ("less text than a micro-batch", very_short, {},
     "has 60 train tokens, less than a step of 256: use more text, or a smaller"),
    ("less val text than a row", short_val, {}, "the val split of .* is shorter than --block_size 16"),
    ("shards of another tokenizer", other_vocabulary, {},
     "vocabulary of 50257 ids, .*one of 257: leave --vocab_size out"),
    ("shards of no known tokenizer", no_meta, {}, "vocabulary of 50257 ids"),
    ("damaged meta.json", damaged_meta, {}, "meta.json can't be read as JSON"),
    ("a list as meta.json", list_meta, {}, "meta.json can't be read as JSON"),
    ("meta.json without content", meta_of_nothing, {}, "vocabulary of 50257 ids"),
    # sizes
    ("a step that can't be shared out", None, dict(total_batch_size=250),
     "250 is not a multiple of 64.*use 256"),
    ("a step below a micro-batch", None, dict(total_batch_size=16), "16 is not a multiple of 64.*use 64"),
    ("a step of no whole row", None, dict(total_batch_size=100, micro_batch_size="auto"),
     "100 is not a multiple of 16.*use 96"),
    ("heads that can't be shared out", None, dict(n_head=3), "--n_embd 16 is not a multiple of --n_head 3"),
    ("more heads than channels", None, dict(n_head=32), "--n_embd 16 .*--n_head 32"),
    *((f"{name} {value}", None, {name: value}, f"--{name} {value}: must be above 0")
      for name, value in [("max_steps", 0), ("max_steps", -3), ("n_layer", 0), ("n_head", 0), ("n_embd", -4),
                          ("block_size", 0), ("micro_batch_size", 0),
                          ("micro_batch_size", -2), ("total_batch_size", 0), ("max_lr", -0.1),
                          ("val_tokens", 0), ("keep_checkpoints", 0), ("max_lr", "nan")]),
    *((f"{name} {value}", None, {name: value}, f"--{name} {value}: must not be negative")
      for name, value in [("val_every", -1), ("vocab_size", -1), ("checkpoint_every", -5), ("warmup_steps", -1), ("seed", -1),
                          ("grad_clip", -0.5), ("weight_decay", -1.0)]),
    ("the lowest rate above the highest", None, dict(min_lr=0.1), "--min_lr 0.1 is above --max_lr 0.01"),
    # words
    ("an unknown flag", None, dict(learning_rate=1), "unrecognized arguments: --learning_rate=1"),
    ("a shortened flag", None, dict(data="x"), "unrecognized arguments: --data=x"),
    ("a word where a number belongs", None, dict(max_steps="many"), "--max_steps 'many': must be int"),
    ("a fraction where a count belongs", None, dict(n_layer=1.5), "--n_layer '1.5': must be int"),
    ("neither yes nor no", None, dict(shuffle="maybe"), "--shuffle maybe: choose from 0, 1"),
    ("rows that are neither auto nor a number", None, dict(micro_batch_size="some"),
     "--micro_batch_size 'some': must be int"),
    ("an unknown preset", None, dict(preset="gpt3"), "--preset: invalid choice: 'gpt3'"),
    ("an unknown optimizer", None, dict(optimizer="lion"), "--optimizer lion: choose from adamw, muon"),
    ("an unknown device", None, dict(device="tpu9"), "--device tpu9 can't be used here .*try cpu"),
    ("an unknown dtype", None, dict(dtype="int8"), "--dtype int8: choose from auto"),
    ("an unknown way to compile", None, dict(compile="yes"), "--compile yes: choose from auto, 0, 1"),
    ("no such config", None, dict(config="none.json"), "none.json can't be read as JSON"),
    ("a config that is none", None, dict(config="data/text_val_000000.npy"),
     "text_val_000000.npy can't be read as JSON"),
    # places
    ("a log folder that is a file", None, dict(log_dir="data/meta.json"),
     "data/meta.json"),
    ("a log folder where none can be", None, dict(log_dir="/proc/nowhere/log"),
     "/proc/nowhere"),
    ("no such model", None, dict(init="no-such-model"), "no-such-model: no such checkpoint, log folder or Hugging Face folder"),
    ("a folder without a model", None, dict(init="data"), "data/config.json can't be read"),
    ("a file that is no checkpoint", None, dict(init="data/meta.json"),
     "data/meta.json is damaged, or written by another version"),
]


def one_line(running):
    """The line on standard error, its program's name taken off; it is the only one, and no traceback."""
    assert running.err.count("\n") == 1 and running.err.endswith("\n"), running.err
    assert "Traceback" not in running.out + running.err and len(running.err) < 500
    name, line = running.err.rstrip("\n").split(": ", 1)
    assert name == "train_gpt2.py"
    return line


@pytest.mark.parametrize("damage, changes, says", [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])
def test_wrong_input_is_one_line_and_status_2(tmp_path, data, damage, changes, says):
    shutil.copytree(data, tmp_path / "data")
    if damage:
        damage(tmp_path / "data")
    line = one_line(run(words(**{"data_dir": "data", **changes}), tmp_path, status=2))
    assert re.search(says, line), line
    assert not Path(tmp_path, "log").exists()  # it was refused before anything was written


def test_wrong_input_leaves_an_earlier_run_where_it_is(tmp_path, data, log):
    shutil.copytree(log, tmp_path / "log")
    before = {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")}
    for changes in (dict(n_head=3), dict(total_batch_size=10 ** 6 * 64), dict(data_dir="nowhere")):
        run(words(**{"data_dir": data, **changes}), tmp_path, status=2)
    assert {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")} == before


@pytest.mark.parametrize("arguments, says", [
    (["learn"], "there is no action 'learn': choose from train, eval, sample, export"),
    (["sample", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
    (["export"], "--out"),
    (["eval", "--init", "nowhere"], "nowhere: no such checkpoint"),
    (["sample", "--init", "."], "config.json can't be read"),
    (["train", "--n_layer"], "--n_layer: expected one argument"),
    (["a text without an action"], "there is no action"),
])
def test_wrong_words(tmp_path, arguments, says):
    assert says in one_line(run(arguments, tmp_path, status=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_cuda_device_that_is_not_there(tmp_path, data, device):
    line = one_line(run(words(data_dir=data, device=device), tmp_path, status=2))
    assert line.startswith(f"--device {device}") and line.endswith("try cpu")


def as_nobody():
    """Root may write anywhere, so the program becomes another user as soon as it makes a folder."""
    original = Path.mkdir

    def mkdir(self, *arguments, **options):
        os.seteuid(65534)
        return original(self, *arguments, **options)

    Path.mkdir = mkdir


def test_no_permission_on_the_log_folder(tmp_path, data):
    folder = tmp_path / "others"
    folder.mkdir(mode=0o555)
    line = one_line(run(words(data_dir=data, log_dir=folder / "log"), tmp_path,
                        None if os.getuid() else as_nobody, status=2))
    assert re.search(r"Permission denied.*others/log", line)
    assert list(folder.iterdir()) == []


def test_a_val_split_shorter_than_val_tokens_is_used_as_far_as_it_goes(tmp_path, data):
    out = run(words(data_dir=data, max_steps=1, warmup_steps=1, val_tokens=10 ** 7), tmp_path).out
    assert "val: 496 of 500 tokens" in out and "(on 496 tokens of " in out


def test_under_several_processes_only_one_says_it(tmp_path, data):
    """Whether all of them find it out, or only the first one looked."""
    for changes in (dict(n_head=3), dict(micro_batch_size=16), dict(data_dir="nowhere"),
                    dict(log_dir="/proc/nowhere/log")):
        running = launch.run_many(2, words(**{"data_dir": data, **changes}), tmp_path, status=2)
        one_line(running[0])
        assert running[1].err == "" and "Traceback" not in running[1].out


# ---- checkpoints

def spoil(file, change):
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)


@pytest.mark.parametrize("damage", [
    lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"PK\3\4 but no archive" * 50),
    lambda f: f.write_bytes(f.read_bytes()[:-1000]), lambda f: f.write_bytes(f.read_bytes()[1000:]),
    lambda f: torch.save([1, 2, 3], f), lambda f: torch.save({"model": {}}, f),
    lambda f: torch.save(torch.zeros(3), f), lambda f: spoil(f, lambda c: c.pop("optimizers")),
    lambda f: spoil(f, lambda c: c.pop("config")), lambda f: spoil(f, lambda c: c["model"].popitem()),
    lambda f: spoil(f, lambda c: c["model"].update({"transformer.wpe.weight": torch.zeros(17, 16)})),
], ids=["empty", "garbage", "cut", "headless", "list", "other keys", "tensor", "no optimizers",
        "no config", "a matrix missing", "a matrix of another shape"])
def test_garbage_for_a_checkpoint(tmp_path, data, log, damage):
    """Whoever reads it: a resumed run, one that begins with it, an action. None starts afresh over it."""
    shutil.copytree(log, tmp_path / "log")
    file = tmp_path / "log" / "ckpt_00000005.pt"
    damage(file)
    before = (tmp_path / "log" / "log.txt").read_bytes()
    for arguments in (words(data_dir=data, log_dir="log") + ["--resume"],
                      words(data_dir=data, init=file, log_dir="new"),
                      ["eval", "--init", "log", "--device", "cpu"],
                      ["export", "--init", file, "--out", "hf"]):
        assert "ckpt_00000005.pt is damaged" in one_line(run(arguments, tmp_path, status=2))
    assert (tmp_path / "log" / "log.txt").read_bytes() == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes, says", [
    (dict(n_layer=3), "has n_layer 2: leave these flags out"),
    (dict(block_size=32), "has block_size 16: leave"),
    (dict(n_embd=32, n_head=4), "has n_head 2, n_embd 16: leave"),
    (dict(vocab_size=300), "has vocab_size 257: leave")])
def test_a_start_from_a_checkpoint_of_another_shape(tmp_path, data, log, changes, says):
    assert says in one_line(run(words(data_dir=data, init=log, log_dir="new", **changes), tmp_path, status=2))
    assert not (tmp_path / "new").exists()


def test_a_start_from_a_checkpoint_may_shorten_the_context(tmp_path, data, log):
    run(words(data_dir=data, init=log, log_dir="new", block_size=8, max_steps=1, warmup_steps=1), tmp_path)
    assert saved(tmp_path / "new", 1)["model"]["transformer.wpe.weight"].shape == (8, 16)


# ---- Hugging Face folders that are no GPT-2

def folder_of(tmp_path, config):
    folder = tmp_path / "hf"
    folder.mkdir()
    config.architectures = None
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("kind, says", [
    ("neo", "model_type is 'gpt_neo'"), ("rope", "model_type is 'llama'"),
    ("relu", "is not a GPT-2 as OpenAI released it: activation_function is 'relu'"),
    ("untied", "is not a GPT-2 as OpenAI released it: tie_word_embeddings is False")])
def test_hugging_face_folders_that_are_no_gpt2(tmp_path, kind, says):
    from transformers import GPT2Config, GPTNeoConfig, LlamaConfig
    config = dict(neo=GPTNeoConfig, rope=LlamaConfig, relu=lambda: GPT2Config(activation_function="relu"),
                  untied=lambda: GPT2Config(tie_word_embeddings=False))[kind]()
    folder = folder_of(tmp_path, config)
    assert says in one_line(run(["eval", "--init", folder, "--device", "cpu"], tmp_path, status=2))


# ---- nothing that is loaded can run code

class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_the_bomb_works(tmp_path):
    torch.save(Bomb(tmp_path / "boom"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "boom").exists()


def test_no_file_runs_code(tmp_path, data, log):
    """A checkpoint, a shard and a pickled Hugging Face model that hold a command: refused; nothing runs."""
    boom = tmp_path / "boom"
    shutil.copytree(data, tmp_path / "data")
    np.save(tmp_path / "data" / SHARD, np.array([Bomb(boom)] * 2000, dtype=object), allow_pickle=True)
    line = one_line(run(words(data_dir="data"), tmp_path, status=2))
    assert f"{SHARD} is damaged" in line
    (tmp_path / "data" / SHARD).write_bytes(pickle.dumps(Bomb(boom)))
    assert f"{SHARD} is damaged" in one_line(run(words(data_dir="data"), tmp_path, status=2))

    shutil.copytree(log, tmp_path / "log")
    file = tmp_path / "log" / "ckpt_00000005.pt"
    for content in (Bomb(boom), {**torch.load(file, weights_only=True), "data": Bomb(boom)}):
        torch.save(content, file)
        for arguments in (words(data_dir=data) + ["--resume"], ["eval", "--init", "log"],
                          words(data_dir=data, init=file)):
            assert "(UnpicklingError)" in one_line(run(arguments, tmp_path, status=2))

    from transformers import GPT2Config
    folder = folder_of(tmp_path, GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=257, n_positions=16))
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(boom), folder / "pytorch_model.bin")
    line = one_line(run(["eval", "--init", folder, "--device", "cpu"], tmp_path, status=2))
    assert "safetensors" in line
    assert not boom.exists()


def test_a_checkpoint_is_tensors_numbers_strings_lists_and_dicts(log):
    checkpoint = saved(log, 5)
    assert checkpoint.keys() == {"step", "config", "data", "tokenizer", "model", "optimizers", "scaler"}
    kinds = {type(leaf) for leaf in launch.flat({**checkpoint, "model": dict(checkpoint["model"])}).values()}
    assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}
    assert not any("_orig_mod" in name or "module." in name for name in checkpoint["model"])
    assert log_values(log)["val"].keys() == {0, 3, 5} and TINY["val_every"] == 3
