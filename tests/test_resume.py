"""A run that was stopped, killed or starved anywhere, and continued, is the run that never was: bit by bit.

`whole` below is a run that nobody disturbed. Every other run is disturbed in one way, continued with --resume, and
compared with it: weights, optimizer state, and each line of the log but those that tell the pace.
"""
import contextlib
import functools
import io
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import fineweb
from helpers import FakeWorld, tiny_config
from launch import (TINY, assert_same_run, farthest, finish, log_lines, log_values, run, run_many, saved, start,
                    start_many, steps_saved, torchrun, two_machines, words, write_data)

LAST = TINY["max_steps"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("resume")
    write_data(base / "data")
    return base


@pytest.fixture(scope="module")
def whole(base):
    """The undisturbed run."""
    run(command(base, "whole"), base)
    assert steps_saved(base / "whole") == [20, 24]
    assert list(log_values(base / "whole")["val"]) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    return base / "whole"


@pytest.fixture(scope="module")
def whole_of_two(base):
    """The same by two processes; their sums are rounded in another order."""
    run_many(2, command(base, "whole_of_two"), base)
    return base / "whole_of_two"


def command(base, log_dir, *more, **changes):
    """A command line of the run, its log anywhere."""
    return [*words(data_dir=base / "data", log_dir=log_dir, **changes), *more]


def pause(*steps):
    """Rig this process: after the backward pass of these steps it prints "paused", until there is a file goSTEP."""
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def rigged(*arguments, **options):
        step = len(calls)
        calls.append(1)
        if step in steps:
            print("paused in", step, flush=True)
            end = time.monotonic() + 100  # if the test has failed meanwhile
            while not os.path.exists(f"go{step}") and time.monotonic() < end:
                time.sleep(0.01)
        return original(*arguments, **options)

    torch.nn.utils.clip_grad_norm_ = rigged


def wait_until(true, timeout=60):
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def half(base, tmp_path):
    """A run that was killed in step 17: its log is further than its newest checkpoint, of step 15."""
    running = start(command(base, "log"), tmp_path, functools.partial(pause, 17))
    running.wait_for("paused in 17")
    wait_until(lambda: 5 not in steps_saved(tmp_path / "log"))  # it is written, and the oldest one is deleted
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -9
    assert steps_saved(tmp_path / "log") == [10, 15] and max(log_values(tmp_path / "log")["train"]) == 16
    return tmp_path / "log"


# ---- sudden death

def kill_at(count, when):
    """Rig this process: before its count-th operation on a file, or with half a checkpoint written, it kills itself.
    Nothing gets a chance to clean up.
    """
    left = [count]

    def rig(module, name, last_words=lambda *arguments: None):
        original = getattr(module, name)

        def rigged(*arguments, **options):
            left[0] -= name in when
            if left[0] == 0 and name in when:
                last_words(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(module, name, rigged)

    def half_a_file(path, write):
        whole = io.BytesIO()
        write(whole)
        Path(f"{path}.tmp").write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])

    rig(os, "fsync")
    rig(os, "replace")
    rig(os, "unlink")
    rig(fineweb, "write_file", half_a_file)


def killed_and_continued(base, folder, count, when, **changes):
    """-> was it killed at all?"""
    running = start(command(base, "log", **changes), folder, functools.partial(kill_at, count, when))
    status = running.wait()
    assert status in (0, -9), running.err
    if status:
        run(command(base, "log", "--resume", **changes), folder)
    return status == -9


@pytest.mark.parametrize("operation, count", [("write_file", 3), ("write_file", 5), ("fsync", 6), ("replace", 5), ("unlink", 2)])
def test_killed_while_a_checkpoint_is_written(base, whole, tmp_path, operation, count):
    """Half of it in the temporary file; all of it, perhaps only in memory; on disk, but without its name; named, but
    the older one not yet deleted. Only one is kept."""
    assert killed_and_continued(base, tmp_path, count, (operation,), keep_checkpoints=1)
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.slow
def test_killed_before_each_operation_on_a_file(base, whole, tmp_path):
    """Every point at which the state on the disk changes, one after the other, until a run gets through."""
    for count in range(1, 100):
        folder = tmp_path / str(count)
        folder.mkdir()
        killed = killed_and_continued(base, folder, count, ("fsync", "replace", "unlink", "write_file"))
        assert_same_run(folder / "log", whole)
        assert steps_saved(folder / "log")[-2:] == [20, 24]  # 15 stays if the last unlink was not to be
        if not killed:
            break
    assert count > 20


