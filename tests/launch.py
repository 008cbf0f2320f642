"""Starts train_gpt2.py the way a user does, only faster: for the tests of crashes, processes and bad input.

`start(words)` runs the program in a process of its own, with its own standard output, error and exit status.
That process is forked from a server which has imported torch already, so that a start takes a fifth of a
second and not four. What depends on torchrun, on a terminal's process group or on a real interpreter uses
`torchrun` instead.
"""
import itertools
import json
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from conftest import ROOT

PROGRAM = str(ROOT / "train_gpt2.py")
FORK = multiprocessing.get_context("forkserver")
# What the program and this file import; torch imports torch._dynamo when the first optimizer is made.
FORK.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "tiktoken",
                             "tokenizers", "transformers.convert_slow_tokenizer", "pytest"])

# A run of a second: 24 steps of 16 rows, in 4 forwards of 4; 5 checkpoints; 9 evaluations, of 7 batches each.
TINY = dict(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16, total_batch_size=256,
            micro_batch_size=4, max_steps=24, max_lr=1e-2, min_lr=1e-3, warmup_steps=4, val_every=3,
            val_tokens=400, hellaswag_every=0, sample_every=0, checkpoint_every=5, device="cpu",
            dtype="float32")  # the default rounds to bfloat16 where a CPU can compute in it


def words(**changes):
    """words(n_layer=3) -> the command line of a tiny run, as a list."""
    return [f"--{name}={value}" for name, value in {**TINY, **changes}.items() if value is not None]


def command(base, log_dir="log", *more, **changes):
    """The same on the shards of conftest.py's `base`, with more words after it."""
    return [*words(data_dir=base / "data", log_dir=log_dir, **changes), *more]


def write_data(folder, train=6000, val=500, vocab=257, **meta):
    """A folder of shards of a text that can be learned: each id is often its predecessor plus one."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    for split, sizes in (("train", [train - train // 3, train // 3]), ("val", [val])):
        for i, size in enumerate(sizes):
            steps = np.where(random.random(size) < 0.8, 1, random.integers(0, 50, size))
            np.save(folder / f"text_{split}_{i:06d}.npy", (np.cumsum(steps) % 50).astype(np.uint16))
    (folder / "meta.json").write_text(json.dumps(dict(tokenizer="bytes", vocab_size=vocab, shards=[]) | meta))
    return folder


class Running:
    """A program under way. `wait()` -> exit status, negative for a signal; `out`, `err`: what it printed."""

    def __init__(self, arguments, cwd, env, patch):
        self.out_file, self.err_file = (Path(cwd, f"{name}.{time.monotonic_ns()}") for name in ("out", "err"))
        files = self.out_file, self.err_file
        self.process = FORK.Process(target=child, args=(arguments, str(cwd), env, files, patch))
        self.process.start()
        self.pid = self.process.pid

    out = property(lambda self: self.out_file.read_text() if self.out_file.exists() else "")
    err = property(lambda self: self.err_file.read_text() if self.err_file.exists() else "")

    def wait(self, timeout=120):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.out[-500:]} {self.err[-2000:]}")
        return self.process.exitcode

    def wait_for(self, text, timeout=60):
        """Until it has printed this."""
        end = time.monotonic() + timeout
        while text not in self.out:
            assert time.monotonic() < end, f"no {text!r} in {self.out} {self.err}"
            assert self.process.exitcode is None, f"ended without {text!r}: {self.out} {self.err}"
            time.sleep(0.005)


def child(arguments, cwd, env, files, patch):
    """In the new process: `python train_gpt2.py ARGUMENTS`, after patch(), which may rig its libraries."""
    for stream, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server of forks ignores it
    os.chdir(cwd)
    os.environ.update(env)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    sys.argv = [PROGRAM, *arguments]
    if patch:
        patch()
    runpy.run_path(PROGRAM, run_name="__main__")


def after_backward(do):
    """Rig this process: do(step, parameters) after the backward pass of each step, before the update."""
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count()

    def rigged(parameters, *arguments):
        parameters = list(parameters)
        do(next(steps), parameters)
        return clip(parameters, *arguments)

    torch.nn.utils.clip_grad_norm_ = rigged


def start(arguments, cwd, patch=None, **env):
    return Running([str(a) for a in arguments], cwd, env, patch)


def run(arguments, cwd, patch=None, status=0, **env):
    """Run to the end, and see that it ends with this status."""
    running = start(arguments, cwd, patch, **env)
    got = running.wait()
    assert got == status, f"exit status {got}\n{running.out[-1000:]}\n{running.err[-3000:]}"
    return running


def start_many(size, arguments, cwd, patch=None):
    """The processes of one run, in the environment that torchrun gives them. They meet at their parent."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = dict(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
               GROUP_WORLD_SIZE="1", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_USE_AGENT_STORE="True")
    running = [start(arguments, cwd, patch, RANK=str(i), LOCAL_RANK=str(i), **env) for i in range(size)]
    running[0].store = store  # lives as long as they do
    return running


