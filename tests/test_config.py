"""The command line: every setting is a flag, and what a run wrote down starts it again (which wins: test_seams.py)."""
import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from launch import assert_same_run, run, words, write_data
from train_gpt2 import PRESETS, TrainConfig, parse_config


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(*argv):
    return parse_config("train", [str(word) for word in argv])[0]


# For each setting a word, and what becomes of it: not its default (another `init` would have to exist), nor another's.
OTHERS = {
    "block_size": ("512", 512), "vocab_size": ("300", 300), "n_layer": ("3", 3), "n_head": ("4", 4),
    "n_embd": ("96", 96), "init": ("scratch", "scratch"), "data_dir": ("d", "d"), "shuffle": ("0", False),
    "seed": ("7", 7), "total_batch_size": ("64", 64), "micro_batch_size": ("2", 2), "max_steps": ("9", 9),
    "max_lr": ("1e-3", 1e-3), "min_lr": ("1e-5", 1e-5), "warmup_steps": ("8", 8), "optimizer": ("muon", "muon"),
    "weight_decay": ("0", 0.0), "grad_clip": ("2.5", 2.5), "val_every": ("6", 6), "val_tokens": ("5", 5),
    "hellaswag_every": ("12", 12), "sample_every": ("14", 14), "prompt": ("- 100% = \"x\"", "- 100% = \"x\""),
    "checkpoint_every": ("15", 15), "keep_checkpoints": ("1", 1), "log_dir": ("l", "l"), "resume": ("1", True),
    "device": ("cpu", "cpu"), "dtype": ("float16", "float16"), "compile": ("1", "1"), "wandb": ("p", "p")}


def test_every_setting_is_a_flag_and_a_word_of_a_configuration_file():
    """As --flag=word, as --flag word, with its value in a file, and with the word."""
    assert list(OTHERS) == [field.name for field in fields(TrainConfig)]
    want = {name: value for name, (_, value) in OTHERS.items()}
    assert all(value != getattr(TrainConfig, name) for name, value in want.items() if name != "init")
    cfg = parse(*(f"--{name}={word}" for name, (word, _) in OTHERS.items()))
    assert asdict(cfg) == want and [type(v) for v in asdict(cfg).values()] == [type(v) for v in want.values()]
    pairs = [part for name, (word, _) in OTHERS.items() if name != "prompt" for part in (f"--{name}", word)]
    assert asdict(parse(*pairs)) == {**want, "prompt": TrainConfig.prompt}
    for settings in (want, {name: word for name, (word, _) in OTHERS.items()}):
        Path("c.json").write_text(json.dumps(settings))
        assert asdict(parse("--config", "c.json")) == want
    Path("c.json").write_text('{"compile": 1}')
    assert parse("--config", "c.json").compile == "1"  # a word, also where a file has a number


def test_nothing_said_is_the_paper_run_and_presets_set_what_they_say():
    assert parse() == TrainConfig()
    for preset, settings in PRESETS.items():
        assert asdict(parse("--preset", preset)) == {**asdict(TrainConfig()), **settings}


def test_a_flag_without_a_value_means_yes_and_the_last_word_counts():
    assert parse("--resume").resume is True and parse("--shuffle").shuffle is True and parse().resume is False
    assert parse("--shuffle", "False").shuffle is False
    assert parse("--max_steps=1", "--max_steps=2").max_steps == 2


def test_a_resumed_run_remembers_what_the_folder_of_a_configuration_file_says():
    """Not what the default folder says."""
    for folder, seed in (("log", 3), ("other", 4)):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps({**asdict(TrainConfig()), "seed": seed}))
    Path("c.json").write_text(json.dumps(dict(log_dir="other", max_steps=12)))
    cfg = parse("--config", "c.json", "--resume")
    assert (cfg.seed, cfg.max_steps, cfg.log_dir) == (4, 12, "other")
    assert parse("--resume").seed == 3 and parse().seed == TrainConfig.seed


def test_torchrun_says_that_it_has_restarted(monkeypatch):
    for count, resume in (("0", False), ("2", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert parse().resume is resume


def test_config_json_starts_the_same_run(tmp_path):
    """From it alone, here in place; and it does not say --resume, though the run that wrote it was resumed."""
    write_data(tmp_path / "data")
    run([*words(data_dir="data", max_steps=7), "--resume"], tmp_path)
    written = json.loads(Path("log/config.json").read_text())
    assert list(written) == [field.name for field in fields(TrainConfig)] and written["resume"] is False
    run(["--config", "log/config.json"], tmp_path)
    assert_same_run(tmp_path / "log", tmp_path / "log" / "earlier-1", 7)
    assert json.loads(Path("log/config.json").read_text()) == written