@pytest.mark.slow
@pytest.mark.parametrize("size, times", [(1, 20), (2, 6)])
def test_a_process_killed_at_random_moments(base, whole, whole_of_two, tmp_path, size, times):
    moments = random.Random(size)
    begun = time.monotonic()
    run_many(size, command(base, "first"), tmp_path)
    duration, killed = time.monotonic() - begun, 0
    for i in range(times):
        processes = start_many(size, command(base, "log"), tmp_path)
        time.sleep(moments.uniform(0.1, 1) * duration)
        victim = processes[i % size]
        if victim.process.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
        killed += victim.wait() == -9
        for process in processes:  # torchrun ends the others: they may be waiting for the one that died
            if process.process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        run_many(size, command(base, "log", "--resume"), tmp_path)
        assert_same_run(tmp_path / "log", whole if size == 1 else whole_of_two)
        shutil.rmtree(tmp_path / "log")
    assert killed > times / 3


def children(pid):
    """{rank: process id} of what a torchrun has started."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        for word in Path(f"/proc/{child}/environ").read_text().split("\0"):
            if word.startswith("RANK="):
                found[int(word[5:])] = int(child)
    return found


def wait_for_step(folder, step):
    """Until the log has come to a step."""
    file = Path(folder, "log.txt")
    wait_until(lambda: file.exists() and re.search(f"^{step} train ", file.read_text(), re.MULTILINE), 90)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find torchrun's workers")
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_run_whose_worker_was_killed(base, whole_of_two, tmp_path, rank):
    """Unattended: nobody says --resume, and the folder held another run when it began."""
    shutil.copytree(whole_of_two, tmp_path / "log")
    (tmp_path / "log" / "log.txt").write_text("")
    popen = torchrun(tmp_path, command(base, "log"), "--max-restarts=3")
    wait_for_step(tmp_path / "log", 12)
    os.kill(children(popen.pid)[rank], signal.SIGKILL)
    out = finish(popen)
    assert_same_run(tmp_path / "log", whole_of_two)
    assert out.count("step     0 | loss") == 1
    assert steps_saved(tmp_path / "log" / "earlier-1") == [20, 24]
    assert not (tmp_path / "log" / "earlier-2").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find torchrun's workers")
def test_two_machines_go_on_after_a_death_on_one(base, whole_of_two, tmp_path, monkeypatch):
    """The variable gives each restart a store of addresses of its own, which torchrun does not by itself."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    agents = two_machines(tmp_path, command(base, "log"), "--max-restarts=3")
    wait_for_step(tmp_path / "log", 12)
    os.kill(next(iter(children(agents[1].pid).values())), signal.SIGKILL)
    out = "".join(finish(agent) for agent in agents)
    assert out.count("step     0 | loss") == 1
    assert_same_run(tmp_path / "log", whole_of_two)


def only_one_was_told():
    """Rig this process: torchrun counts restarts on the machine where a process died, not on the other."""
    os.environ.update(GROUP_WORLD_SIZE="2", TORCHELASTIC_RESTART_COUNT=os.environ["RANK"])


def test_if_one_machine_resumes_all_do(base, whole_of_two, tmp_path):
    shutil.copytree(whole_of_two, tmp_path / "log")
    (tmp_path / "log" / "ckpt_00000024.pt").unlink()
    assert "steps: 20 to 24" in run_many(2, command(base, "log"), tmp_path, only_one_was_told)[0].out
    assert_same_run(tmp_path / "log", whole_of_two)


def on_a_disk_of_its_own():
    """Rig this process: the second one sees another folder under the same name."""
    folder = Path(f"machine{os.environ['RANK']}")
    folder.mkdir(exist_ok=True)
    if os.environ["RANK"] == "1":
        os.chdir(folder)


