"""A run that was stopped, killed or starved anywhere, and continued, is the run that never was: bit by bit.

Every run here is disturbed in one way, continued with --resume, and compared with conftest.py's `whole`, which nobody
disturbed: weights, optimizer state, and each line of the log but those that tell the pace.
"""
import contextlib
import io
import math
import os
import re
import resource
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest

import fineweb
from helpers import FakeWorld, tiny_config
from launch import (after_backward, assert_same_run, command, farthest, finish, log_lines, log_values, run, run_many,
                    saved, start, start_many, steps_saved, torchrun, words, write_data)
from train_gpt2 import Log


def test_a_run_measures_and_saves_when_it_should(whole):
    """Every so many steps and at the end; val also before the first step; two checkpoints stay."""
    assert steps_saved(whole) == [20, 24] and list(log_values(whole)["train"]) == list(range(24))
    assert list(log_values(whole)["val"]) == [0, 3, 6, 9, 12, 15, 18, 21, 24]


def pause(which, step, parameters):
    """In one step, print "paused" and wait for a file "go"."""
    if step == which:
        print("paused", flush=True)
        end = time.monotonic() + 100  # if the test has failed meanwhile
        while not os.path.exists("go") and time.monotonic() < end:
            time.sleep(0.01)


def pausing(step):
    return partial(after_backward, partial(pause, step))


def paused(step, arguments, folder):
    """A run that waits in a step."""
    running = start(arguments, folder, pausing(step))
    running.wait_for("paused")
    return running


def kill(running):
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -9


def wait_until(true, timeout=60):
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def killed(base):
    """A run that was killed in step 17: its log is further than its newest checkpoint, of step 15."""
    (base / "killed").mkdir()
    running = paused(17, command(base), base / "killed")
    wait_until(lambda: 5 not in steps_saved(base / "killed/log"))  # it is written, and the oldest one is deleted
    kill(running)
    assert steps_saved(base / "killed/log") == [10, 15] and max(log_values(base / "killed/log")["train"]) == 16
    return base / "killed/log"


@pytest.fixture
def half(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "log")


# ---- sudden death

def kill_at(count):
    """Rig this process: before its count-th operation on a file, or with half a file written, it kills itself."""
    left = [count]

    def rig(module, name, last_words=lambda *arguments: None):
        original = getattr(module, name)

        def rigged(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                last_words(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(module, name, rigged)

    def half_a_file(path, write):
        whole = io.BytesIO()
        write(whole)
        Path(f"{path}.tmp").write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])

    for name in ("fsync", "replace", "unlink"):
        rig(os, name)
    rig(fineweb, "write_file", half_a_file)


def test_killed_before_each_operation_on_a_file(base, tmp_path):
    """Every point at which a resumed run changes the state on the disk, one after the other, until it gets through:
    half a checkpoint in the temporary file, a whole one without its name, named beside the older one, and so on."""
    settings, newest = dict(max_steps=6, checkpoint_every=2), 0
    run(command(base, "whole", keep_checkpoints=3, **settings), tmp_path)
    again = command(base, "log", "--resume", keep_checkpoints=1, **settings)
    for count in range(1, 50):
        log = shutil.copytree(tmp_path / "whole", tmp_path / str(count) / "log")
        for step in (4, 6):
            (log / f"ckpt_{step:08d}.pt").unlink()
        status = start(again, log.parent, partial(kill_at, count)).wait()
        assert max(steps_saved(log)) >= newest
        newest = max(steps_saved(log))
        if status == 0:
            break
        assert status == -9 and f"steps: {newest} to 6" in run(again, log.parent).out
        assert_same_run(log, tmp_path / "whole", 6)
    assert 12 < count < 49 and steps_saved(log) == [6]


TWO = "--standalone", "--nproc_per_node=2"
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find processes")


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
@needs_proc
def test_torchrun_restarts_a_run_whose_worker_was_killed(base, whole_of_two, tmp_path):
    """Unattended: nobody says --resume, and the folder held another run when it began. Real interpreters write the
    same bits as those that the other tests fork from a server."""
    shutil.copytree(whole_of_two, tmp_path / "log")
    (tmp_path / "log" / "log.txt").write_text("")
    popen = torchrun(tmp_path, command(base), *TWO, "--max-restarts=3")
    wait_for_step(tmp_path / "log", 12)
    os.kill(children(popen.pid)[0], signal.SIGKILL)
    out = finish(popen)
    assert_same_run(tmp_path / "log", whole_of_two)
    assert out.count("step     0 | loss") == 1
    assert steps_saved(tmp_path / "log" / "earlier-1") == [20, 24]
    assert not (tmp_path / "log" / "earlier-2").exists()


