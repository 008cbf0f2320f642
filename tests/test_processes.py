"""One process, many processes, any number of rows a forward: the same losses, norm and weights.

In float32 they agree as far as sums in another order do. In float64 they agree to 1e-12, which leaves a
mistake no room: a gradient that was not averaged, a mean of means, or a row that was read twice moves the
weights by far more.
"""
import os
import re
import shutil
from functools import partial

import pytest
import torch

from conftest import ROOT
from helpers import tiny_config
from launch import command, farthest, flat, log_values, run, run_many, saved
from train_gpt2 import UserError, World


def in_float64():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="module")
def whole_in_float64(base):
    """One process, 4 rows a forward; `whole`, in conftest.py, is the same in float32."""
    run(command(base, "whole64"), base, in_float64)
    assert saved(base / "whole64")["model"]["transformer.wpe.weight"].dtype == torch.float64
    return base / "whole64"


def assert_agrees(folder, reference, rel=1e-5):
    """Each stream has the same steps, and the same numbers but for rounding."""
    ours, theirs = log_values(folder), log_values(reference)
    assert ours.keys() == theirs.keys() == {"train", "val", "lr", "norm"}
    for stream in theirs:
        assert list(ours[stream]) == list(theirs[stream])
        assert ours[stream] == pytest.approx(theirs[stream], rel=rel), stream


@pytest.mark.parametrize("size, B", [(1, 1), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_any_number_of_processes_and_rows_trains_alike(base, whole_in_float64, tmp_path, size, B):
    """16 rows a step, as 16 x 1 x 1, 4 x 2 x 2, 4 x 1 x 4. Logs have 8 digits."""
    run_many(size, command(base, micro_batch_size=B), tmp_path, in_float64)
    assert_agrees(tmp_path / "log", whole_in_float64, rel=2e-8)
    ours, theirs = saved(tmp_path / "log"), saved(whole_in_float64)
    assert farthest(ours, theirs) < 1e-12
    ours, theirs = flat(ours["optimizers"]), flat(theirs["optimizers"])
    assert ours.keys() == theirs.keys()
    assert all((value - theirs[key]).abs().max() < 1e-12 for key, value in ours.items() if torch.is_tensor(value))


def test_two_processes_train_as_one_in_float32(whole, whole_of_two):
    """Here only rounding differs."""
    assert_agrees(whole_of_two, whole)
    assert farthest(saved(whole_of_two), saved(whole)) < 1e-4


@pytest.mark.parametrize("val_tokens, size, scored", [(10**7, 2, 496), (32, 4, 32)])
def test_a_val_split_that_cannot_be_shared_out_evenly(base, tmp_path, val_tokens, size, scored):
    """31 windows for two processes: the last of four rounds has 7 rows. Two for four: two of them wait."""
    for n in (1, size):
        out = run_many(n, command(base, f"log{n}", val_tokens=val_tokens, max_steps=2, warmup_steps=1, val_every=1),
                       tmp_path, in_float64)[0].out
        assert f"(on {scored} tokens of " in out
    assert_agrees(tmp_path / f"log{size}", tmp_path / "log1", rel=2e-8)


def test_muon_in_several_processes(base, tmp_path):
    settings = dict(optimizer="muon", max_steps=6, warmup_steps=1)
    for size in (1, 2):
        run_many(size, command(base, f"log{size}", **settings), tmp_path)
    assert_agrees(tmp_path / "log2", tmp_path / "log1", rel=1e-5)  # torch.optim.Muon, in bfloat16, is off by 1e-4


def test_bfloat16_in_two_processes(base, tmp_path):
    """Products are rounded to 8 bits, differently for other batches. Measured with two seeds: losses differed by 1.0e-4
    of their size, and by 2.7e-2 and more where gradients were not averaged."""
    for size, B in ((1, 16), (2, 2)):
        run_many(size, command(base, f"log{size}", dtype="bfloat16", micro_batch_size=B), tmp_path)
    ours, theirs = log_values(tmp_path / "log2"), log_values(tmp_path / "log1")
    assert all(ours[stream] == pytest.approx(theirs[stream], rel=1e-3) for stream in ("train", "val"))
    assert ours != theirs  # it was bfloat16


def with_questions(folder):
    """Rig this process: HellaSwag's questions are there."""
    os.environ["HELLASWAG_DIR"] = str(folder)


def test_hellaswags_questions_are_shared_out(base, tmp_path):
    """Each is answered once: in the standard errors it counts how many there are."""
    shutil.copy(ROOT / "tests/hellaswag_fixture.jsonl", tmp_path / "hellaswag_val.jsonl")
    one, two = (run_many(size, command(base, f"log{size}", hellaswag_every=1, max_steps=1, warmup_steps=1), tmp_path,
                         partial(with_questions, tmp_path))[0].out for size in (1, 2))
    scores = re.findall("HellaSwag: .*", one)
    assert len(scores) == 2 and scores == re.findall("HellaSwag: .*", two)


def tell_of_writing():
    """Rig this process: print the name of each file that it completes."""
    original = os.replace
    os.replace = lambda old, new: (print("wrote", os.path.basename(new), flush=True), original(old, new))


def test_one_process_prints_and_writes(base, tmp_path):
    first, second = run_many(2, command(base, sample_every=10, prompt="A", max_steps=10, warmup_steps=1), tmp_path,
                             tell_of_writing)
    assert second.out == second.err == ""
    assert first.out.count("sample | A") == 4  # two before the first step, two after the last
    assert first.out.count("step     3 | loss") == 1
    assert re.findall("wrote (.*[.]pt)", first.out) == ["ckpt_00000005.pt", "ckpt_00000010.pt"]


def test_what_process_0_does_alone_stops_all_if_it_fails(monkeypatch):
    world = World(tiny_config(device="cpu"))
    world.rank = 1
    monkeypatch.setattr(world, "any", lambda flag: True)  # process 0 has met wrong input
    with pytest.raises(UserError, match="process 0 has said why"):
        world.first(lambda: pytest.fail("this is for process 0"))
