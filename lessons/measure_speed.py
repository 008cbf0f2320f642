"""Speed, measured where you are: each benchmark does one thing in several ways, in turn, on the same machine.

    python lessons/measure_speed.py                               # ladder, loader, start, processes: minutes
    python lessons/measure_speed.py ladder --device cuda          # the rungs of a training step, on a GPU
    python lessons/measure_speed.py rows --device cuda            # rows, memory and tok/s for each size of GPT-2
    python lessons/measure_speed.py tokenising --text web.txt     # one benchmark, on a text of your own

Other programs slow a machine down from one second to the next. So the ways take turns for several rounds, and
what counts is the median of the ratios, not the megabytes per second. Results are kept in
lessons/measured/speed_<device>.json, with the machine, the versions and the commit that they belong to.
"""
import argparse
import contextlib
import datetime
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fineweb    # noqa: E402  (found through the line above)
import hellaswag  # noqa: E402
import train_gpt2  # noqa: E402

SHARD = 5_000_000       # tokens in a shard of the tokenising benchmark
WORKER = {}             # what a worker process keeps


def in_turn(ways, rounds):
    """Seconds of each way, by the clock and on the processors: two {name: [round 1, round 2 ...]}.

    The ways go A, B, A, B ... so that both meet the same disturbances. Processor time, children included,
    hardly feels them: with all cores busy throughout, its ratio is what the clock would show on a machine of
    one's own.
    """
    clock, work = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin, before = time.perf_counter(), sum(os.times()[:4])
            way()
            clock[name].append(time.perf_counter() - begin)
            work[name].append(sum(os.times()[:4]) - before)
    return clock, work


def median_ratio(first, second):
    return round(statistics.median(a / b for a, b in zip(first, second)), 2)


# ------------------------------------------------------------------------------------------------------------
# the ladder: one training step, made faster rung by rung

@dataclass(frozen=True)
class Rung:
    """How a step is computed. A rung changes one of these, and none may change what is computed."""
    name: str = "float32"
    tf32: bool = False      # float32 products with 10 bits of mantissa
    dtype: torch.dtype = torch.float32
    compile: bool = False
    sdpa: bool = False      # F.scaled_dot_product_attention, or attention written out
    padded: bool = False    # rows in wte: 50304, or 50257
    fused: bool = False     # AdamW in one kernel, or in a few operations for all parameters together
    chunked: bool = False   # F.linear_cross_entropy, which never holds all logits, or all of them at once
    times: int = 1          # rows, in multiples of the first rung's
    theirs: bool = False    # transformers' GPT-2 in the place of ours


CHANGES = {"TF32": dict(tf32=True), "bfloat16": dict(dtype=torch.bfloat16), "torch.compile": dict(compile=True),
           "fused attention": dict(sdpa=True), "padded vocabulary": dict(padded=True),
           "fused AdamW": dict(fused=True), "chunked loss": dict(chunked=True), "twice the rows": dict(times=2)}
# What a rung may move the loss by; the others 1e-5. Padding adds 47 ids that nobody says: ln(50304 / 50257) = 0.0009.
TOLERANCE = {"TF32": 1e-3, "bfloat16": 1e-2, "padded vocabulary": 2e-3}
# block_size, rows, n_layer, n_head, n_embd, and the vocabulary without and with padding
SIZES = {"cpu": {"124M, 4 x 256 tokens": (256, 4, 12, 12, 768, 50257, 50304),
                 "6 layers of 192, 16 x 256 tokens": (256, 16, 6, 6, 192, 1009, 1024)},
         "cuda": {"124M, 16 x 1024 tokens": (1024, 16, 12, 12, 768, 50257, 50304)}}


def missing(rung, device, size):
    """Why a rung can't be measured on a device, or ""."""
    if rung.tf32 and device.type != "cuda":
        return "TF32 is in NVIDIA's GPUs"
    if rung.dtype == torch.bfloat16 and device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16"):
        return "this CPU has no bfloat16 arithmetic; emulated, a step takes several times as long"
    if rung.compile and device.type == "cpu" and not shutil.which("g++"):
        return "torch.compile needs g++ on a CPU"
    if rung.compile and device.type == "cpu" and size[2] > 6:
        return "on a CPU compiled at the smaller size only: here it would take minutes"
    return ""


