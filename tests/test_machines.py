"""Machines that nobody here has: CUDA, several GPUs, float16, Macs, Windows, older PyTorch. All of it runs on a CPU.

Errors are injected, names are taken away, and a device is pretended: a string that PyTorch reads as "cpu" and
train_gpt2.py, which asks for its type, as a GPU.
"""
import contextlib
import copy
import functools
import math
import re
import shutil
import sys
import threading
import time
import types
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import train_gpt2
from helpers import FakeWorld, random_ids, shake, tiny_config, tiny_model, write_shards
from launch import (after_backward, assert_same_run, command, log_values, run, run_many, saved, start_many,
                    steps_saved)
from train_gpt2 import (Corpus, Log, TrainConfig, UserError, World, configure_optimizers, describe_step,
                        evaluate_loss, fit_micro_batch, pick_device, pick_dtype, train_step)

CPU = torch.device("cpu")


class Pretended(str):
    """Pretended("cpu"): a CPU that says it is a GPU."""
    type = "cuda"


def gpu_world():
    world = FakeWorld()
    world.device, world.autocast = Pretended("cpu"), lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    return world


# ---- float16: a step that overflows is left out, by all optimizers or none

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("where", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_gradient_moves_no_weight(optimizer, where, bad):
    """With Muon, the two matrices belong to two optimizers. The next step is scaled by half, and is made."""
    model, cfg = tiny_model(), tiny_config(optimizer=optimizer, total_batch_size=11 * 4)
    world = FakeWorld(scaler=torch.amp.GradScaler("cpu", init_scale=2.0 ** 12))
    optimizers, before = configure_optimizers(model, cfg, CPU, torch.float16), copy.deepcopy(model.state_dict())
    x, y = random_ids(2, 2, 11), random_ids(2, 2, 11, seed=3)
    spoil = model.get_parameter(where).register_hook(lambda gradient: gradient * bad)
    loss, norm = train_step(model, optimizers, x, y, 0.1, cfg, world)
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert world.scaler.get_scale() == 2.0 ** 11
    spoil.remove()
    assert train_step(model, optimizers, x, y, 0.1, cfg, world)[1].isfinite()
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in model.named_parameters())


def scaled_too_much():
    """Rig this process: the scaler begins so high that float16 overflows in the first steps."""
    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0 ** 30, enabled=enabled)

    torch.amp.GradScaler = Scaler


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_trains_skips_saves_and_resumes(base, tmp_path, optimizer):
    """From a checkpoint between the steps that are left out, too: the scale is part of the state."""
    settings = dict(optimizer=optimizer, dtype="float16", max_steps=20, checkpoint_every=3, keep_checkpoints=9,
                    micro_batch_size=8, val_every=0)
    run(command(base, "whole", **settings), tmp_path, scaled_too_much)
    assert "val" not in log_values(tmp_path / "whole")  # 0 is never, also at the end
    norms = log_values(tmp_path / "whole")["norm"]
    skipped = [step for step, norm in norms.items() if not math.isfinite(norm)]
    assert skipped[:4] == [0, 1, 2, 3] and len(skipped) < 15
    scales = {step: saved(tmp_path / "whole", step)["scaler"]["scale"] for step in (3, 18)}
    assert scales == {3: 2.0 ** 27, 18: 2.0 ** (30 - len(skipped))}
    losses = log_values(tmp_path / "whole")["train"]
    assert losses[0] - losses[19] > 0.3
    shutil.copytree(tmp_path / "whole", tmp_path / "log")
    for file in (tmp_path / "log").glob("ckpt*"):
        if int(file.stem[5:]) > 3:
            file.unlink()
    assert "steps: 3 to 20" in run(command(base, "log", "--resume", **settings), tmp_path).out  # not rigged
    assert_same_run(tmp_path / "log", tmp_path / "whole", 20)


def test_a_run_may_change_to_float16_and_back(base, tmp_path):
    """Its scaler finds no state in the checkpoint, and begins."""
    for steps, dtype, state in ((4, "bfloat16", False), (8, "float16", True), (12, "float32", False)):
        run(command(base, "log", "--resume", dtype=dtype, max_steps=steps, warmup_steps=1), tmp_path)
        assert bool(saved(tmp_path / "log", steps)["scaler"]) is state


