"""One process, many processes, any number of rows a forward: the same losses, norm and weights.

In float32 they agree as far as sums in another order do. In float64 they agree to 1e-12, which leaves a
mistake no room: a gradient that was not averaged, a mean of means, or a row that was read twice moves the
weights by far more.
"""
import json
import re

import pytest
import torch

from launch import (PROGRAM, TINY, farthest, finish, flat, log_values, run, run_many, saved, shell, torchrun,
                    two_machines, words, write_data)

LAST = TINY["max_steps"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("processes")
    write_data(base / "data")
    return base


def command(base, log_dir="log", **changes):
    return words(data_dir=base / "data", log_dir=log_dir, **changes)


def in_float64():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="module")
def alone(base):
    """One process, 4 rows a forward: what all others are compared with."""
    run(command(base, "alone"), base)
    return base / "alone"


@pytest.fixture(scope="module")
def alone_in_float64(base):
    run(command(base, "alone64"), base, in_float64)
    assert saved(base / "alone64")["model"]["transformer.wpe.weight"].dtype == torch.float64
    return base / "alone64"


def assert_agrees(folder, reference, rel=1e-5):
    """Each stream has the same steps, and the same numbers but for rounding."""
    ours, theirs = log_values(folder), log_values(reference)
    assert ours.keys() == theirs.keys() == {"train", "val", "lr", "norm"}
    for stream in theirs:
        assert list(ours[stream]) == list(theirs[stream])
        assert ours[stream] == pytest.approx(theirs[stream], rel=rel), stream


@pytest.mark.parametrize("size, B", [(1, 1), (2, 2), (2, 8), pytest.param(1, 16, marks=pytest.mark.slow),
                                     pytest.param(4, 1, marks=pytest.mark.slow)])
def test_any_number_of_processes_and_rows_trains_alike(base, alone_in_float64, tmp_path, size, B):
    """16 rows a step, as 16 x 1 x 1, 1 x 16 x 1, 4 x 2 x 2, 1 x 8 x 2, 4 x 1 x 4. Logs have 8 digits."""
    run_many(size, command(base, micro_batch_size=B), tmp_path, in_float64)
    assert_agrees(tmp_path / "log", alone_in_float64, rel=2e-8)
    ours, theirs = saved(tmp_path / "log"), saved(alone_in_float64)
    assert farthest(ours, theirs) < 1e-12
    moments = [flat(checkpoint["optimizers"]) for checkpoint in (ours, theirs)]
    assert moments[0].keys() == moments[1].keys()
    for key, value in moments[0].items():
        if isinstance(value, torch.Tensor):
            assert (value - moments[1][key]).abs().max() < 1e-12, key


def test_a_val_split_that_cannot_be_shared_out_evenly(base, tmp_path):
    """31 windows for two processes: the last of four rounds has 7 rows. Two for four: two of them wait."""
    for tokens, size in ((496, 2), (32, 4)):
        for n in (1, size):
            run_many(n, command(base, f"log{n}of{size}", val_tokens=tokens, max_steps=2, warmup_steps=1, val_every=1),
                     tmp_path, in_float64)
        assert_agrees(tmp_path / f"log{n}of{size}", tmp_path / f"log1of{size}", rel=2e-8)


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


def tell_of_writing():
    """Rig this process: print the name of each file that it completes."""
    import os
    original = os.replace
    os.replace = lambda old, new: (print("wrote", os.path.basename(new), flush=True), original(old, new))


def test_one_process_prints_and_writes(base, tmp_path):
    running = run_many(2, command(base, sample_every=10, prompt="A", max_steps=10, warmup_steps=1), tmp_path,
                       tell_of_writing)
    assert running[1].out == running[1].err == ""
    assert running[0].out.count("sample | A") == 4  # two before the first step, two after the last
    assert running[0].out.count("step     3 | loss") == 1
    assert re.findall("wrote (.*[.]pt)", running[0].out) == ["ckpt_00000005.pt", "ckpt_00000010.pt"]


# ---- the gradients are averaged once a step

def count_reductions():
    """Rig this process: print how often DDP has averaged gradients, and how often backward() ran."""
    import torch.distributed as dist
    from torch.nn import parallel
    counts = dict(reductions=0, backwards=0)
    original, backward = parallel.DistributedDataParallel, torch.Tensor.backward

    def hook(state, bucket):
        counts["reductions"] += bucket.is_last()
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    class Counted(original):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.register_comm_hook(None, hook)

    def rigged(*arguments, **options):
        counts["backwards"] += 1
        return backward(*arguments, **options)

    parallel.DistributedDataParallel, torch.Tensor.backward = Counted, rigged
    close = dist.destroy_process_group
    dist.destroy_process_group = lambda: (print(json.dumps(counts), flush=True), close())


@pytest.mark.parametrize("B", [8, 2])
def test_gradients_travel_once_a_step(base, alone, tmp_path, B):
    """Whether a step has one micro-batch, or four, and also after an evaluation. In float32 only rounding differs."""
    for running in run_many(2, command(base, micro_batch_size=B), tmp_path, count_reductions):
        counts = json.loads(running.out.splitlines()[-1])
        assert counts == dict(reductions=LAST, backwards=LAST * 8 // B)
    assert_agrees(tmp_path / "log", alone)
    assert farthest(saved(tmp_path / "log"), saved(alone)) < 1e-4


# ---- as a user starts it

@pytest.mark.slow
@pytest.mark.parametrize("size, B", [(2, 8), (4, 2)])
def test_torchrun_equals_one_process(base, alone, tmp_path, size, B):
    out = finish(torchrun(tmp_path, command(base, micro_batch_size=B), size=size))
    assert_agrees(tmp_path / "log", alone)
    assert farthest(saved(tmp_path / "log"), saved(alone)) < 1e-4
    assert out.count("step    23 | loss") == 1 and f"processes {size}" in out
    assert f"{B} rows x 16 tokens x {16 // size // B} accumulated x {size} processes" in out


@pytest.mark.slow
def test_plain_python_equals_what_the_other_tests_start(base, alone, tmp_path):
    """They fork the program from a server; this one starts as anybody's does, and writes the same bits."""
    finish(shell(["train_gpt2.py", *command(base)], tmp_path))
    assert farthest(saved(tmp_path / "log"), saved(alone)) == 0


@pytest.mark.slow
def test_two_machines_train_as_one_does(base, alone, tmp_path):
    """Two agents that meet over the network, here over loopback, each with two processes."""
    agents = two_machines(tmp_path, command(base, micro_batch_size=2), size=2)
    out = "".join(finish(agent) for agent in agents)
    assert_agrees(tmp_path / "log", alone)
    assert farthest(saved(tmp_path / "log"), saved(alone)) < 1e-4
    assert out.count("step    23 | loss") == 1 and "2 rows x 16 tokens x 2 accumulated x 4 processes" in out


@pytest.mark.slow
def test_torchrun_shows_one_line_for_wrong_input(base, tmp_path):
    out = finish(torchrun(tmp_path, command(base, n_head=3)), status=None)
    assert len(re.findall("train_gpt2.py: --n_embd 16 is not a multiple of --n_head 3", out)) == 1
    assert f'File "{PROGRAM}"' not in out  # torchrun's own report of a failed worker has a traceback