def run_many(size, arguments, cwd, patch=None, status=0):
    """Run to the end. As under torchrun, the first one that fails ends all; that one must have this status."""
    running = start_many(size, arguments, cwd, patch)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (failed := [r.process.exitcode for r in running if r.process.exitcode]) and (
            alive := [r.process.sentinel for r in running if r.process.is_alive()]):
        multiprocessing.connection.wait(alive, timeout=1)
    if failed:
        for r in running:
            r.process.terminate()
    got = [r.wait() for r in running]
    assert {got[0], *failed} == {status}, f"{got}" + "\n".join(r.out[-500:] + r.err[-3000:] for r in running)
    return running


def torchrun(cwd, arguments, *options, **popen):
    """torchrun, with real interpreters, for the tests of what it does itself."""
    words = [sys.executable, "-m", "torch.distributed.run", *options, PROGRAM, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(words, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            **popen)


def finish(popen, status=0, timeout=180):
    """Everything that a torchrun printed, once it has ended with this status."""
    try:
        out, _ = popen.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        popen.terminate()  # torchrun takes its workers along
        out, _ = popen.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out[-4000:]}") from None
    assert status is None or popen.returncode == status, f"exit status {popen.returncode}\n{out[-4000:]}"
    return out


# ---- what a run leaves behind

def log_lines(folder):
    """The lines of log.txt but for the timing."""
    return [line for line in Path(folder, "log.txt").read_text().splitlines() if " tok/s " not in line]


def log_values(folder):
    """{stream: {step: value}} of log.txt; each step has one line in a stream."""
    values = {}
    for step, stream, value in map(str.split, log_lines(folder)):
        assert int(step) not in values.setdefault(stream, {}), f"step {step} is twice in the stream {stream}"
        values[stream][int(step)] = float(value)
    return values


def steps_saved(folder):
    return sorted(int(file.stem.split("_")[1]) for file in Path(folder).glob("ckpt_*.pt"))


def saved(folder, step=TINY["max_steps"]):
    return torch.load(Path(folder, f"ckpt_{step:08d}.pt"), weights_only=True)


def flat(tree, path=""):
    """{path: leaf} of nested dicts and lists."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}
    return {path: tree}


def differences(a, b):
    """The places where two checkpoints differ in any bit, their settings aside."""
    a, b = ({k: v for k, v in flat(x).items() if not k.startswith("/config")} for x in (a, b))
    same = {k for k in a.keys() & b.keys() if type(a[k]) is type(b[k]) and
            (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])}
    return sorted((a.keys() | b.keys()) - same)


def farthest(a, b):
    """The largest difference between the weights of two checkpoints."""
    assert a["model"].keys() == b["model"].keys()
    return max((a["model"][k] - b["model"][k]).abs().max().item() for k in a["model"])


def assert_same_run(folder, reference, step=TINY["max_steps"]):
    """Bit by bit the same weights, optimizer state and log; nothing half-written left."""
    assert differences(saved(folder, step), saved(reference, step)) == []
    assert log_lines(folder) == log_lines(reference)
    assert list(Path(folder).glob("*.tmp")) == []