# ---- torch.compile: few graphs, made once

def too_much():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@torch._dynamo.config.patch(recompile_limit=8)  # PyTorch's own limit, whatever another test has set
def test_trying_training_and_evaluating_share_their_graphs(monkeypatch, tmp_path):
    """Two models of one process, each tried with 24, 12, 8 and 6 rows: PyTorch alone would give up after 8 graphs."""
    made, ran = [], []

    def backend(graph, inputs):
        made.append(1)
        return lambda *a: (ran.append(1), graph.forward(*a))[1]

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    write_shards(tmp_path, [random_ids(300).tolist()], "val")
    for layers in (1, 2):
        cfg, world = tiny_config(n_layer=layers, val_tokens=11 * 20, total_batch_size=11 * 24), gpu_world()
        raw_model, world.compiles = tiny_model(n_layer=layers), True
        model = World.wrap(world, raw_model)
        del made[:]
        # too much memory is wanted after the forward pass: each try has made its graph
        raw_model.transformer.wpe.weight.register_hook(lambda g: too_much() if len(made) < 4 else None)
        B = fit_micro_batch(model, cfg, world)
        assert B == 6 and len(made) == 4
        optimizers = configure_optimizers(raw_model, cfg, CPU)
        del ran[:]
        for step in range(3):
            x, y = random_ids(4, B, 11, seed=step), random_ids(4, B, 11, seed=9)
            train_step(model, optimizers, x, y, 1e-3, cfg, world)
            if step == 0:
                assert len(made) == 4, "training made a graph that the try has not made"
            evaluate_loss(model, Corpus(tmp_path, "val", 11, 37), B, cfg, world)
        assert len(made) == 5  # the fifth is that of the evaluation, without gradients
        assert len(ran) == 3 * (4 + 4)  # every forward of training and evaluation was compiled
    torch._dynamo.reset()


def test_the_backward_pass_gets_no_gradient_of_the_logits():
    """Nobody uses it; it would be a (B, T, V) tensor of zeros, 6.6 GB at 32 rows."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    seen = []

    def note(graph, inputs):
        seen.extend(n.meta["val"].shape for n in graph.graph.nodes if n.op == "placeholder" and "tangent" in n.name)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=note)
    torch._dynamo.reset()
    model = torch.compile(tiny_model(), backend=backend)
    model(random_ids(3, 11), random_ids(3, 11, seed=3))[1].backward()
    torch._dynamo.reset()
    assert seen == [()]


def compile_on_pretended_gpus():
    """Rig this process: the run takes place on a GPU, where rank 1 runs out of memory at first. It prints when a
    backward graph is made ("made") and run ("graph"), when a bucket of gradients leaves, and where they are kept.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch.nn.parallel import DistributedDataParallel
    compile, dist._DEFAULT_FIRST_BUCKET_BYTES = torch.compile, 4000

    def backward(graph, inputs):
        print("made", flush=True)
        return lambda *a: (print("graph", flush=True), graph.forward(*a))[1]

    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=backward)
    torch.compile = lambda model, **options: compile(model, backend=backend, **options)

    class DDP(DistributedDataParallel):
        def __init__(self, model, **options):
            super().__init__(model, bucket_cap_mb=0.01, **options)
            self.register_comm_hook(None, self.leave)

        def leave(self, state, bucket):
            print("bucket", flush=True)
            work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

    class GPU(World):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.device = Pretended("cpu")

    step, backwards, calls = train_gpt2.train_step, torch.Tensor.backward, []

    def out_of_memory(loss):
        calls.append(1)
        if len(calls) == 1 and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backwards(loss)

    def rigged(model, *arguments):
        print("step", flush=True)
        result = step(model, *arguments)
        places = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
        print(f"gradients {len(places)} places {len(set(places))}", flush=True)
        return result

    train_gpt2.DDP, train_gpt2.World, train_gpt2.train_step = DDP, GPU, rigged
    torch.Tensor.backward = out_of_memory
    torch.Tensor.pin_memory, torch.cuda.max_memory_allocated = lambda tensor: tensor, lambda: 0
    train_gpt2.main(sys.argv[1:])
    sys.exit()