def test_machines_that_do_not_share_the_log_folder_are_told(base, whole_of_two, tmp_path):
    shutil.copytree(whole_of_two, tmp_path / "log")
    first, second = run_many(2, command(base, "log", "--resume"), tmp_path, on_a_disk_of_its_own, status=2)
    assert first.err.startswith("train_gpt2.py: --log_dir log holds other checkpoints on other machines: ")
    assert first.err.count("\n") == 1 and second.err == ""


# ---- signals

def assert_stopped(folder, out):
    """It said how to go on, and has a checkpoint of the very step at which its log ends -> that step."""
    [line] = [line for line in out.splitlines() if line.startswith("stopped after ")]
    assert line.endswith("the same command with --resume continues") and "done:" not in out
    step = int(line.split()[2])
    assert steps_saved(folder)[-1] == step
    assert max(log_values(folder)["train"]) == step - 1 and max(log_values(folder)["val"]) < step
    return step


@pytest.mark.parametrize("size, rank, sent", [(1, 0, signal.SIGTERM), (1, 0, signal.SIGINT), (2, 0, signal.SIGTERM),
                                              (2, 1, signal.SIGTERM)])
def test_a_signal_to_one_process_ends_the_step_saves_and_stops_all(base, whole, whole_of_two, tmp_path, size, rank,
                                                                  sent):
    running = start_many(size, command(base, "log"), tmp_path, functools.partial(pause, 7))
    running[rank].wait_for("paused in 7")
    os.kill(running[rank].pid, sent)
    (tmp_path / "go7").touch()
    assert [r.wait() for r in running] == [0] * size and [r.err for r in running] == [""] * size
    assert assert_stopped(tmp_path / "log", running[0].out + "".join(r.out for r in running[1:])) == 8
    run_many(size, ["--resume", "--log_dir", "log"], tmp_path)  # as it said; the settings are those of config.json
    assert_same_run(tmp_path / "log", whole if size == 1 else whole_of_two)


