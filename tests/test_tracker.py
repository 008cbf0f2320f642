"""--wandb: what a run sends. With a stand-in that takes it down."""
import signal
import sys
from dataclasses import asdict
from unittest.mock import Mock

import pytest

import train_gpt2
from launch import saved, words, write_data
from train_gpt2 import UserError, main, parse_config

RUN = words(data_dir="data", max_steps=6, sample_every=3, checkpoint_every=3, wandb="mine")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    stand_in = Mock()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_what_a_run_sends(wandb):
    """The log, number for number, in order: wandb drops what is late."""
    values = main(RUN)
    wandb.init.assert_called_once_with(project="mine", dir="log", config=asdict(parse_config("train", RUN)[0]))
    calls, sent = wandb.init.return_value.log.call_args_list, {}
    for call in calls:
        for stream, value in call.args[0].items():
            sent.setdefault(stream, {})[call.kwargs["step"]] = value
    assert sent == values and set(sent) == {"train", "val", "lr", "norm", "tok/s"}
    assert [call.kwargs["step"] for call in calls] == sorted(call.kwargs["step"] for call in calls)
    wandb.init.return_value.finish.assert_called_once_with()


def test_a_run_that_was_stopped_is_finished_too(wandb, monkeypatch):
    monkeypatch.setattr(train_gpt2, "evaluate_loss", lambda *_: signal.raise_signal(signal.SIGTERM) or (1.0, 1))
    main(RUN)
    assert saved("log", 1)["step"] == 1
    wandb.init.return_value.finish.assert_called_once_with()


@pytest.mark.parametrize("package, says", [(None, "ModuleNotFoundError: .*wandb"),
                                           (Mock(init=Mock(side_effect=OSError("no key.\nUse it"))), "no key. Use it")])
def test_one_line_where_it_is_missing_or_refuses(wandb, tmp_path, monkeypatch, package, says):
    """Before an earlier run, which has sent nothing since it was not asked to, is moved aside."""
    main([*RUN, "--wandb="])
    assert not wandb.mock_calls
    before = {file.name: file.read_bytes() for file in (tmp_path / "log").iterdir()}
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(UserError, match=f"--wandb mine: .*{says}"):
        main(RUN)
    assert {file.name: file.read_bytes() for file in (tmp_path / "log").iterdir()} == before