def ladder_of(device, size):
    """[(rung, why it is missing)] from the bottom. Each stands on those below it, where the device has them. On a CPU
    nobody stands on torch.compile, which takes longer than a short run can save, nor on the chunked loss, which
    takes a step of 124M twice as long there."""
    below = Rung()
    rungs = [(below, "")]
    for name, change in CHANGES.items():
        rung = replace(below, name=name, **change)
        why = missing(rung, device, size)
        rungs.append((rung, why))
        left_out = device.type == "cpu" and (rung.compile or rung.chunked)
        below = below if why or left_out else rung
    for theirs in (Rung("transformers", theirs=True, sdpa=True),
                   Rung("transformers, bfloat16", theirs=True, sdpa=True, dtype=torch.bfloat16)):
        rungs.append((theirs, missing(theirs, device, size)))
    return rungs


def attention_written_out(q, k, v, attn_mask=None, is_causal=True):
    """What the fused kernel computes, with all T x T weights in memory -> (B, nh, T, hs)."""
    weights = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
    future = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(weights.masked_fill(future, -torch.inf), dim=-1) @ v


def same_models(size, device):
    """Ours without and with padding, and transformers', all three with the same weights -> {(theirs, padded): it}."""
    from transformers import GPT2LMHeadModel
    T, _, n_layer, n_head, n_embd, unpadded, padded = size
    torch.manual_seed(0)
    ours = train_gpt2.GPT(train_gpt2.GPTConfig(T, unpadded, n_layer, n_head, n_embd))
    wider = train_gpt2.GPT(replace(ours.config, vocab_size=padded))
    with torch.no_grad():
        for p, q in zip(wider.parameters(), ours.parameters()):
            p[:len(q)] = q
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).train()
    return {(False, False): ours.to(device), (False, True): wider.to(device), (True, False): theirs.to(device)}


class Stepper:
    """A model, its optimiser and a batch; step() is one update as a rung has it, first_loss() what it starts from."""

    def __init__(self, rung, size, models, device):
        T, rows, *_, unpadded, _ = size
        self.rung, self.device, self.model = rung, device, models[rung.theirs, rung.padded]
        self.optimizer = models.setdefault((self.model, rung.fused), torch.optim.AdamW(
            self.model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=rung.fused))
        ids = torch.randint(unpadded, (rows, T + 1), generator=torch.Generator().manual_seed(1))
        self.x, self.y = (part.repeat(rung.times, 1).to(device) for part in (ids[:, :-1], ids[:, 1:]))
        self.compute = torch.compile(self.loss, dynamic=False) if rung.compile else self.loss

    def loss(self, x, y):
        if self.rung.theirs:
            return F.cross_entropy(self.model(x).logits.flatten(0, 1), y.flatten())
        if not self.rung.chunked:
            return self.model(x, y)[1]
        return F.linear_cross_entropy(self.model.hidden(x).flatten(0, 1), self.model.lm_head.weight, y.flatten(),
                                      options=torch.nn.LinearCrossEntropyOptions())

    @contextlib.contextmanager
    def conditions(self):
        torch.set_float32_matmul_precision("high" if self.rung.tf32 else "highest")
        written_out = mock.patch.object(F, "scaled_dot_product_attention", attention_written_out)
        with contextlib.nullcontext() if self.rung.sdpa else written_out:
            yield
        torch.set_float32_matmul_precision("highest")

    def forward(self):
        with torch.autocast(self.device.type, self.rung.dtype, enabled=self.rung.dtype != torch.float32):
            return self.compute(self.x, self.y)

    def first_loss(self):
        with self.conditions(), torch.no_grad():
            return self.forward().item()

    def step(self):
        with self.conditions():
            loss = self.forward()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device: before that there is nothing to time


