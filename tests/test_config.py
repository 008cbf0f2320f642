"""The command line: every setting is a flag, later words win, and what a run wrote down starts it again."""
import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from launch import TINY, assert_same_run, differences, log_lines, run, saved, steps_saved, words, write_data
from train_gpt2 import PRESETS, GPTConfig, TrainConfig, UserError, parse_config


def parse(*argv, action="train"):
    return parse_config(action, [str(a) for a in argv])[0]


OTHERS = {  # for each setting a value that is not its default, as a word and as what becomes of it
    "block_size": ("512", 512), "vocab_size": ("300", 300), "n_layer": ("3", 3), "n_head": ("4", 4),
    "n_embd": ("96", 96),
    "init": ("scratch", "scratch"), "data_dir": ("d", "d"), "shuffle": ("0", False), "seed": ("7", 7),
    "total_batch_size": ("64", 64), "micro_batch_size": ("2", 2), "max_steps": ("9", 9),
    "max_lr": ("1e-3", 1e-3),
    "min_lr": ("1e-5", 1e-5), "warmup_steps": ("3", 3), "optimizer": ("muon", "muon"),
    "weight_decay": ("0", 0.0),
    "grad_clip": ("2", 2.0), "val_every": ("3", 3), "val_tokens": ("5", 5), "hellaswag_every": ("2", 2),
    "sample_every": ("4", 4),
    "prompt": ("- it's 100% = \"x\"", "- it's 100% = \"x\""), "checkpoint_every": ("0", 0),
    "keep_checkpoints": ("1", 1),
    "log_dir": ("l", "l"), "resume": ("1", True), "device": ("cpu", "cpu"), "dtype": ("float16", "float16"),
    "compile": ("1", "1"), "wandb": ("p", "p")}


def test_there_is_a_value_for_every_setting():
    assert list(OTHERS) == [f.name for f in fields(TrainConfig)]
    same = [name for name, (_, value) in OTHERS.items() if value == getattr(TrainConfig, name)]
    assert same == ["init"]  # any other would have to exist


@pytest.mark.parametrize("name", OTHERS)
def test_every_setting_is_a_flag(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    word, value = OTHERS[name]
    default = asdict(TrainConfig())
    for argv in ([f"--{name}={word}"], *([[f"--{name}", word]] if not word.startswith("-") else [])):
        cfg = parse(*argv)
        assert type(getattr(cfg, name)) is type(value)
        assert asdict(cfg) == {**default, name: value}
    Path("c.json").write_text(json.dumps({name: value}))
    assert asdict(parse("--config", "c.json")) == {**default, name: value}


def test_nothing_said_is_the_paper_run():
    assert parse() == TrainConfig() and parse("--preset", "gpt2") == TrainConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_what_they_say(preset):
    assert asdict(parse("--preset", preset)) == {**asdict(TrainConfig()), **PRESETS[preset]}


def test_a_flag_without_a_value_means_yes():
    assert parse("--resume").resume is True and parse("--shuffle").shuffle is True and parse().resume is False


def test_the_later_wins(tmp_path, monkeypatch):
    """Default, what --resume found, the preset, --config, and the words, in whatever order they stand."""
    monkeypatch.chdir(tmp_path)
    found = {**asdict(TrainConfig()), "n_layer": 5, "n_embd": 96, "max_steps": 11, "seed": 3}
    Path("log").mkdir()
    Path("log/config.json").write_text(json.dumps(found))
    Path("c.json").write_text(json.dumps(dict(max_steps=12, val_every=7)))
    cfg = parse("--max_lr", 3e-3, "--resume", "--config", "c.json", "--preset", "laptop", "--min_lr", 1e-9)
    assert (cfg.seed, cfg.n_layer, cfg.max_steps, cfg.val_every) == (3, PRESETS["laptop"]["n_layer"], 12, 7)
    assert (cfg.max_lr, cfg.min_lr) == (3e-3, 1e-9)
    assert cfg.n_embd == PRESETS["laptop"]["n_embd"] and cfg.resume
    assert parse("--resume").n_embd == 96 and parse("--resume", "--n_embd", 48).n_embd == 48
    assert parse("--max_steps=1", "--max_steps=2").max_steps == 2
    assert parse("--max_steps=5", "--config=c.json").max_steps == 5
    assert parse("--preset=laptop").seed == TrainConfig.seed  # nothing is found unless it is asked for


def test_torchrun_says_that_it_has_restarted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not parse().resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert parse().resume


def test_an_action_takes_its_settings_from_the_checkpoint(tmp_path):
    data = write_data(tmp_path / "data")
    run(words(data_dir=data, max_steps=2, warmup_steps=1), tmp_path)
    folder = str(tmp_path / "log")
    cfg = parse("--init", folder, action="eval")
    assert (cfg.n_layer, cfg.data_dir, cfg.val_tokens, cfg.init) == (2, str(data), 400, folder)
    assert parse("--init", folder, "--val_tokens", 99, action="eval").val_tokens == 99
    begun = parse("--init", folder)  # a new training takes the shape alone
    assert asdict(begun) == {**asdict(TrainConfig()), **{f.name: TINY[f.name] for f in fields(GPTConfig)},
                             "init": folder}
    with pytest.raises(UserError):
        parse("--init", str(tmp_path / "nowhere"), action="eval")


def test_config_json_starts_the_same_run(tmp_path):
    """From it alone; and it does not say --resume, though the run that wrote it was resumed."""
    data = write_data(tmp_path / "data")
    run(words(data_dir=data, max_steps=7) + ["--resume"], tmp_path)
    written = json.loads((tmp_path / "log" / "config.json").read_text())
    assert list(written) == [f.name for f in fields(TrainConfig)] and written["resume"] is False
    out = run(["--config", "log/config.json", "--log_dir", "again"], tmp_path).out
    assert "--resume" not in out
    assert_same_run(tmp_path / "again", tmp_path / "log", 7)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {**written, "log_dir": "again"}
    # in place: the same run once more, the first one moved aside
    run(["--config", "log/config.json"], tmp_path)
    assert_same_run(tmp_path / "log", tmp_path / "log" / "earlier-1", 7)


def test_a_preset_can_be_resumed_with_the_same_words(tmp_path):
    """`--preset laptop --resume` after `--preset laptop`; here with small sizes behind both."""
    data = write_data(tmp_path / "data")
    small = ["--preset", "laptop", *words(data_dir=data, max_steps=7)]
    run(small, tmp_path)
    run([*small, "--log_dir", "whole"], tmp_path)
    (tmp_path / "log" / "ckpt_00000007.pt").unlink()
    assert "steps: 5 to 7" in run([*small, "--resume"], tmp_path).out
    assert_same_run(tmp_path / "log", tmp_path / "whole", 7)


def test_a_run_that_begins_with_a_checkpoint_begins_with_its_weights(tmp_path):
    """At a learning rate of next to nothing they are still there after a step; and the steps count from 0."""
    data = write_data(tmp_path / "data")
    run(words(data_dir=data, max_steps=5, log_dir="first"), tmp_path)
    run(words(data_dir=data, max_steps=1, log_dir="log", init="first", max_lr=1e-30, min_lr=0), tmp_path)
    assert steps_saved(tmp_path / "log") == [1]
    first, second = saved(tmp_path / "first", 5)["model"], saved(tmp_path / "log", 1)["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    last, first = log_lines(tmp_path / "first")[-1], log_lines(tmp_path / "log")[0]
    assert last.split() == ["5", *first.split()[1:]] and first.startswith("0 val ")
    assert differences(saved(tmp_path / "first", 5), saved(tmp_path / "log", 1))