@pytest.mark.slow
@needs_proc
def test_two_machines_train_as_one_and_go_on_after_a_death_on_one(base, whole_of_two, tmp_path, monkeypatch):
    """Two agents that meet over the network, here over loopback. The variable gives each restart a store of addresses
    of its own, which torchrun does not by itself."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = f"--rdzv_endpoint=127.0.0.1:{s.getsockname()[1]}"
    agents = [torchrun(tmp_path, command(base), "--nnodes=2", "--nproc_per_node=1", meet, "--rdzv_backend=c10d",
                       "--rdzv_id=7", "--local_addr=127.0.0.1", "--max-restarts=3") for _ in range(2)]
    wait_for_step(tmp_path / "log", 12)
    [victim] = children(agents[1].pid).values()
    os.kill(victim, signal.SIGKILL)
    out = "".join(finish(agent) for agent in agents)
    assert out.count("step     0 | loss") == out.count("step    23 | loss") == 1
    assert_same_run(tmp_path / "log", whole_of_two)


def only_one_was_told():
    """Rig this process: torchrun counts restarts on the machine where a process died, not on the other."""
    os.environ.update(GROUP_WORLD_SIZE="2", TORCHELASTIC_RESTART_COUNT=os.environ["RANK"])


def test_if_one_machine_resumes_all_do(base, whole_of_two, tmp_path):
    shutil.copytree(whole_of_two, tmp_path / "log")
    (tmp_path / "log" / "ckpt_00000024.pt").unlink()
    assert "steps: 20 to 24" in run_many(2, command(base), tmp_path, only_one_was_told)[0].out
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


@pytest.mark.parametrize("size, rank, sent, every", [(1, 0, signal.SIGINT, 0), (2, 1, signal.SIGTERM, 5)])
def test_a_signal_to_one_process_stops_all(base, whole, whole_of_two, tmp_path, size, rank, sent, every):
    """They finish the step, and save, though no checkpoint is due, or none at all."""
    running = start_many(size, command(base, "log", checkpoint_every=every), tmp_path, pausing(7))
    running[rank].wait_for("paused")
    os.kill(running[rank].pid, sent)
    (tmp_path / "go").touch()
    assert [r.wait() for r in running] == [0] * size and [r.err for r in running] == [""] * size
    assert assert_stopped(tmp_path / "log", "".join(r.out for r in running)) == 8
    assert steps_saved(tmp_path / "log") == ([5, 8] if every else [8])
    run_many(size, ["--resume", "--log_dir", "log", "--checkpoint_every=5"], tmp_path)  # the rest is in config.json
    assert_same_run(tmp_path / "log", whole if size == 1 else whole_of_two)


def test_a_second_ctrl_c_stops_at_once(base, tmp_path):
    """The first one waits for the end of the step, here for ever."""
    running = paused(7, command(base), tmp_path)
    for sent in (signal.SIGINT, signal.SIGTERM):  # a kill after a Ctrl-C is not a second Ctrl-C
        os.kill(running.pid, sent)
        time.sleep(0.3)
        assert running.process.is_alive()
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(timeout=30) != 0
    assert steps_saved(tmp_path / "log") == [5] and "stopped after" not in running.out


@pytest.mark.slow
def test_ctrl_c_in_torchruns_terminal(base, tmp_path):
    """It reaches the whole process group, and torchrun sends its workers another signal."""
    popen = torchrun(tmp_path, command(base, max_steps=5000), *TWO, start_new_session=True)
    wait_for_step(tmp_path / "log", 7)
    os.killpg(popen.pid, signal.SIGINT)
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
    line = run(command(base, "log", "--resume", max_steps=20), tmp_path, status=2).err
    assert line.startswith("train_gpt2.py: --max_steps 20: the run in log has made 24") and line.count("\n") == 1
    assert_same_run(tmp_path / "log", whole)
    run(command(base, "log", "--resume", max_steps=27), tmp_path)
    values = log_values(tmp_path / "log")
    assert list(values["train"]) == list(range(27)) and list(values["val"])[-2:] == [24, 27]


def test_a_damaged_checkpoint_is_passed_over_and_never_drives_a_good_one_out(base, whole, half):
    """Even if it is the newest, and only one is kept; also if the resumed run is killed before it gets there."""
    newest, again = half / "ckpt_00000015.pt", command(base, "log", "--resume", keep_checkpoints=1, checkpoint_every=2)
    os.truncate(newest, newest.stat().st_size - 1)
    running = paused(3, again, half.parent)
    assert "ckpt_00000015.pt is damaged" in running.out and "trying the one before" in running.out
    assert "steps: 10 to 24" in running.out
    wait_until(lambda: 10 not in steps_saved(half))
    kill(running)
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


@pytest.mark.parametrize("dtype, shuffle", [("float32", 0), ("bfloat16", 1)])
def test_muon_and_bfloat16_resume(base, tmp_path, dtype, shuffle):
    """Also over the border between two epochs: 23 steps are one. And without shuffling."""
    settings = dict(optimizer="muon", dtype=dtype, max_steps=26, checkpoint_every=20, val_every=10, shuffle=shuffle)
    run(command(base, "whole", **settings), tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "log")
    (tmp_path / "log" / "ckpt_00000026.pt").unlink()
    out = run(command(base, "log", "--resume", **settings), tmp_path).out
    assert "an epoch reads 5,888 in 23 steps" in out and "steps: 20 to 26, 1.13 epochs" in out
    assert_same_run(tmp_path / "log", tmp_path / "whole", 26)
    muon, adamw = saved(tmp_path / "log", 26)["optimizers"]
    assert muon["state"] and adamw["state"]


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
    write_data(tmp_path / "data", train=9000, tokenizer="bpe:257")
    before = {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")}
    changes = dict(n_layer=3, n_head=4, n_embd=32, block_size=8, vocab_size=300, optimizer="muon", shuffle=0, seed=5,
                   total_batch_size=512)
    for changes in changes, dict(seed=5):
        line = run([*words(data_dir="data", log_dir="log", **changes), "--resume"], tmp_path, status=2).err
        assert line.count("\n") == 1 and "another --log_dir" in line
        assert set(re.findall(r"(\w+) \S+ -> ", line)) == {*changes, "tokenizer", "train_tokens"}
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
    running = paused(7, command(base), tmp_path)
    before = {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")}
    for more in ([], ["--resume"]):
        line = run(command(base, "log", *more), tmp_path, status=2).err
        assert line.startswith("train_gpt2.py: another run is writing to log: ") and line.count("\n") == 1
    assert {f: f.read_bytes() for f in (tmp_path / "log").rglob("*")} == before
    kill(running)
    run(command(base, "log", "--resume"), tmp_path)


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
    out = run(command(base), tmp_path, partial(small_files, (3, 4))).out
    warnings = [line for line in out.splitlines() if "WARNING" in line]
    assert len(warnings) == 2
    assert warnings[0].startswith("WARNING: log/ckpt_00000015.pt can't be written, older checkpoints stay")
    assert steps_saved(tmp_path / "log") == [10, 24]
    assert_same_run(tmp_path / "log", whole)


def test_a_log_that_cannot_be_written_waits(tmp_path, capsys):
    """Its lines are kept in memory, and go out with the next that can be written."""
    with contextlib.closing(Log(tiny_config(log_dir=str(tmp_path)), FakeWorld(), 0)) as log:
        (tmp_path / "log.txt").unlink()
        (tmp_path / "log.txt").mkdir()
        log.write(3, {"train": 4.5, "norm": 1.0}, "")
        assert capsys.readouterr().out.startswith("WARNING: the log of step 3 can't be written yet: ")
        (tmp_path / "log.txt").rmdir()
        log.write(4, {"train": 4.25}, "")
    assert (tmp_path / "log.txt").read_text() == "3 train 4.5\n3 norm 1\n4 train 4.25\n"
    assert log.values == {"train": {3: 4.5, 4: 4.25}, "norm": {3: 1.0}} and capsys.readouterr().out == ""


# ---- a loss that is not a number

def overflow(step, parameters):
    if step == 7:
        parameters[0].grad[0] = math.inf


def test_a_gradient_that_is_not_finite_stops_the_run(base, whole_of_two, tmp_path):
    """One line: the step, the rate, what to try. No checkpoint has it, nor the log, and the run can go on."""
    first, second = run_many(2, command(base), tmp_path, partial(after_backward, overflow), status=2)
    says = r"train_gpt2.py: step 7: loss [\d.]+, norm of the gradient inf, learning rate 0.00.*--max_lr.*\n"
    assert re.fullmatch(says, first.err) and second.err == ""
    assert steps_saved(tmp_path / "log") == [5] and max(log_values(tmp_path / "log")["train"]) == 6
    run_many(2, command(base, "log", "--resume"), tmp_path)
    assert_same_run(tmp_path / "log", whole_of_two)


def test_a_loss_that_is_not_finite_stops_a_run_in_float16_too(base, tmp_path):
    """There, a gradient that isn't is nothing unusual."""
    line = run(command(base, max_lr=1e30, dtype="float16", warmup_steps=0), tmp_path, status=2).err
    assert re.match(r"train_gpt2.py: step \d: loss nan, ", line) and line.count("\n") == 1
    assert steps_saved(tmp_path / "log") == []


# ---- long runs

def tell_memory(step, parameters):
    if step in (99, 299):
        print("held", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)  # the most until now


@pytest.mark.slow
def test_memory_is_flat(base, tmp_path):
    """With 60 evaluations and 15 checkpoints on the way."""
    settings = dict(max_steps=300, val_every=5, checkpoint_every=20)
    out = run(command(base, **settings), tmp_path, partial(after_backward, tell_memory)).out
    first, last = map(int, re.findall("^held (.*)", out, re.MULTILINE))
    assert last < 1.02 * first