def test_gradients_leave_while_the_backward_pass_still_runs(base, tmp_path):
    """DDP splits the graph that it compiles; a graph made without it would keep all buckets to its end. So the run
    must try its rows inside DDP, without waiting for a process that has failed."""
    arguments = command(base, micro_batch_size="auto", compile=1, max_steps=3, warmup_steps=0, val_every=0,
                        checkpoint_every=0, n_embd=32)
    first, second = run_many(2, arguments, tmp_path, compile_on_pretended_gpus)
    assert "micro-batch of 8 rows: does not fit\n" in first.out and "micro-batch of 4 rows: fits\n" in first.out
    for running in first, second:
        tried, *steps = running.out.split("step\n")
        assert "bucket" not in tried and "made" in tried and len(steps) == 3
        for step in steps:
            assert "made" not in step, "training made a graph that the try has not made"
        events = re.findall("^graph|^bucket", steps[-1], re.MULTILINE)
        graphs = events.count("graph") // 2  # in each of two micro-steps
        assert graphs > 2 and events.count("bucket") > 2
        last = events[graphs:]
        assert "bucket" not in events[:graphs] and "bucket" in last[:-last[::-1].index("graph")]
        gradients, places = map(int, re.search(r"gradients (\d+) places (\d+)", steps[-1]).groups())
        assert places == events.count("bucket") < gradients, "gradients are stored outside of DDP's buckets"


# ---- how many rows fit

class Recorder(torch.nn.Module):
    """A model that computes nothing, and notes how many rows it was asked for."""

    def __init__(self, rows=10**9, error=None):
        super().__init__()
        self.w, self.rows, self.error, self.asked = torch.nn.Parameter(torch.ones(3)), rows, error, []

    def forward(self, x, y):
        assert torch.is_autocast_enabled("cpu")
        self.asked.append(len(x))
        if len(x) > self.rows:
            raise self.error
        return None, self.w.sum()


@pytest.mark.parametrize("processes, block_size, first", [(1, 1024, 32), (4, 256, 128), (6, 1024, 32)])
def test_no_more_than_2_to_the_31_logits(processes, block_size, first):
    cfg, world, model = TrainConfig(block_size=block_size, vocab_size=50304), gpu_world(), Recorder()
    cfg.total_batch_size, world.size = 64 * 8 * 1024 * 6, processes
    assert fit_micro_batch(model, cfg, world) == first and model.asked == [first]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.AcceleratorError("CUDA error: out of memory")], ids=lambda error: str(error)[:30])
