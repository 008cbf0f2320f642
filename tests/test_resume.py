"""A run that was stopped, killed or starved anywhere, and continued, is the run that never was: bit by bit.

`whole` below is a run that nobody disturbed. Every other run is disturbed in one way, continued with
--resume, and compared with it: weights, optimiser state, and each line of the log but those that tell the
pace.
"""
import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import launch
from launch import (TINY, assert_same_run, differences, farthest, finish, log_lines, log_values, run,
                    run_many, saved, start, start_many, steps_saved, torchrun, words, write_data)

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


@pytest.fixture
def half(base, tmp_path):
    """A run that was killed in step 16: its log is further than its newest checkpoint, of step 15."""
    running = start(command(base, "log"), tmp_path)
    running.wait_for("step    16 |")
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -9
    assert steps_saved(tmp_path / "log")[:2] == [10, 15] and max(log_values(tmp_path / "log")["train"]) >= 16
    for late in (tmp_path / "log").glob("ckpt_0000002*"):  # if it was killed late
        late.unlink()
    return tmp_path / "log"


# ---- sudden death

def kill_at(count, when):
    """Rig this process: before its count-th operation on a file, or with half a checkpoint written, it
    kills itself. Nothing gets a chance to clean up.
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

    def half_a_checkpoint(content, file):
        save = torch.serialization.save
        save(content, file)
        file.flush()
        os.truncate(file.name, os.path.getsize(file.name) // 2)

    rig(os, "fsync")
    rig(os, "replace")
    rig(os, "unlink")
    rig(torch, "save", half_a_checkpoint)


OPERATIONS = ("fsync", "replace", "unlink", "save")


def killed_and_continued(base, folder, count, when):
    """-> was it killed at all?"""
    running = start(command(base, "log"), folder, functools.partial(kill_at, count, when))
    status = running.wait()
    assert status in (0, -9), running.err
    if status:
        run(command(base, "log", "--resume"), folder)
    return status == -9


@pytest.mark.parametrize("operation, count", [("save", 1), ("save", 3), ("fsync", 6), ("replace", 5)])
def test_killed_while_a_checkpoint_is_written(base, whole, tmp_path, operation, count):
    """Half of it in the temporary file; all of it, perhaps only in memory; on disk, but without its name."""
    assert killed_and_continued(base, tmp_path, count, (operation,))
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.slow
def test_killed_before_each_operation_on_a_file(base, whole, tmp_path):
    """Every point at which the state on the disk changes, one after the other, until a run gets through."""
    for count in range(1, 100):
        folder = tmp_path / str(count)
        folder.mkdir()
        killed = killed_and_continued(base, folder, count, OPERATIONS)
        assert_same_run(folder / "log", whole)
        assert steps_saved(folder / "log")[-2:] == [20, 24]  # 15 stays if the last unlink was not to be
        shutil.rmtree(folder)
        if not killed:
            break
    assert count > 25


def killed_at_random(launch_all, continue_all, whole, tmp_path, times, seed):
    """Kill a process of a run after a random time, continue, compare: `times` times over."""
    moments = random.Random(seed)
    begun = time.monotonic()
    for process in launch_all(tmp_path):
        assert process.wait() == 0
    duration = time.monotonic() - begun
    shutil.rmtree(tmp_path / "log")
    killed = 0
    for i in range(times):
        processes = launch_all(tmp_path)
        time.sleep(moments.uniform(0.1, 1) * duration)
        victim = processes[i % len(processes)]
        if victim.process.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
        killed += victim.wait() == -9
        for process in processes:  # torchrun ends the others: they may be waiting for the one that died
            if process.process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
            process.wait(timeout=30)
        continue_all(tmp_path)
        assert_same_run(tmp_path / "log", whole)
        shutil.rmtree(tmp_path / "log")
    assert killed > times / 3


@pytest.mark.slow
def test_killed_at_20_random_moments(base, whole, tmp_path):
    killed_at_random(lambda folder: [start(command(base, "log"), folder)],
                     lambda folder: run(command(base, "log", "--resume"), folder), whole, tmp_path, 20,
                     seed=5)


@pytest.mark.slow
def test_one_of_two_processes_killed_at_random_moments(base, whole_of_two, tmp_path):
    killed_at_random(lambda folder: start_many(2, command(base, "log"), folder),
                     lambda folder: run_many(2, command(base, "log", "--resume"), folder), whole_of_two,
                     tmp_path, 6, seed=6)


@pytest.mark.slow
def test_killed_again_and_again(base, whole, tmp_path):
    """Each start gets a little further. The log is never cut shorter than the newest checkpoint."""
    for step in (7, 6, 13, 23):
        running = start(command(base, "log", "--resume"), tmp_path)
        running.wait_for(f"step {step:5d} |")
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        log = tmp_path / "log" / "log.txt"
        log.write_text(log.read_text()[:-3])  # without the end of its last line
    run(command(base, "log", "--resume"), tmp_path)
    assert_same_run(tmp_path / "log", whole)


def children(pid):
    """{rank: process id} of what a torchrun has started."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        for word in Path(f"/proc/{child}/environ").read_text().split("\0"):
            if word.startswith("RANK="):
                found[int(word[5:])] = int(child)
    return found