def climb(size, device, rounds=3):
    """One ladder -> its rows, [{rung, ms, tok_s, times_faster, memory_mb, mfu, loss, loss_difference, note}].

    ms is the median of the rounds, times_faster the median of their ratios to the first rung. memory_mb is the
    peak of a step beyond weights and moments, on CUDA. mfu counts 6N + 12LHQT operations a token, against the
    GPU's data sheet, or on a CPU against the float32 matrix products that it does here, measured beside.
    """
    models, rows, steppers = same_models(size, device), [], {}
    for rung, why in ladder_of(device, size):
        row = {"rung": rung.name, "note": why}
        rows.append(row)
        if why:
            continue
        stepper = steppers[rung.name] = Stepper(rung, size, models, device)
        row["loss"] = stepper.first_loss()
    for row in rows:  # all first losses are of the same weights: only now does anyone move them
        if row["rung"] in steppers:
            row["loss_difference"] = row["loss"] - rows[0]["loss"]
            row["memory_mb"] = peak_of(steppers[row["rung"]], device)
    clock, _ = in_turn({name: stepper.step for name, stepper in steppers.items()}, rounds)
    T, _, n_layer, _, n_embd, _, padded = size
    flops = 6 * (12 * n_layer * n_embd ** 2 + padded * n_embd) + 12 * n_layer * n_embd * T
    peak = peak_flops(device)
    for row in rows:
        if row["rung"] in steppers:
            seconds, tokens = clock[row["rung"]], steppers[row["rung"]].x.numel()
            row["ms"] = round(1000 * statistics.median(seconds), 1)
            row["tok_s"] = round(1000 * tokens / row["ms"], 1)
            first = steppers[rows[0]["rung"]].x.numel()
            row["times_faster"] = round(median_ratio(clock[rows[0]["rung"]], seconds) * tokens / first, 2)
            row["mfu"] = round(row["tok_s"] * flops / peak, 3)
    return rows


def peak_of(stepper, device):
    """MB that a step takes at its peak beyond what is there between steps; None off CUDA. Also the warm-up."""
    stepper.step()
    if device.type != "cuda":
        return None
    stepper.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stepper.step()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6)


def peak_flops(device):
    """Operations a second that a GPU's maker promises in 16 bits, or that matrix products reach on this CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((flops for gpu, flops in train_gpt2.PEAK_FLOPS.items() if gpu in name), float("nan"))
    a, b = torch.randn(1024, 768), torch.randn(768, 3072)
    seconds, _ = in_turn({"mm": lambda: [a @ b for _ in range(10)]}, 5)
    return 10 * 2 * a.numel() * b.size(1) / min(seconds["mm"])


def bench_ladder(device="cpu", rounds=3):
    """The ladder at each size that suits the device."""
    device = torch.device(device)
    ladders = []
    for name, size in SIZES[device.type].items():
        ladders.append({"name": name, "rows": climb(size, device, rounds)})
        print(f"{name}\n{'':26}{'ms':>10}{'tok/s':>10}{'times':>8}{'MB':>8}{'MFU':>7}{'loss':>10}{'':>3}difference")
        for row in ladders[-1]["rows"]:
            if "ms" in row:
                print(f"{row['rung']:26}{row['ms']:10.1f}{row['tok_s']:10.0f}{row['times_faster']:8.2f}"
                      f"{row['memory_mb'] or '':>8}{row['mfu']:7.1%}{row['loss']:10.4f}{row['loss_difference']:+13.6f}")
            else:
                print(f"{row['rung']:26}   {row['note']}")
    return ladders


# ------------------------------------------------------------------------------------------------------------
# around the step: what the loader, the start and a second process cost

def bench_loader(steps=50):
    """What a step waits for its batch, against what the batch would cost without the thread that reads ahead."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        np.save(Path(folder, "text_train_000000.npy"), rng.integers(0, 50257, 20_000_000, dtype=np.uint16))
        cfg = train_gpt2.TrainConfig(total_batch_size=2 ** 19, max_steps=steps)
        corpus = train_gpt2.Corpus(folder, "train", cfg.block_size, cfg.vocab_size)
        world = mock.Mock(rank=0, size=1, device=torch.device("cpu"))
        loader = train_gpt2.DataLoaderLite(corpus, 16, cfg, world)
        begin = time.perf_counter()
        for step in range(steps):
            loader.read(step)
        alone = (time.perf_counter() - begin) / steps
    return {"ms_per_524288_tokens": round(alone * 1000, 1), "tokens_per_s": round(cfg.total_batch_size / alone)}