def test_memory_that_runs_out_is_seen_whoever_says_it(error, monkeypatch):
    """Fewer rows are tried, and said. Room for AdamW's two moments and for a gigabyte is kept meanwhile."""
    kept, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: (kept.append(a[0]), empty(0))[1])
    cfg, world, model = tiny_config(), gpu_world(), Recorder(4, error)
    assert fit_micro_batch(model, cfg, world) == 4 and model.asked == [12, 6, 4]
    assert [line.split(": ")[1] for line in world.printed] == ["does not fit", "does not fit", "fits"]
    assert kept == [2 * 3 + 2**30 // 4] * 3 and model.w.grad is None
    with pytest.raises(UserError, match=r"\[12, 6, 4, 3, 2, 1\] rows"):
        fit_micro_batch(Recorder(0, error), cfg, world)


def test_another_error_of_the_gpu_is_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fit_micro_batch(Recorder(4, RuntimeError("CUDA error: an illegal memory access")), tiny_config(), gpu_world())


def out_of_memory(step, parameters):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


def test_memory_that_runs_out_later_is_one_line_of_advice(base, tmp_path):
    line = run(command(base), tmp_path, functools.partial(after_backward, out_of_memory), status=2).err
    assert line == ("train_gpt2.py: try half as many rows, --micro_batch_size: CUDA out of memory. Tried to allocate "
                    "2 GiB\n")


# ---- one process fails while the others wait

def fail_in_step_3(step, parameters):
    """Rank 1 meets a bug, and to close the group of processes would wait for the others."""
    dist.destroy_process_group = lambda *a: time.sleep(1000)
    if step == 3 and dist.get_rank() == 1:
        raise RuntimeError("a bug in a fork")


def test_a_process_that_fails_says_so_and_leaves(base, tmp_path):
    running = start_many(2, command(base), tmp_path, functools.partial(after_backward, fail_in_step_3))
    try:
        assert running[1].wait(60) == 1
    finally:
        running[0].process.kill()  # as torchrun does then; until that it may wait
        running[0].wait()
    assert "Traceback" in running[1].err and running[1].err.rstrip().endswith("RuntimeError: a bug in a fork")


def test_processes_wait_half_an_hour_for_one_that_is_busy(monkeypatch):
    asked = {}
    for name, value in dict(RANK="0", WORLD_SIZE="2", GROUP_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **options: asked.update(options))
    World(tiny_config(device="cpu"))
    assert asked["timeout"] >= timedelta(minutes=30)


# ---- what a machine can do

def pretend(monkeypatch, device, capability=None, triton=True):
    """From now on there is such a device."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **o: types.SimpleNamespace(device=torch.device(o["device"]))
                        if str(o.get("device")).split(":")[0] == device else zeros(*a, **o))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA Something")
    monkeypatch.setattr(torch.cuda, "set_device", lambda *a: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    monkeypatch.setattr(train_gpt2, "find_spec", lambda name: "there" if triton and name == "triton" else None)


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler:UserWarning")
@pytest.mark.parametrize("capability, triton, dtype, compiles", [
    ((6, 0), True, torch.float32, False), ((7, 0), True, torch.float16, True), ((7, 5), True, torch.float16, True),
    ((8, 0), True, torch.bfloat16, True), ((8, 9), False, torch.bfloat16, False), ((9, 0), True, torch.bfloat16, True)])
def test_gpus_get_what_they_can_do(monkeypatch, capability, triton, dtype, compiles):
    """Triton refuses GPUs before 7.0, Windows and Jetsons lack it, and bfloat16 before 8.0 is emulated."""
    pretend(monkeypatch, "cuda", capability, triton)
    world = World(tiny_config(device="cuda"))
    assert world.dtype == dtype and bool(world.compiles) is compiles
    asked = World(tiny_config(device="cuda", dtype="float32", compile="1"))
    assert asked.dtype == torch.float32 and asked.compiles  # who asks for it, gets it


def test_cpus_get_bfloat16_where_they_compute_in_it(monkeypatch):
    for can, dtype in (("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {can: True}, raising=False)
        assert pick_dtype("auto", CPU) == dtype


def test_macs_train_in_float32_and_alone(monkeypatch):
    mac = torch.device("mps")
    assert pick_dtype("auto", mac) == pick_dtype("float32", mac) == torch.float32
    for dtype in "bfloat16", "float16":
        with pytest.raises(UserError, match=f"--dtype {dtype}: .*later tokens.*use float32"):
            pick_dtype(dtype, mac)
    pretend(monkeypatch, "mps")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--device cpu"):
        World(tiny_config(device="mps"))


def test_a_process_takes_the_gpu_of_its_number_on_its_machine(monkeypatch):
    """Process 11 of 16, on the second of two machines with 8 GPUs each, has the fourth."""
    pretend(monkeypatch, "cuda")
    for name, value in dict(RANK="11", LOCAL_RANK="3").items():
        monkeypatch.setenv(name, value)
    assert str(pick_device("cuda")) == "cuda:3" and str(pick_device("cuda:1")) == "cuda:1"


class OnMac(torch.Tensor):
    """A tensor on a Mac's GPU, and what is computed from it: it can't be made float64 there."""
    reads = 0

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self):
        OnMac.reads += 1
        return self.as_subclass(torch.Tensor)

    def item(self):
        OnMac.reads += 1
        return self.as_subclass(torch.Tensor).item()


def test_a_val_loss_is_read_once_and_becomes_float64_on_the_cpu(tmp_path):
    """Reading waits for the device."""
    write_shards(tmp_path, [random_ids(300).tolist()], "val")
    corpus, cfg, model, OnMac.reads = Corpus(tmp_path, "val", 11, 37), tiny_config(), tiny_model(), 0
    want = evaluate_loss(model, corpus, 4, cfg, FakeWorld())
    model.register_forward_hook(lambda module, inputs, out: (out[0], out[1].as_subclass(OnMac)))
    assert evaluate_loss(model, corpus, 4, cfg, FakeWorld()) == want
    assert OnMac.reads == 1


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA L40S": 362e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA GeForce RTX 5090": 209.5e12, "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8e12, "NVIDIA RTX 6000 Ada Generation": 364e12,
    "NVIDIA RTX A6000": 154.8e12, "Tesla T4": 65e12, "Tesla V100-SXM2-16GB": 125e12, "NVIDIA RTX A1000": None,
    "NVIDIA T400": None, "NVIDIA A10": None, "NVIDIA GH200 480GB": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090 Ti": None, "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "": None}


@pytest.mark.parametrize("gpu, peak", PEAKS.items())
def test_a_gpu_is_known_by_its_whole_name(gpu, peak):
    """The share of its peak that 50 TFLOP/s on each of two are. 6 a token and parameter, and attention's 12 LCT (PaLM,
    appendix B)."""
    model, cfg, world = tiny_model(), tiny_config(), FakeWorld(size=2)
    world.gpu = gpu
    parameters = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    seconds = cfg.total_batch_size * (6 * parameters + 12 * 3 * 24 * 11) / 50e12 / 2
    said = re.search(r"MFU ([\d.]+%)", describe_step(3, 4.2, 1e-3, 0.9, [9.0, seconds], model, cfg, world))
    assert (said and said[1]) == (peak and f"{50e12 / peak:.1%}")


def test_what_the_line_of_a_step_says(monkeypatch):
    """The time left is that of steps like the last ones: not of the first, nor of one that was disturbed."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    seconds = [9.0] * 40 + [2.0] * 20 + [5.0]
    assert describe_step(3, 4.2, 1e-3, 0.9, seconds, tiny_model(), tiny_config(max_steps=13), FakeWorld()) == (
        "step     3 | loss 4.200000 | lr 1.0000e-03 | norm 0.9000 | 5000.0 ms | 26 tok/s | 3.0 GiB at most | "
        "ETA 0:00:18")