def wait_for_step(folder, step, timeout=90):
    """Until the log has come to a step."""
    end = time.monotonic() + timeout
    file = Path(folder, "log.txt")
    while not (file.exists() and re.search(f"^{step} train ", file.read_text(), re.MULTILINE)):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find torchrun's workers")
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_run_whose_worker_was_killed(base, whole_of_two, tmp_path, rank):
    """Unattended: nobody says --resume, and the folder held another run when it began."""
    shutil.copytree(whole_of_two, tmp_path / "log")
    before = log_lines(tmp_path / "log")
    (tmp_path / "log" / "log.txt").write_text("")
    popen = torchrun(tmp_path, command(base, "log"), "--max-restarts=3")
    wait_for_step(tmp_path / "log", 12)
    os.kill(children(popen.pid)[rank], signal.SIGKILL)
    out = finish(popen)
    assert_same_run(tmp_path / "log", whole_of_two)
    assert out.count("step     0 | loss") == 1 and log_lines(tmp_path / "log") == before
    assert steps_saved(tmp_path / "log" / "earlier-1") == [20, 24]
    assert not (tmp_path / "log" / "earlier-2").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find torchrun's workers")
def test_two_machines_go_on_after_a_death_on_one(base, whole_of_two, tmp_path, monkeypatch):
    """The variable gives each restart a store of addresses of its own, which torchrun does not by itself."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    agents = launch.two_machines(tmp_path, command(base, "log"), "--max-restarts=3")
    wait_for_step(tmp_path / "log", 12)
    os.kill(next(iter(children(agents[1].pid).values())), signal.SIGKILL)
    out = "".join(finish(agent) for agent in agents)
    assert out.count("step     0 | loss") == 1
    assert_same_run(tmp_path / "log", whole_of_two)


def only_one_was_told():
    """Rig this process: torchrun counts restarts on the machine where a process died, not on the other."""
    os.environ.update(GROUP_WORLD_SIZE="2", TORCHELASTIC_RESTART_COUNT=os.environ["RANK"])


def test_if_one_machine_resumes_all_do(base, whole_of_two, tmp_path):
    run_many(2, command(base, "log"), tmp_path)
    (tmp_path / "log" / "ckpt_00000024.pt").unlink()
    assert "steps: 20 to 24" in run_many(2, command(base, "log"), tmp_path, only_one_was_told)[0].out
    assert_same_run(tmp_path / "log", whole_of_two)


def on_a_disk_of_its_own():
    """Rig this process: the second one sees another folder under the same name."""
    folder = Path(f"machine{os.environ['RANK']}")
    folder.mkdir(exist_ok=True)
    if os.environ["RANK"] == "1":
        os.chdir(folder)


def test_machines_that_do_not_share_the_log_folder_are_told(base, tmp_path):
    run_many(2, command(base, "log", max_steps=6), tmp_path)
    again = command(base, "log", "--resume", max_steps=6)
    first, second = run_many(2, again, tmp_path, on_a_disk_of_its_own, status=2)
    assert first.err.startswith("train_gpt2.py: --log_dir log holds other checkpoints on other machines: ")
    assert first.err.endswith(": use a folder they share\n")
    assert second.err == ""


# ---- signals

def assert_stopped(folder, out, at_least):
    """It said how to go on, and has a checkpoint of the very step at which its log ends."""
    lines = [line for line in out.splitlines() if line.startswith("stopped after ")]
    assert len(lines) == 1 and lines[0].endswith("to continue: python train_gpt2.py --resume --log_dir log")
    step = int(lines[0].split()[2])
    assert at_least < step < LAST
    assert steps_saved(folder)[-1] == step
    assert max(log_values(folder)["train"]) == step - 1 and max(log_values(folder)["val"]) < step
    return step


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_leaves(base, whole, tmp_path, sent):
    running = start(command(base, "log"), tmp_path)
    running.wait_for("step     7 | loss")
    os.kill(running.pid, sent)
    assert running.wait() == 0 and running.err == ""
    assert_stopped(tmp_path / "log", running.out, 7)
    assert "done:" not in running.out
    run(["--resume", "--log_dir", "log"], tmp_path)  # as it said; the settings are those of config.json
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all(base, whole_of_two, tmp_path, rank):
    running = start_many(2, command(base, "log"), tmp_path)
    running[0].wait_for("step     7 | loss")
    os.kill(running[rank].pid, signal.SIGTERM)
    assert [r.wait() for r in running] == [0, 0] and [r.err for r in running] == ["", ""]
    assert_stopped(tmp_path / "log", running[0].out + running[1].out, 7)
    run_many(2, command(base, "log", "--resume"), tmp_path)
    assert_same_run(tmp_path / "log", whole_of_two)


def long_step(seconds):
    """Rig this process: in its eighth step it falls asleep."""
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def rigged(*arguments, **options):
        calls.append(1)
        if len(calls) == 8:
            print("asleep", flush=True)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.05)
        return original(*arguments, **options)

    torch.nn.utils.clip_grad_norm_ = rigged


def test_a_second_ctrl_c_stops_at_once(base, whole, tmp_path):
    """The first one waits for the end of the step, here for a minute; what was saved before stays good."""
    running = start(command(base, "log"), tmp_path, functools.partial(long_step, 60))
    running.wait_for("asleep")
    os.kill(running.pid, signal.SIGINT)
    time.sleep(1.2)
    assert running.process.is_alive()
    os.kill(running.pid, signal.SIGTERM)  # is not a Ctrl-C
    time.sleep(0.2)
    assert running.process.is_alive()
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(timeout=20) != 0
    assert steps_saved(tmp_path / "log") == [5] and "stopped after" not in running.out
    run(command(base, "log", "--resume"), tmp_path)
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.slow
@pytest.mark.parametrize("sent, group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_torchrun_hands_signals_on(base, whole_of_two, tmp_path, sent, group):
    """Ctrl-C in a terminal reaches the whole process group, `kill` only torchrun itself."""
    popen = torchrun(tmp_path, command(base, "log"), start_new_session=True)
    wait_for_step(tmp_path / "log", 7)
    (os.killpg if group else os.kill)(popen.pid, sent)
    out = finish(popen, status=None)
    assert_stopped(tmp_path / "log", out, 6)
    run_many(2, command(base, "log", "--resume"), tmp_path)
    assert_same_run(tmp_path / "log", whole_of_two)


# ---- --resume where there is nothing, something else, or something damaged

def test_resume_in_an_empty_folder_starts_and_says_so(base, whole, tmp_path):
    out = run(command(base, "log", "--resume"), tmp_path).out
    assert "--resume: log has no checkpoint yet, so this is the start" in out
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.slow
def test_resume_before_the_first_checkpoint_starts_over(base, whole, tmp_path):
    assert not killed_and_continued(base, tmp_path, 1, ()) and log_lines(tmp_path / "log") == log_lines(whole)
    for file in (tmp_path / "log").glob("ckpt*"):
        file.unlink()
    assert "this is the start" in run(command(base, "log", "--resume"), tmp_path).out
    assert_same_run(tmp_path / "log", whole)


def test_resume_of_a_finished_run_changes_nothing(base, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "log")
    out = run(command(base, "log", "--resume"), tmp_path).out
    assert "| loss" not in out and "done:" in out
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.slow
def test_a_longer_run_goes_on_where_the_shorter_ended(base, tmp_path):
    run(command(base, "log"), tmp_path)
    before = log_lines(tmp_path / "log")
    run(command(base, "log", "--resume", max_steps=27), tmp_path)
    values = log_values(tmp_path / "log")
    assert log_lines(tmp_path / "log")[:len(before)] == before and list(values["train"]) == list(range(27))
    assert saved(tmp_path / "log", 27)["step"] == 27 and list(values["val"])[-2:] == [24, 27]


@pytest.mark.slow
def test_a_truncated_checkpoint_is_passed_over(base, whole, half):
    """Even if it is the newest, and only one is kept: a damaged file never drives a good one out."""
    newest = half / "ckpt_00000015.pt"
    for size in (0, 100, newest.stat().st_size - 1):
        os.truncate(newest, size)
        copy = half.parent / f"log{size}"
        shutil.copytree(half, copy)
        watched = start(command(base, copy, "--resume", keep_checkpoints=1, checkpoint_every=2), half.parent)
        assert watched.wait() == 0 and f"{copy}/ckpt_00000015.pt is no good checkpoint" in watched.out
        assert "trying the one before" in watched.out and "steps: 10 to 24" in watched.out
        assert steps_saved(copy)[-1] == LAST
        assert_same_run(copy, whole)


def test_a_damaged_newer_checkpoint_does_not_cost_the_good_one(base, half):
    os.truncate(half / "ckpt_00000015.pt", 100)
    running = start(command(base, "log", "--resume", keep_checkpoints=1, checkpoint_every=2), half.parent)
    running.wait_for("step    12 | loss")
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    again = run(command(base, "log", "--resume", keep_checkpoints=1, checkpoint_every=2), half.parent)
    assert "steps: 12 to 24" in again.out


def test_the_log_is_cut_back_to_the_checkpoint(base, whole, half):
    """Lines of steps that are trained again, a line of nonsense, and a line without its end go."""
    with open(half / "log.txt", "a") as file:
        file.write("17 train 1.0\n99 val 2.0\nnonsense\n14 note 1.")
    run(command(base, "log", "--resume"), half.parent)
    assert_same_run(half, whole)


def test_a_resumed_run_reads_on_and_does_not_measure_twice(base, whole, half):
    out = run(command(base, "log", "--resume"), half.parent).out
    steps = [line.split("|")[0] for line in out.splitlines() if "| loss" in line]
    assert steps == [f"step {step:5d} " for step in range(15, 24)]
    assert out.count("| val loss") == 4  # 15, 18, 21, 24
    assert_same_run(half, whole)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_every_optimiser_resumes(base, tmp_path, optimizer):
    """Also over the border between two epochs: 23 steps are one. And without shuffling."""
    settings = dict(optimizer=optimizer, max_steps=30, checkpoint_every=20, val_every=10,
                    shuffle=0 if optimizer == "muon" else 1)
    run(command(base, "whole", **settings), tmp_path)
    run(command(base, "log", **settings), tmp_path)
    (tmp_path / "log" / "ckpt_00000030.pt").unlink()
    assert "steps: 20 to 30" in run(command(base, "log", "--resume", **settings), tmp_path).out
    assert_same_run(tmp_path / "log", tmp_path / "whole", 30)
    checkpoint = saved(tmp_path / "log", 30)
    assert len(checkpoint["optimizers"]) == (2 if optimizer == "muon" else 1)
    assert all(state["state"] for state in checkpoint["optimizers"])


# ---- another machine

@pytest.mark.parametrize("size, B", [(1, 16), (1, 1), (2, 4), (2, 8)])
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

@pytest.mark.parametrize("changes, difference", [
    (dict(n_layer=3), "n_layer 2 -> 3"), (dict(n_head=4), "n_head 2 -> 4"),
    (dict(n_embd=32), "n_embd 16 -> 32"), (dict(block_size=8), "block_size 16 -> 8"),
    (dict(vocab_size=300), "vocab_size 257 -> 300"), (dict(optimizer="muon"), "optimizer adamw -> muon"),
    (dict(shuffle=0), "shuffle True -> False"), (dict(seed=5), "seed 1337 -> 5"),
    (dict(total_batch_size=512), "total_batch_size 256 -> 512"),
    (dict(n_layer=3, seed=5), "n_layer 2 -> 3, seed 1337 -> 5"),
    (dict(data_dir="other"), "train_tokens 6000 -> 9000")])
def test_resume_with_other_settings_is_refused(base, whole, tmp_path, changes, difference):
    shutil.copytree(whole, tmp_path / "log")
    write_data(tmp_path / "other", train=9000)
    before = {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")}
    line = run(command(base, "log", "--resume", **changes) if "data_dir" not in changes else
               [*words(log_dir="log", **changes), "--resume"], tmp_path, status=2).err
    assert line.count("\n") == 1 and f"({difference})" in line and "another --log_dir" in line
    assert {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")} == before


def test_resume_with_another_pace_is_allowed(base, half):
    run(command(base, "log", "--resume", max_lr=2e-2, val_every=4, weight_decay=0.0), half.parent)
    assert log_values(half)["lr"][15] > 1.5 * log_values(half)["lr"][14]


def test_a_new_run_moves_an_earlier_one_aside(base, whole, tmp_path):
    """Every file of it, unchanged, also the second time."""
    shutil.copytree(whole, tmp_path / "log")
    files = {f.name: f.read_bytes() for f in (tmp_path / "log").iterdir()}
    assert {"log.txt", "config.json", "ckpt_00000020.pt", "ckpt_00000024.pt"} <= files.keys()
    out = run(command(base, "log", max_steps=2, warmup_steps=1), tmp_path).out
    assert "log held a run, which is now in log/earlier-1 (--resume would have continued it)" in out
    assert {f.name: f.read_bytes() for f in (tmp_path / "log" / "earlier-1").iterdir()} == files
    (tmp_path / "log" / "earlier-3").mkdir()  # a person's; or 2 has been deleted
    for number in (2, 4):
        files = {f.name: f.read_bytes() for f in (tmp_path / "log").iterdir() if f.is_file()}
        run(command(base, "log", max_steps=number + 1, warmup_steps=1), tmp_path)
        assert {f.name: f.read_bytes() for f in (tmp_path / "log" / f"earlier-{number}").iterdir()} == files
    assert steps_saved(tmp_path / "log") == [5]
    assert list(log_values(tmp_path / "log")["train"]) == [0, 1, 2, 3, 4]


# ---- a full disk, and how many checkpoints stay

def small_files(saves, size=60_000):
    """Rig this process: while it writes these checkpoints (the first is 1) no file may pass `size` bytes."""
    original, calls = torch.save, []

    def rigged(*arguments, **options):
        calls.append(1)
        limit = size if len(calls) in saves else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        original(*arguments, **options)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with OSError, as on a full disk
    torch.save = rigged


def test_a_checkpoint_that_cannot_be_written_costs_a_warning(base, whole, tmp_path):
    """The third and the fourth of five fail; then there is room again."""
    running = start(command(base, "log"), tmp_path, functools.partial(small_files, (3, 4)))
    running.wait_for("step    20 | loss")
    assert steps_saved(tmp_path / "log")[:2] == [5, 10] and list((tmp_path / "log").glob("*.tmp")) == []
    assert running.wait() == 0
    warnings = [line for line in running.out.splitlines() if "WARNING" in line]
    assert len(warnings) == 2
    assert warnings[0].startswith("WARNING: the checkpoint of step 15 can't be written, older ones stay")
    assert steps_saved(tmp_path / "log") == [10, 24]
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.slow
def test_stopped_with_a_full_disk_an_older_checkpoint_serves(base, whole, tmp_path):
    running = start(command(base, "log"), tmp_path, functools.partial(small_files, range(3, 99)))
    running.wait_for("step    17 | loss")
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 0 and running.out.count("WARNING") >= 2
    assert steps_saved(tmp_path / "log") == [5, 10]
    assert "steps: 10 to 24" in run(command(base, "log", "--resume"), tmp_path).out
    assert_same_run(tmp_path / "log", whole)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(base, whole, tmp_path):
    """Two checkpoints stay and a third is written, so there is room for three. Then there is not: the log
    and the run go on, and end as if nothing had been."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (whole / "ckpt_00000024.pt").stat().st_size
    room = f"size={int(3.5 * size) + 100_000}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", disk]).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        running = start(command(base, disk / "log"), tmp_path)
        running.wait_for("step     6 | loss")
        with open(disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1000))
        running.wait_for("WARNING: the checkpoint of step 10")
        assert steps_saved(disk / "log") == [5] and list((disk / "log").glob("*.tmp")) == []
        (disk / "ballast").unlink()
        assert running.wait() == 0 and running.err == ""
        assert_same_run(disk / "log", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a file that is always full")
def test_a_log_that_cannot_be_written_waits(tmp_path, capsys):
    """Its lines are kept in memory, and go out with the next that finds room."""
    from train_gpt2 import Log
    log = Log.__new__(Log)
    log.values, log.tracker, log.file = {}, None, open("/dev/full", "w", buffering=1)
    log.write(3, {"train": 4.5, "norm": 1.0})
    assert capsys.readouterr().out.startswith("WARNING: the log of step 3 can't be written yet: ")
    with open(tmp_path / "log.txt", "w") as room:
        os.dup2(room.fileno(), log.file.fileno())
    log.write(4, {"train": 4.25})
    assert (tmp_path / "log.txt").read_text() == "3 train 4.5\n3 norm 1\n4 train 4.25\n"
    assert log.values == {"train": {3: 4.5, 4: 4.25}, "norm": {3: 1.0}} and capsys.readouterr().out == ""
    log.file.close()


@pytest.mark.parametrize("keep, left", [(1, [24]), (3, [15, 20, 24]), (9, [5, 10, 15, 20, 24])])
def test_the_newest_checkpoints_are_kept(base, whole, tmp_path, keep, left):
    run(command(base, "log", keep_checkpoints=keep), tmp_path)
    assert steps_saved(tmp_path / "log") == left
    assert_same_run(tmp_path / "log", whole)


def test_checkpoint_every_0_writes_none_but_a_stopped_run_saves(base, tmp_path):
    run(command(base, "never", checkpoint_every=0, max_steps=5), tmp_path)
    assert steps_saved(tmp_path / "never") == []
    running = start(command(base, "log", checkpoint_every=0), tmp_path)
    running.wait_for("step     3 | loss")
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 0
    assert_stopped(tmp_path / "log", running.out, 3)


# ---- a loss that is none

@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(base, tmp_path, size):
    """The step, the rate, what to try; the last checkpoint stays as it is, and the advice works."""
    run_many(size, command(base, "log", max_steps=12), tmp_path)
    (tmp_path / "log" / "ckpt_00000012.pt").unlink()
    before = {f: f.read_bytes() for f in (tmp_path / "log").glob("ckpt*")}
    assert steps_saved(tmp_path / "log") == [10]
    running = run_many(size, command(base, "log", "--resume", max_steps=20, max_lr=1e30), tmp_path, status=2)
    assert running[0].err.count("\n") == 1 and "Traceback" not in running[0].err
    for part in ("train_gpt2.py: step 11: loss ", "norm of the gradient ", "learning rate ", "e+29",
                 "--max_lr"):
        assert part in running[0].err
    assert [r.err for r in running[1:]] == [""] * (size - 1)
    assert {f: f.read_bytes() for f in (tmp_path / "log").glob("ckpt*")} == before
    assert max(log_values(tmp_path / "log")["train"]) == 10  # nan is no loss
    run_many(size, command(base, "log", "--resume", max_steps=20), tmp_path)


def bad_norm(bad):
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def rigged(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options) * (bad if len(calls) == 8 else 1)

    torch.nn.utils.clip_grad_norm_ = rigged


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(base, tmp_path, bad):
    line = run(command(base, "log"), tmp_path, functools.partial(bad_norm, bad), status=2).err
    assert "step 7: loss " in line and f"norm of the gradient {bad}" in line
    assert steps_saved(tmp_path / "log") == [5]


def bad_loss(bad):
    """Rig this process: a loss is not finite while its gradient is, as a scaled float16 gradient may be."""
    original, calls = torch.nn.functional.cross_entropy, []

    def rigged(*arguments, **options):
        calls.append(torch.is_grad_enabled())
        return original(*arguments, **options) + (bad if sum(calls) == 30 else 0)  # the second of step 7

    torch.nn.functional.cross_entropy = rigged


def test_a_loss_alone_that_is_not_finite_stops_the_run(base, tmp_path):
    line = run(command(base, "log"), tmp_path, functools.partial(bad_loss, float("nan")), status=2).err
    assert "step 7: loss nan, norm of the gradient 0." in line
    assert steps_saved(tmp_path / "log") == [5] and max(log_values(tmp_path / "log")["train"]) == 6


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
    out = run(command(base, "log", max_steps=300, val_every=5, checkpoint_every=20), tmp_path,
              watch_memory).out
    held = [int(word) for word in out.splitlines()[-1].split()[1:]]
    assert len(held) == 300 and held[0] > 50e6
    assert max(held[280:]) - max(held[80:100]) < 4e6