def bench_start(rounds=3):
    """Seconds from the command to its end: an import, --help, and the laptop preset's first step, its shards being
    there."""
    def python(*words):
        return lambda: subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, check=True)

    with tempfile.TemporaryDirectory() as folder:
        make_builtin(folder)
        ways = {"import torch": python("-c", "import torch"), "import train_gpt2": python("-c", "import train_gpt2"),
                "--help": python("train_gpt2.py", "--help"),
                "one step of --preset laptop": python("train_gpt2.py", "--preset=laptop", f"--data_dir={folder}",
                                                      f"--log_dir={folder}/log", "--max_steps=1", "--val_every=0",
                                                      "--sample_every=0", "--checkpoint_every=0")}
        clock, _ = in_turn(ways, rounds)
    return {name: round(min(seconds), 2) for name, seconds in clock.items()}


def make_builtin(folder):
    """Shards of the builtin text for the laptop preset, quietly."""
    ids = train_gpt2.PRESETS["laptop"]["vocab_size"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fineweb.main(["--source", "builtin", "--tokenizer", f"bpe:{ids}", "--out", str(folder)])


def bench_processes(device="cpu", rounds=3, steps=20):
    """tok/s of one process, and of several under torchrun, with the same tokens a step, in turn.

    On a CPU the laptop preset and two processes with half of the cores each; on GPUs 124M and a process a GPU (one
    under torchrun, too, if there is only one). Also by how much their losses differ, relatively, at most.
    """
    count, rates, losses = torch.cuda.device_count() if device == "cuda" else 2, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        data, flags = Path(folder, "data"), ["--preset=laptop"]
        if device == "cuda":
            data.mkdir()
            flags = ["--preset=gpt2", "--warmup_steps=5"]
            for split in "val", "train":
                ids = np.random.default_rng(0).integers(0, 50257, (steps + 1) * 2 ** 19, dtype=np.uint16)
                np.save(data / f"random_{split}_000000.npy", ids)
        else:
            make_builtin(data)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        for turn in range(rounds):
            for name, python in (("one process", [sys.executable]), (f"{count} under torchrun", torchrun)):
                log = Path(folder, f"{name} {turn}")
                threads = max(1, os.cpu_count() // (count if python is torchrun else 1))
                command = [*python, ROOT / "train_gpt2.py", *flags, f"--data_dir={data}", f"--log_dir={log}",
                           f"--device={device}", f"--max_steps={steps}", "--val_every=0", "--hellaswag_every=0",
                           "--sample_every=0", "--checkpoint_every=0"]
                subprocess.run(command, check=True, capture_output=True,
                               env=os.environ | {"OMP_NUM_THREADS": str(threads)})
                values, _ = train_gpt2.read_log(log)
                losses[name] = values["train"]
                # The first steps warm up: kernels are picked, on a GPU compiled.
                rates.setdefault(name, []).append(statistics.median(list(values["tok/s"].values())[steps // 4:]))
    one, many = rates.values()
    first, second = losses.values()
    return {"tok_s": {name: round(statistics.median(rate)) for name, rate in rates.items()},
            "times_faster": median_ratio(many, one), "each_round": [round(b / a, 2) for a, b in zip(one, many)],
            "largest_relative_difference_of_losses": max(abs(second[s] - loss) / loss for s, loss in first.items())}


def bench_rows(device="cuda", rounds=3, presets=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")):
    """Rows a micro-batch, memory at the peak and tok/s of a step of AdamW, for each size of GPT-2: 1, 2, 4 ... rows up
    to 64, or until memory runs out. For GPUs: there this is the table to choose --micro_batch_size from."""
    table, device = [], torch.device(device)
    if device.type == "cpu":
        return {"note": "for a GPU: python lessons/measure_speed.py rows --device cuda"}
    for preset in presets:
        cfg = train_gpt2.TrainConfig(**train_gpt2.PRESETS[preset])
        model = train_gpt2.GPT(cfg).to(device)
        optimizers = train_gpt2.configure_optimizers(model, cfg, device)
        compiled = torch.compile(model, dynamic=False)
        world = train_gpt2.World(replace(cfg, device=device.type))
        for rows in (1, 2, 4, 8, 16, 32, 64):
            x = torch.randint(50257, (1, rows, cfg.block_size), device=device)

            def step():
                train_gpt2.train_step(compiled, optimizers, x, x, cfg.max_lr, cfg, world)[0].item()

            try:
                torch.cuda.reset_peak_memory_stats()
                in_turn({"warm up": step}, 3)
                seconds, _ = in_turn({"step": step}, rounds)
            except torch.OutOfMemoryError:
                print(f"    {preset:12} {rows:3} rows: out of memory")
                break
            table.append({"preset": preset, "rows": rows, "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
                          "tok_s": round(x.numel() / statistics.median(seconds["step"]))})
            print("    {preset:12} {rows:3} rows: {memory_gb:6.1f} GB, {tok_s:9,} tok/s".format(**table[-1]))
        del model, compiled, optimizers
        torch.cuda.empty_cache()
    return {"table": table}


# ------------------------------------------------------------------------------------------------------------
# learning: what a recipe reaches, in tokens and in seconds

# nanoGPT's recipe for a laptop (its README: 4 layers of 128, 64 tokens, 12 rows, 2,000 steps), in our flags. Its
# beta2 of 0.99 is no flag here.
NANOGPT = ["--block_size=64", "--n_layer=4", "--n_head=4", "--n_embd=128", "--total_batch_size=768",
           "--max_steps=2000", "--max_lr=1e-3", "--min_lr=1e-4", "--warmup_steps=100", "--optimizer=adamw"]
QUIET = ["--hellaswag_every=0", "--sample_every=0", "--checkpoint_every=0", "--device=cpu", "--val_tokens=100000"]


def learn(data_dir, *flags):
    """One run of train_gpt2.py -> (val losses by step, bits per byte at the end, seconds in steps, tokens a step)."""
    with tempfile.TemporaryDirectory() as log_dir, contextlib.redirect_stdout(io.StringIO()):
        meta = train_gpt2.read_meta(data_dir)
        words = [f"--data_dir={data_dir}", f"--vocab_size={-(-meta['vocab_size'] // 128) * 128}",
                 f"--log_dir={log_dir}", *QUIET, *flags]
        cfg, _ = train_gpt2.parse_config("train", words)
        values = train_gpt2.train(cfg)
    val = [shard for shard in meta["shards"] if shard["split"] == "val"]
    tokens_per_byte = sum(shard["tokens"] for shard in val) / sum(shard["bytes"] for shard in val)
    bits = values["val"][cfg.max_steps] / math.log(2) * tokens_per_byte
    return values["val"], bits, sum(cfg.total_batch_size / r for r in values["tok/s"].values()), cfg.total_batch_size


# The way from there to `--preset laptop`, and what leads away from it: (name, tokenizer, flags on top of the preset).
# The steps of each are as many as took the seconds of nanoGPT's recipe on two cores without bfloat16.
SMALL = ["--n_layer=4", "--n_head=4", "--n_embd=128"]
RECIPES = [("nanoGPT's recipe", "bytes", NANOGPT),
           ("Muon instead of AdamW, 16 rows", "bytes", [*SMALL, "--total_batch_size=1024", "--max_steps=1050"]),
           ("1,024 ids instead of bytes, 32 rows", "bpe:1024", [*SMALL, "--max_steps=640"]),
           ("two layers of 192 instead of four of 128", "bpe:1024", ["--max_steps=650"]),
           ("2,048 ids: --preset laptop", "bpe:2048", []),
           ("with AdamW at 2e-3", "bpe:2048", ["--optimizer=adamw", "--max_lr=2e-3", "--max_steps=650"]),
           ("with AdamW at 4e-3", "bpe:2048", ["--optimizer=adamw", "--max_lr=4e-3", "--max_steps=650"]),
           ("with a context of 128", "bpe:2048", ["--block_size=128", "--max_steps=530"]),
           ("with 4,096 ids", "bpe:4096", ["--max_steps=390"])]


def bench_laptop(text=None, rounds=1):
    """`--preset laptop` against nanoGPT's recipe and others in between, on the builtin text or on the first 1.1 MB of
    a file: bits and nats per byte on the held-out tenth, and the seconds spent in training steps."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = ["builtin"]
        if text:
            file = Path(folder, "text.txt")
            file.write_text(Path(text).read_text(encoding="utf-8")[:1_100_000], encoding="utf-8")
            source = [str(file)]
        for name, tokenizer, flags in RECIPES:
            data = Path(folder, tokenizer)
            if not data.exists():
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    fineweb.main(["--source", *source, "--tokenizer", tokenizer, "--out", str(data)])
            preset = [] if flags is NANOGPT else ["--preset=laptop"]
            _, bits, seconds, _ = learn(data, *preset, *flags, "--val_every=10000")
            rows.append({"recipe": name, "tokenizer": tokenizer, "flags": " ".join(preset + flags),
                         "bits_per_byte": round(bits, 4), "nats_per_byte": round(bits * math.log(2), 4),
                         "seconds": round(seconds, 1)})
            print(f"    {name:42} {bits:.3f} bits per byte in {seconds:.0f} s", flush=True)
    return {"text": "a text file" if text else "builtin", "threads": torch.get_num_threads(), "recipes": rows}


def bench_muon(rounds=1, steps=600):
    """How many tokens Muon needs for the loss that AdamW ends at, at two sizes -> lessons/measured/muon.json.

    Each point is a run of its own, with its own whole schedule. AdamW has the best of three learning rates, Muon the
    better of two.
    """
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            fineweb.main(["--source", "builtin", "--tokenizer", "bpe:1024", "--out", folder])
        for layers, width in ((2, 64), (4, 128)):
            shape = ["--block_size=64", f"--n_layer={layers}", f"--n_embd={width}", f"--n_head={width // 32}",
                     "--total_batch_size=2048", "--warmup_steps=25", "--val_every=10000"]

            def final(optimizer, lr, part):
                count = round(part * steps)
                val, *_ = learn(folder, *shape, f"--optimizer={optimizer}", f"--max_lr={lr}", f"--min_lr={lr / 100}",
                                f"--max_steps={count}")
                print(f"    {layers} x {width} {optimizer} {lr} {count} steps: val {val[count]:.4f}", flush=True)
                return val[count]

            adamw = min((final("adamw", lr, 1), lr) for lr in (1e-3, 2e-3, 4e-3))
            muon = min((final("muon", lr, 0.5), lr) for lr in (8e-3, 1.6e-2))
            curve = {0.5: muon[0]} | {part: final("muon", muon[1], part) for part in (0.2, 0.3, 0.4, 0.7)}
            parts = sorted(curve)
            need = float(np.interp(-adamw[0], [-curve[part] for part in parts], parts))
            sizes.append({"name": f"{layers} layers of {width}", "adamw_loss": round(adamw[0], 4),
                          "adamw_lr": adamw[1], "muon_lr": muon[1], "adamw_tokens": steps * 2048,
                          "muon_tokens": round(need * steps * 2048), "saving": round(1 - need, 3),
                          "muon_loss_by_share_of_steps": {str(k): round(v, 4) for k, v in curve.items()}})
    return {"sizes": sizes}


# ------------------------------------------------------------------------------------------------------------
# tokenising: documents to shards on the disk

def start_usual(encoding):
    WORKER["encoding"] = encoding


def tokenise_usual(text):
    """What most preparation scripts do: a Python list of tokens, then an array, document by document."""
    encoding = WORKER["encoding"]
    return np.array([encoding.eot_token] + encoding.encode_ordinary(text)).astype(np.uint16)


def write_usual(documents, out, encoding, workers):
    """The usual way, end to end: `Pool.imap` in chunks of 16 documents, an array that fills up, `np.save`."""
    shard, filled, number = np.empty(SHARD, np.uint16), 0, 0
    with multiprocessing.Pool(workers, start_usual, (encoding,)) as pool:
        for tokens in pool.imap(tokenise_usual, documents, chunksize=16):
            while len(tokens):
                piece, tokens = np.split(tokens, [SHARD - filled])
                shard[filled:filled + len(piece)] = piece
                filled += len(piece)
                if filled == SHARD:
                    np.save(Path(out, f"{number}.npy"), shard)
                    filled, number = 0, number + 1
    np.save(Path(out, f"{number}.npy"), shard[:filled])


def bench_tokenising(text=None, workers=2, rounds=5, megabytes=60):
    """`fineweb.write_shards` against the usual way, on documents of 4,500 characters.

    Returns MB/s of each (median), how many times faster ours is (median of the rounds; by processor time
    too), and where the time goes: the share of it in which the main process waits for the workers. While it
    waits, tokenising is what holds the job up, and more workers would help. """
    encoding = fineweb.load_tokenizer("gpt2")
    source = "a text file" if text else "builtin"
    text = Path(text).read_text(encoding="utf-8") if text else "\n\n".join(fineweb.builtin_documents())
    documents = [text[i:i + 4500] for i in range(0, len(text), 4500)]
    documents *= max(1, round(megabytes * 1e6 / len(text.encode())))
    size = sum(len(document.encode()) for document in documents)
    waited = []

    def usual():
        with tempfile.TemporaryDirectory() as out:
            write_usual(documents, out, encoding, workers)

    def ours():
        with tempfile.TemporaryDirectory() as out:
            cpu = time.process_time()
            begin = time.perf_counter()
            fineweb.write_shards(documents, out, encoding, shard_size=SHARD, workers=workers)
            waited.append(1 - (time.process_time() - cpu) / (time.perf_counter() - begin))

    clock, work = in_turn({"usual": usual, "ours": ours}, rounds)
    rate = {name: round(size / statistics.median(times) / 1e6, 1) for name, times in clock.items()}
    return {"usual_MB_per_s": rate["usual"], "ours_MB_per_s": rate["ours"],
            "times_faster": median_ratio(clock["usual"], clock["ours"]),
            "each_round": [round(a / b, 2) for a, b in zip(clock["usual"], clock["ours"])],
            "times_faster_by_processor_time": median_ratio(work["usual"], work["ours"]),
            "main_process_waits": round(statistics.median(waited), 2),
            "workers": workers, "megabytes": round(size / 1e6, 1), "text": source}


# ------------------------------------------------------------------------------------------------------------
# HellaSwag: from questions to the log p of every ending

def hellaswag_usual(model, examples, encode, autocast):
    """The usual way: a forward a question, its four rows padded, all logits -> sums of log p (n, 4)."""
    sums, device = [], next(model.parameters()).device
    with torch.no_grad():
        for example in examples:
            _, tokens, mask, _ = hellaswag.render_example(example, encode)
            tokens, mask = tokens.to(device), mask.to(device)
            with autocast:
                logits, _ = model(tokens)
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(),
                                     reduction="none").view(4, -1)
            sums.append(-(losses * mask[:, 1:]).sum(1))
        return torch.stack(sums).double().cpu()


def bench_hellaswag(n=None, rounds=5):
    """`hellaswag.score` against the usual way: the 124M model, random weights, in float32 and in bfloat16.

    n questions (40; on a GPU 1,000), spread evenly over the file that HELLASWAG_DIR names or that is
    downloaded, or else the twelve of the tests. Returns for each dtype examples/s of each way (median), how
    many times faster ours is (median of the rounds; by processor time too), and by how much their sums of
    log p differ at most. """
    device = train_gpt2.pick_device("auto")
    try:
        examples = list(hellaswag.iterate_examples())
    except fineweb.UserError:
        examples = list(hellaswag.iterate_examples(path=ROOT / "tests" / "hellaswag_fixture.jsonl")) * 4
    n = min(n or (40 if device.type == "cpu" else 1000), len(examples))
    examples = examples[::len(examples) // n][:n]
    tokenizer = fineweb.load_tokenizer("gpt2")
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.TrainConfig()).to(device).eval()
    results = {"questions": n, "device": str(device), "threads": torch.get_num_threads()}
    for dtype in (torch.float32, torch.bfloat16):
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        sums = {}

        def usual():
            sums["usual"] = hellaswag_usual(model, examples, tokenizer.encode_ordinary, autocast)

        def ours():
            # packed: without the trial on one question, which is little beside 10,042 of them but much beside 40
            sums["ours"], _ = hellaswag.score(model, examples, tokenizer, dtype=dtype, packed=True)

        usual(), ours()  # once unmeasured: the first calls pick kernels and fill caches
        clock, work = in_turn({"usual": usual, "ours": ours}, rounds)
        name = str(dtype).removeprefix("torch.")
        for way, times in clock.items():
            results[f"{way}_per_s_{name}"] = round(n / statistics.median(times), 2)
        results[f"times_faster_{name}"] = median_ratio(clock["usual"], clock["ours"])
        results[f"times_faster_by_processor_time_{name}"] = median_ratio(work["usual"], work["ours"])
        results[f"each_round_{name}"] = [round(a / b, 2) for a, b in zip(clock["usual"], clock["ours"])]
        results[f"largest_difference_{name}"] = round((sums["usual"] - sums["ours"]).abs().max().item(), 5)
    return results


# ------------------------------------------------------------------------------------------------------------
# running and keeping

BENCHES = {"ladders": bench_ladder, "loader": bench_loader, "start": bench_start, "processes": bench_processes,
           "rows": bench_rows, "tokenising": bench_tokenising, "hellaswag": bench_hellaswag, "laptop": bench_laptop,
           "muon": bench_muon}
QUICK = ("ladders", "loader", "start", "processes")  # minutes, without a vocabulary or a file from elsewhere


def machine(device):
    """What a number belongs to: processor or GPU, versions, commit, date, command."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores"
    versions = {package: version(package) for package in ("torch", "numpy", "transformers", "tiktoken")}
    return {"device": device, "machine": name, "torch": versions["torch"], "python": platform.python_version(),
            "versions": versions, "commit": commit or None, "date": datetime.date.today().isoformat(),
            "command": " ".join(["python lessons/measure_speed.py", *(word.split("/")[-1] for word in sys.argv[1:])])}


def cpu_name():
    """The processor's own name where the system tells it (Linux), else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"which ones of {', '.join(BENCHES)} (default: {', '.join(QUICK)})")
    parser.add_argument("--text", help="a text file for tokenising and laptop (default: the builtin text)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often the ways take turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=ROOT / "lessons" / "measured")
    args = parser.parse_args(argv)
    names = ["ladders" if name == "ladder" else name for name in args.names or QUICK]
    if unknown := set(names) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    own = {"ladders": {"device": args.device}, "processes": {"device": args.device}, "rows": {"device": args.device},
           "tokenising": {"text": args.text, "workers": args.workers},
           "laptop": {"text": args.text}}
    path = args.out / f"speed_{args.device}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        rounds = {} if name == "loader" else {"rounds": args.rounds}
        result = BENCHES[name](**own.get(name, {}), **rounds)
        if name == "ladders":
            kept |= {"ladders": result} | machine(args.device)
            continue
        if name == "muon":  # no matter of speed: the same on any device
            (args.out / "muon.json").write_text(json.dumps(result | machine(args.device), indent=1) + "\n")
            continue
        kept[f"{name} on a text file" if args.text and name in ("laptop", "tokenising") else name] = (
            result | machine(args.device))
        print(name)
        for key, value in result.items():
            print(f"    {key:32} {value}")
    path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