def windows_console():
    """Rig this process: it prints into a pipe that knows Western Europe's letters only."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(encoding="cp1252", errors="strict")


def test_a_letter_that_the_console_lacks_does_not_end_a_run(base, tmp_path):
    running = run(command(base, sample_every=4, prompt="日本", max_steps=4, warmup_steps=1), tmp_path, windows_console)
    assert running.out.count("sample | ??") == 4 and "done:" in running.out


def older_pytorch():
    """Rig this process: what came after PyTorch 2.9 is not there."""
    for module, name in ((torch.cpu, "get_capabilities"), (torch.nn.functional, "linear_cross_entropy")):
        if hasattr(module, name):
            delattr(module, name)


def test_older_pytorch_is_enough(base, tmp_path):
    out = run(command(base, dtype="auto", optimizer="muon", max_steps=4, warmup_steps=1), tmp_path, older_pytorch).out
    assert "compile 0, float32" in out and "done:" in out


# ---- disks

@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError()])
def test_a_disk_without_locks_is_written_to(tmp_path, monkeypatch, error):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with contextlib.closing(Log(tiny_config(log_dir=str(tmp_path)), FakeWorld(), 0)) as log:
        log.write(0, {"train": 4.5}, "")
    assert (tmp_path / "log.txt").read_text() == "0 train 4.5\n"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """And what is written is the state of its step."""
    cfg, free, model = tiny_config(log_dir=str(tmp_path)), threading.Event(), tiny_model()
    before = copy.deepcopy(model.state_dict())
    with contextlib.closing(Log(cfg, FakeWorld(), 0)) as log:
        log.thread.submit(free.wait, 60)  # the disk is busy
        log.checkpoint(5, {}, model, [])
        shake(model)
        assert steps_saved(tmp_path) == []
        free.set()
    written = saved(tmp_path, 5)["model"]  # the end of a run has waited for it
    assert all(torch.equal(written[name], p) for name, p in before.items())