def test_a_second_ctrl_c_stops_at_once(base, whole, tmp_path):
    """The first one waits for the end of the step, here for ever; what was saved before stays good."""
    running = start(command(base, "log"), tmp_path, functools.partial(pause, 7))
    running.wait_for("paused in 7")
    for sent in (signal.SIGINT, signal.SIGTERM):  # a kill after a Ctrl-C is no second Ctrl-C
        os.kill(running.pid, sent)
        time.sleep(0.5)
        assert running.process.is_alive()
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(timeout=30) != 0
    assert steps_saved(tmp_path / "log") == [5] and "stopped after" not in running.out
    run(command(base, "log", "--resume"), tmp_path)
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.slow
@pytest.mark.parametrize("sent, group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_torchrun_hands_signals_on(base, tmp_path, sent, group):
    """Ctrl-C in a terminal reaches the whole process group, `kill` only torchrun itself."""
    popen = torchrun(tmp_path, command(base, "log", max_steps=5000), start_new_session=True)
    wait_for_step(tmp_path / "log", 7)
    (os.killpg if group else os.kill)(popen.pid, sent)
    assert_stopped(tmp_path / "log", finish(popen, status=None))


# ---- --resume where there is nothing, something else, or something damaged

def test_resume_without_a_checkpoint_starts(base, whole, tmp_path):
    """So that one command line serves a scheduler that kills and repeats it. What was logged before goes."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 train 9.9\n")
    out = run(command(base, "log", "--resume"), tmp_path).out
    assert "no checkpoint to resume yet" in out and "steps: 0 to 24" in out
    assert_same_run(tmp_path / "log", whole)


def test_resume_of_a_finished_run_changes_nothing_and_a_longer_one_goes_on(base, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "log")
    out = run(command(base, "log", "--resume"), tmp_path).out
    assert "| loss" not in out and "done:" in out
    assert_same_run(tmp_path / "log", whole)
    run(command(base, "log", "--resume", max_steps=27), tmp_path)
    values = log_values(tmp_path / "log")
    assert list(values["train"]) == list(range(27)) and list(values["val"])[-2:] == [24, 27]


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_damaged_checkpoint_is_passed_over_and_never_drives_a_good_one_out(base, whole, half, size):
    """Even if it is the newest, and only one is kept; also if the resumed run is killed before it gets there."""
    newest, again = half / "ckpt_00000015.pt", command(base, "log", "--resume", keep_checkpoints=1, checkpoint_every=2)
    os.truncate(newest, size if size >= 0 else newest.stat().st_size - 1)
    running = start(again, half.parent, functools.partial(pause, 3))
    running.wait_for("paused in 3")
    assert "ckpt_00000015.pt is damaged" in running.out and "trying the one before" in running.out
    assert "steps: 10 to 24" in running.out
    wait_until(lambda: 10 not in steps_saved(half))
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert "steps: 12 to 24" in run(again, half.parent).out
    assert_same_run(half, whole)


def test_a_resumed_run_cuts_the_log_back_reads_on_and_does_not_measure_twice(base, whole, half):
    """Lines of steps that are trained again, a line of nonsense, and a line without its end go."""
    with open(half / "log.txt", "a") as file:
        file.write("17 train 1.0\n99 val 2.0\nnonsense\n14 note 1.")
    out = run(command(base, "log", "--resume"), half.parent).out
    steps = [line.split("|")[0] for line in out.splitlines() if "| loss" in line]
    assert steps == [f"step {step:5d} " for step in range(15, 24)]
    assert out.count("| val loss") == 4  # 15, 18, 21, 24
    assert_same_run(half, whole)


@pytest.mark.parametrize("optimizer, dtype, shuffle", [("muon", "float32", 0), ("muon", "bfloat16", 1),
                                                       ("adamw", "bfloat16", 1)])
def test_every_optimizer_and_number_format_resumes(base, tmp_path, optimizer, dtype, shuffle):
    """Also over the border between two epochs: 23 steps are one. And without shuffling."""
    settings = dict(optimizer=optimizer, dtype=dtype, max_steps=30, checkpoint_every=20, val_every=10, shuffle=shuffle)
    run(command(base, "whole", **settings), tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "log")
    (tmp_path / "log" / "ckpt_00000030.pt").unlink()
    assert "steps: 20 to 30" in run(command(base, "log", "--resume", **settings), tmp_path).out
    assert_same_run(tmp_path / "log", tmp_path / "whole", 30)
    checkpoint = saved(tmp_path / "log", 30)
    assert len(checkpoint["optimizers"]) == (2 if optimizer == "muon" else 1)
    assert all(state["state"] for state in checkpoint["optimizers"])


@pytest.mark.parametrize("size, B", [(1, 16), (2, 4)])
def test_resumed_with_other_processes_or_rows(base, whole, half, size, B):
    before = [line for line in log_lines(half) if int(line.split()[0]) < 15]
    run_many(size, command(base, "log", "--resume", micro_batch_size=B), half.parent)
    assert log_lines(half)[:len(before)] == before
    ours, theirs = log_values(half), log_values(whole)
    assert ours.keys() == theirs.keys()
    for stream in theirs:
        assert ours[stream] == pytest.approx(theirs[stream], rel=1e-5), stream
    assert farthest(saved(half), saved(whole)) < 1e-4


# ---- other settings

def test_resume_with_another_model_or_text_is_refused(base, whole, tmp_path):
    """Each difference is named, in one line, and nothing is touched."""
    shutil.copytree(whole, tmp_path / "log")
    write_data(tmp_path / "data", train=9000)
    before = {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")}
    changes = dict(n_layer=3, n_head=4, n_embd=32, block_size=8, vocab_size=300, optimizer="muon", shuffle=0, seed=5,
                   total_batch_size=512)
    for changes, names in ((changes, changes.keys() | {"train_tokens"}), (dict(seed=5), {"seed", "train_tokens"})):
        line = run([*words(data_dir="data", log_dir="log", **changes), "--resume"], tmp_path, status=2).err
        assert line.count("\n") == 1 and "another --log_dir" in line
        assert set(re.findall(r"(\w+) \S+ -> ", line)) == names
    assert "seed 1337 -> 5" in line and "train_tokens 6000 -> 9000" in line
    assert {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")} == before


def test_the_settings_of_a_resumed_run_win_over_the_checkpoints(base, half):
    """The rates and the decay: what the optimizers remember of them is overruled, and so it is saved."""
    run(command(base, "log", "--resume", max_lr=2e-2, val_every=4, weight_decay=0.25, max_steps=16), half.parent)
    assert log_values(half)["lr"][15] != pytest.approx(log_values(half)["lr"][14], rel=0.2)
    groups = saved(half, 16)["optimizers"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]


def test_a_new_run_moves_an_earlier_one_aside(base, whole, tmp_path):
    """Every file of it, unchanged, also the second time."""
    def files(folder):
        return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name != "lock"}

    shutil.copytree(whole, tmp_path / "log")
    (tmp_path / "log" / "earlier-2").mkdir()  # a person's; or 1 has been deleted
    for number, steps in ((1, 2), (3, 5)):
        before = files(tmp_path / "log")
        out = run(command(base, "log", max_steps=steps, warmup_steps=1), tmp_path).out
        assert f"log held a run, which is now in log/earlier-{number} (--resume would have continued it)" in out
        assert files(tmp_path / "log" / f"earlier-{number}") == before and "config.json" in before
    assert steps_saved(tmp_path / "log") == [5]
    assert list(log_values(tmp_path / "log")["train"]) == [0, 1, 2, 3, 4]


def test_two_runs_do_not_write_into_one_folder(base, tmp_path):
    """Not with --resume either. When the first one has ended, even by kill -9, another may."""
    running = start(command(base, "log"), tmp_path, functools.partial(pause, 7))
    running.wait_for("paused in 7")
    before = {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")}
    for more in ([], ["--resume"]):
        line = run(command(base, "log", *more), tmp_path, status=2).err
        assert line.startswith("train_gpt2.py: another run is writing to log: ") and line.count("\n") == 1
    assert {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")} == before
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    run(command(base, "log", "--resume"), tmp_path)


def test_a_checkpoint_that_was_copied_elsewhere_has_its_tokenizer(base, whole, tmp_path):
    shutil.copy(whole / "ckpt_00000024.pt", tmp_path / "model.pt")
    text = ["sample", "--init=model.pt", "--device=cpu", "--max_new_tokens=30", "Ab"]
    here = run(text, tmp_path).out.splitlines()[1:]
    there = run([*text[:1], f"--init={whole}", *text[2:]], tmp_path).out.splitlines()[1:]
    assert here == there and here[0].startswith("Ab")


# ---- a full disk, and how many checkpoints stay

def small_files(saves, size=60_000):
    """Rig this process: while it writes these checkpoints (the first is 1) no file may pass `size` bytes."""
    original, calls = fineweb.write_file, []

    def rigged(path, write):
        calls.append(1) if path.suffix == ".pt" else None
        limit = size if len(calls) in saves else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        original(path, write)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with OSError, as on a full disk
    fineweb.write_file = rigged


def test_a_checkpoint_that_cannot_be_written_costs_a_warning(base, whole, tmp_path):
    """The third and the fourth of five fail; then there is room again."""
    out = run(command(base, "log"), tmp_path, functools.partial(small_files, (3, 4))).out
    warnings = [line for line in out.splitlines() if "WARNING" in line]
    assert len(warnings) == 2
    assert warnings[0].startswith("WARNING: log/ckpt_00000015.pt can't be written, older checkpoints stay")
    assert steps_saved(tmp_path / "log") == [10, 24]
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a file that is always full")
def test_a_log_that_cannot_be_written_waits(tmp_path, capsys):
    """Its lines are kept in memory, and go out with the next that finds room."""
    from train_gpt2 import Log
    with contextlib.closing(Log(tiny_config(log_dir=str(tmp_path)), FakeWorld(), 0)) as log:
        (tmp_path / "log.txt").unlink()
        (tmp_path / "log.txt").symlink_to("/dev/full")
        log.write(3, {"train": 4.5, "norm": 1.0})
        assert capsys.readouterr().out.startswith("WARNING: the log of step 3 can't be written yet: ")
        (tmp_path / "log.txt").unlink()
        log.write(4, {"train": 4.25})
    assert (tmp_path / "log.txt").read_text() == "3 train 4.5\n3 norm 1\n4 train 4.25\n"
    assert log.values == {"train": {3: 4.5, 4: 4.25}, "norm": {3: 1.0}} and capsys.readouterr().out == ""


@pytest.mark.parametrize("changes, left", [(dict(keep_checkpoints=1), [24]), (dict(keep_checkpoints=3), [15, 20, 24]),
                                           (dict(checkpoint_every=0), [])])
def test_the_newest_checkpoints_are_kept(base, tmp_path, changes, left):
    run(command(base, "log", **changes), tmp_path)
    assert steps_saved(tmp_path / "log") == left


def test_a_stopped_run_saves_even_with_checkpoint_every_0(base, tmp_path):
    running = start(command(base, "log", checkpoint_every=0), tmp_path, functools.partial(pause, 3))
    running.wait_for("paused in 3")
    os.kill(running.pid, signal.SIGTERM)
    (tmp_path / "go3").touch()
    assert running.wait() == 0 and assert_stopped(tmp_path / "log", running.out) == 4


# ---- a loss that is none

def spoil(what, bad):
    """Rig this process: in step 7 the norm of the gradient is not finite; or the loss alone is not, as may happen
    where float16 gradients are scaled."""
    clip, cross_entropy, steps = torch.nn.utils.clip_grad_norm_, torch.nn.functional.cross_entropy, []

    def rigged(*arguments, **options):
        steps.append(1)
        return clip(*arguments, **options) * (bad if what == "norm" and len(steps) == 8 else 1)

    torch.nn.utils.clip_grad_norm_ = rigged
    torch.nn.functional.cross_entropy = lambda *arguments, **options: cross_entropy(*arguments, **options) + (
        bad if what == "loss" and len(steps) == 7 and torch.is_grad_enabled() else 0)


@pytest.mark.parametrize("size, what, bad", [(1, "norm", math.nan), (2, "norm", math.inf), (1, "loss", math.nan)])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(base, whole, tmp_path, size, what, bad):
    """One line: the step, the rate, what to try. No checkpoint has it, nor the log, and the run can go on."""
    running = run_many(size, command(base, "log"), tmp_path, functools.partial(spoil, what, bad), status=2)
    line = running[0].err
    assert line.count("\n") == 1 and "--max_lr" in line and [r.err for r in running[1:]] == [""] * (size - 1)
    assert re.search(f"step 7: loss {bad}, norm of the gradient 0[.].*rate 0.00" if what == "loss" else
                     f"step 7: loss [0-9.]+, norm of the gradient {bad}, learning rate 0.00", line)
    assert steps_saved(tmp_path / "log") == [5] and max(log_values(tmp_path / "log")["train"]) == 6
    if size == 1:
        run(command(base, "log", "--resume"), tmp_path)
        assert_same_run(tmp_path / "log", whole)


# ---- long runs

def watch_memory():
    """Rig this process: at the end, it prints how much memory it held after each step."""
    original, held = torch.nn.utils.clip_grad_norm_, []

    def rigged(*arguments, **options):
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        return original(*arguments, **options)

    torch.nn.utils.clip_grad_norm_ = rigged
    exit = os._exit  # multiprocessing leaves this way, past atexit
    os._exit = lambda status: (print("held", *held, flush=True), exit(status))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see a process's memory")
def test_memory_is_flat(base, tmp_path):
    """300 steps with 60 evaluations and 15 checkpoints: as much is held after 100 as after 300, to 4 MB."""
    out = run(command(base, "log", max_steps=300, val_every=5, checkpoint_every=20), tmp_path, watch_memory).out
    held = [int(word) for word in out.splitlines()[-1].split()[1:]]
    assert len(held) == 300 and held[0] > 50e6
    assert max(held[280:]) - max(held[80:100]) < 4e6
