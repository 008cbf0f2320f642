"""Speed, measured where you are: each benchmark does one thing in several ways, in turn, on the same machine.

    python lessons/measure_speed.py                               # the ladder: minutes
    python lessons/measure_speed.py ladder --device cuda          # the rungs of a training step, on a GPU
    python lessons/measure_speed.py rows                          # the memory that training needs, foretold on a CPU
    python lessons/measure_speed.py rows --device cuda            # the same, measured, with tok/s
    python lessons/measure_speed.py laptop muon                   # what recipes learn, in seconds and in tokens

Other programs slow a machine down from one second to the next. So the ways take turns for several rounds, and
what counts is the median of the ratios, not the seconds. Results are kept in
lessons/measured/speed_<device>.json, with the machine, the versions and the commit that they belong to.
"""
import argparse
import contextlib
import ctypes
import datetime
import io
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "lessons")]

import fineweb    # noqa: E402  (found through the line above)
import train_gpt2  # noqa: E402


def in_turn(ways, rounds):
    """Seconds of each way, {name: [round 1, round 2 ...]}. They go A, B, A, B ... and meet the same disturbances."""
    clock = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            clock[name].append(time.perf_counter() - begin)
    return clock


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
    keep: bool = False      # glibc keeps freed memory for the next step, or gives it back to the system
    chunked: bool = False   # F.linear_cross_entropy, which never holds all logits, or all of them at once
    times: int = 1          # rows, in multiples of the first rung's
    theirs: bool = False    # transformers' GPT-2 in the place of ours


CHANGES = {"TF32": dict(tf32=True), "bfloat16": dict(dtype=torch.bfloat16), "torch.compile": dict(compile=True),
           "fused attention": dict(sdpa=True), "padded vocabulary": dict(padded=True),
           "fused AdamW": dict(fused=True), "memory kept": dict(keep=True), "chunked loss": dict(chunked=True),
           "twice the rows": dict(times=2)}
# What a rung may move the loss by; the others 1e-5. Padding adds 47 ids that nobody says: ln(50304 / 50257) = 0.0009.
TOLERANCE = {"TF32": 1e-3, "bfloat16": 1e-2, "padded vocabulary": 2e-3}
# What people would otherwise use. build-nanogpt's model is GPT-2, as ours is; its loop has fused attention, a padded
# vocabulary, and AdamW that is fused on CUDA only.
OTHERS = {"build-nanogpt, float32": dict(sdpa=True, padded=True),
          "build-nanogpt, bfloat16": dict(sdpa=True, padded=True, dtype=torch.bfloat16),
          "transformers, float32": dict(sdpa=True, theirs=True),
          "transformers, bfloat16": dict(sdpa=True, theirs=True, dtype=torch.bfloat16)}
# block_size, rows, n_layer, n_head, n_embd, and the vocabulary without and with padding
SIZES = {"cpu": {"124M, 4 x 256 tokens": (256, 4, 12, 12, 768, 50257, 50304),
                 "6 layers of 192, 16 x 256 tokens": (256, 16, 6, 6, 192, 1009, 1024)},
         "cuda": {"124M, 16 x 1024 tokens": (1024, 16, 12, 12, 768, 50257, 50304)}}


def missing(rung, device, size):
    """Why a rung can't be measured on a device, or ""."""
    cpu = device.type == "cpu"
    if rung.tf32 and cpu:
        return "TF32 is in NVIDIA's GPUs"
    if rung.dtype == torch.bfloat16 and cpu and train_gpt2.pick_dtype("auto", device) != rung.dtype:
        return "this CPU has no bfloat16 arithmetic; emulated, a step takes several times as long"
    if rung.compile and cpu and (size[2] > 6 or not shutil.which("g++")):
        return "on a CPU compiled at the smaller size only, where it takes a minute and g++"
    if rung.keep and not (cpu and platform.libc_ver()[0] == "glibc"):
        return "only glibc, on a CPU, has this setting"
    if rung.chunked and not hasattr(F, "linear_cross_entropy"):
        return "F.linear_cross_entropy came with PyTorch 2.13"
    return ""


def ladder_of(device, size):
    """[(rung, why it is missing)] from the bottom, the others' ways last. Each rung stands on those below it, where the
    device has them. On a CPU nothing stands on torch.compile, which takes longer than a short run can save, nor on
    the chunked loss, which takes a step of 124M twice as long there."""
    below = Rung()
    rungs = [(below, "")]
    for name, change in CHANGES.items():
        rung = replace(below, name=name, **change)
        why = missing(rung, device, size)
        rungs.append((rung, why))
        left_out = device.type == "cpu" and (rung.compile or rung.chunked)
        below = below if why or left_out else rung
    cuda = device.type == "cuda"
    ours = Rung("ours, by default", dtype=train_gpt2.pick_dtype("auto", device), sdpa=True, padded=True, fused=True,
                compile=cuda, tf32=cuda)
    others = [Rung(name, compile=cuda, fused=cuda, **change) for name, change in OTHERS.items()]
    return rungs + [(rung, missing(rung, device, size)) for rung in [*others, ours]]


def keep_memory(keep):
    """Whether glibc keeps the memory that a step frees. Otherwise large blocks go back to the system, which hands them
    out again in the next step, page by page and filled with zeros."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0 if keep else 65536)           # M_MMAP_MAX: blocks that come from the system directly
        libc.mallopt(-1, 2 ** 31 - 1 if keep else 131072)  # M_TRIM_THRESHOLD: free bytes that go back to it


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
    """A model, its optimizer and a batch; step() is one update as a rung has it, first_loss() what it starts from."""

    def __init__(self, rung, size, models, device):
        T, rows, *_, unpadded, _ = size
        self.rung, self.device, self.model = rung, device, models[rung.theirs, rung.padded]
        self.optimizer = models.setdefault((self.model, rung.fused), torch.optim.AdamW(
            self.model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=rung.fused))
        ids = torch.randint(unpadded, (rows, T + 1), generator=torch.Generator().manual_seed(1))
        self.x, self.y = (part.repeat(rung.times, 1).to(device) for part in (ids[:, :-1], ids[:, 1:]))
        self.compute = compiled(self.loss) if rung.compile else self.loss

    def loss(self, x, y):
        if self.rung.theirs:
            return F.cross_entropy(self.model(x).logits.flatten(0, 1), y.flatten())
        if not self.rung.chunked:
            return self.model(x, y)[1]
        # autocast doesn't know this function: without the two casts its products would be float32's
        x, w = (part.to(self.rung.dtype) for part in (self.model.hidden(x).flatten(0, 1), self.model.lm_head.weight))
        return F.linear_cross_entropy(x, w, y.flatten(), options=torch.nn.LinearCrossEntropyOptions()).float()

    @contextlib.contextmanager
    def conditions(self):
        torch.set_float32_matmul_precision("high" if self.rung.tf32 else "highest")
        keep_memory(self.rung.keep)
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


def compiled(function, **how):
    """torch.compile with room for all our graphs: PyTorch counts those of a function over all models of a process, and
    from the ninth on it runs eagerly without a word."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, **how)


def climb(size, device, rounds=3):
    """One ladder -> its rows {rung, ms, tok_s, times_faster, memory_mb, mfu, loss, loss_difference, note}, and ratios.

    ms is the median of the rounds, times_faster the median of their ratios to the first rung. memory_mb is the
    peak of a step beyond weights and moments, on CUDA. mfu counts 6N + 12LHQT operations a token, against the
    GPU's data sheet, or against the matrix products that this CPU does in its best dtype, measured beside.
    """
    models, rows, steppers = same_models(size, device), [], {}
    for rung, why in ladder_of(device, size):
        rows.append({"rung": rung.name, "note": why})
        if not why:
            steppers[rung.name] = Stepper(rung, size, models, device)
            rows[-1]["loss"] = steppers[rung.name].first_loss()
    for row in rows:  # all first losses are of the same weights: only now does anyone move them
        if row["rung"] in steppers:
            row["loss_difference"] = row["loss"] - rows[0]["loss"]
            row["memory_mb"] = peak_of(steppers[row["rung"]], device)
    clock = in_turn({name: stepper.step for name, stepper in steppers.items()}, rounds)
    keep_memory(False)
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
    faster = {name: median_ratio(clock[name], clock["ours, by default"]) for name in OTHERS if name in clock}
    return rows, {"than build-nanogpt in float32": faster["build-nanogpt, float32"],
                  "than the best of the others": min(faster.values())}


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
        return train_gpt2.PEAK_FLOPS.get(torch.cuda.get_device_name(device), float("nan"))
    dtype = train_gpt2.pick_dtype("auto", device)
    a, b = torch.randn(1024, 768, dtype=dtype), torch.randn(768, 3072, dtype=dtype)
    seconds = in_turn({"mm": lambda: [a @ b for _ in range(10)]}, 5)
    return 10 * 2 * a.numel() * b.size(1) / min(seconds["mm"])


def bench_ladder(device="cpu", rounds=3):
    """The ladder at each size that suits the device."""
    device, ladders = torch.device(device), []
    print(machine(device.type)["machine"])
    for name, size in SIZES[device.type].items():
        rows, ratios = climb(size, device, rounds)
        ladders.append({"name": name, "rows": rows, "ours is faster": ratios})
        print(f"\n{name:26}{'ms':>10}{'tok/s':>10}{'times':>8}{'MB':>8}{'MFU':>7}{'loss':>10}{'difference':>13}")
        for row in rows:
            if row["note"]:
                print(f"{row['rung']:26}   {row['note']}")
            else:
                print(f"{row['rung']:26}{row['ms']:10.1f}{row['tok_s']:10.0f}{row['times_faster']:8.2f}"
                      f"{row['memory_mb'] or '':>8}{row['mfu']:7.1%}{row['loss']:10.4f}{row['loss_difference']:+13.6f}")
        print("ours, by default, is faster: " + ", ".join(f"{times} times {than}" for than, times in ratios.items()))
    return ladders


def draw_ladder(kept, path):
    """speed_<device>.json as a picture: tokens a second of every rung, at each size."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(kept["ladders"]), figsize=(10, 4.6), dpi=100, squeeze=False)
    for axis, ladder in zip(axes[0], kept["ladders"]):
        rows = [row for row in ladder["rows"] if not row["note"]][::-1]
        colors = ["#c44e52" if row["rung"] == "ours, by default" else "#bbbbbb" if row["rung"] in OTHERS else "#4c72b0"
                  for row in rows]
        bars = axis.barh([row["rung"] for row in rows], [row["tok_s"] for row in rows], color=colors)
        axis.bar_label(bars, [f"{row['tok_s']:,.0f}" for row in rows], padding=3, fontsize=9)
        axis.set(title=ladder["name"], xlabel="tokens a second")
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"How fast is a training step? {kept['machine']}, {kept['date']}")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------
# rows: how much memory a step needs

GPUS, ROWS = (8, 12, 16, 24, 40, 48, 80, 141), (1, 2, 4, 8, 16, 32, 64)  # GB of memory that GPUs have; rows to try


def kept_by_forward(shape, rows, compile=True):
    """Bytes that the forward pass keeps for the backward one, computed on tensors without content.

    Compiled, AOTAutograd's partition of the graph decides it; eagerly, each operation. Both with autocast to bfloat16.
    Parameters are not counted, their bfloat16 copies are.
    """
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    found = {}  # by storage: views share one

    def note(tensor):
        found[tensor.untyped_storage()._cdata] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    def look(graph, inputs):
        nodes = [n for n in graph.graph.output_node().args[0] if n is not None and n.op != "placeholder"]
        [note(n.meta["val"]) for n in nodes if isinstance(n.meta["val"], torch.Tensor)]
        return graph

    with FakeTensorMode():
        model, x = train_gpt2.GPT(shape), torch.zeros(rows, shape.block_size, dtype=torch.int64)
        names, params = zip(*model.named_parameters())

        def loss(x, *params):
            with torch.autocast("cpu", torch.bfloat16):
                return torch.func.functional_call(model, dict(zip(names, params)), (x, x))[1]

        if compile:
            aot_function(loss, look, lambda graph, _: graph, decompositions=select_decomp_table(),
                         partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"))(x, *params)
        else:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss(x, *params)
            for p in params:
                found.pop(p.untyped_storage()._cdata, None)
    return sum(size for _, size in found.values())


def foretell(shape, rows=ROWS, compile=True):
    """GB that training needs -> {rows: GB}: 16 bytes a parameter (weight, gradient, two moments), what the forward
    keeps, and the gradient of the logits, 2 bytes each (eagerly two copies in float32).

    What is kept grows with layers and with rows along straight lines, so four small cases give all others.
    """
    part = {(n, r): kept_by_forward(replace(shape, n_layer=n), r, compile) for n in (1, 2) for r in (1, 2)}
    each_layer = {r: part[2, r] - part[1, r] for r in (1, 2)}
    parameters = sum(p.numel() for p in train_gpt2.GPT(replace(shape, n_layer=1)).parameters())
    parameters += (shape.n_layer - 1) * (12 * shape.n_embd ** 2 + 13 * shape.n_embd)
    one, two = (part[1, r] + (shape.n_layer - 1) * each_layer[r] for r in (1, 2))
    logits = shape.block_size * shape.vocab_size * (2 if compile else 8)
    return {r: (16 * parameters + one + (r - 1) * (two - one) + r * logits) / 1e9 for r in rows}


def bench_rows(device="cuda", rounds=3, presets=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")):
    """Rows a micro-batch and memory of a step of AdamW, for each size of GPT-2: the table to choose --micro_batch_size
    from. On a GPU measured, with tok/s, until memory runs out; on a CPU foretold, with the smallest GPU it fits.

    Published eager runs of the 124M model: 64 rows fitted 80 GB (here 63.9), 32 rows did not fit 40 GB (33.1), 4 rows
    took about 9 GB (6.1). So a GPU has to have a fifth more than what is foretold, and 3 GB more if that is little.
    """
    table, device = [], torch.device(device)
    for preset in presets:
        cfg = train_gpt2.TrainConfig(**train_gpt2.PRESETS[preset])
        shape = train_gpt2.GPTConfig(cfg.block_size, 50304, cfg.n_layer, cfg.n_head, cfg.n_embd)
        if device.type == "cpu":
            eager = foretell(shape, compile=False)
            for rows, gb in foretell(shape).items():
                fits = next((gpu for gpu in GPUS if gb < min(0.8 * gpu, gpu - 3)), None)
                table.append({"preset": preset, "rows": rows, "computed_gb": round(gb, 1), "fits_gb": fits,
                              "eager_gb": round(eager[rows], 1)})
                print("    {preset:12} {rows:3} rows: {computed_gb:6.1f} GB, fits {fits_gb}; eager {eager_gb:6.1f} GB"
                      .format(**table[-1]))
            continue
        model = train_gpt2.GPT(shape).to(device)
        optimizers = train_gpt2.configure_optimizers(model, cfg, device)
        fast, world = compiled(model), train_gpt2.World(replace(cfg, device=device.type))
        for rows in ROWS:
            x = torch.randint(50257, (1, rows, cfg.block_size), device=device)

            def step():
                train_gpt2.train_step(fast, optimizers, x, x, cfg.max_lr, cfg, world)[0].item()

            try:
                torch.cuda.reset_peak_memory_stats()
                in_turn({"warm up": step}, 3)
                seconds = in_turn({"step": step}, rounds)
            except torch.OutOfMemoryError:
                print(f"    {preset:12} {rows:3} rows: out of memory")
                break
            table.append({"preset": preset, "rows": rows, "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
                          "tok_s": round(x.numel() / statistics.median(seconds["step"]))})
            print("    {preset:12} {rows:3} rows: {memory_gb:6.1f} GB, {tok_s:9,} tok/s".format(**table[-1]))
        del model, fast, optimizers
        torch.cuda.empty_cache()
    return {"table": table}


# ------------------------------------------------------------------------------------------------------------
# learning: what a recipe reaches, in tokens and in seconds

# nanoGPT's recipe for a laptop (its README) in our flags, but for its beta2 of 0.99.
NANOGPT = ["--block_size=64", "--n_layer=4", "--n_head=4", "--n_embd=128", "--total_batch_size=768", "--max_steps=2000",
           "--max_lr=1e-3", "--min_lr=1e-4", "--warmup_steps=100", "--optimizer=adamw"]
QUIET = ["--hellaswag_every=0", "--sample_every=0", "--checkpoint_every=0", "--device=cpu", "--val_tokens=100000"]


def learn(data_dir, *flags):
    """One run of train_gpt2.py -> (val losses by step, nats per byte at the end, seconds in steps)."""
    with tempfile.TemporaryDirectory() as log_dir, contextlib.redirect_stdout(io.StringIO()):
        meta = fineweb.read_meta(data_dir)
        values = train_gpt2.main([f"--data_dir={data_dir}", f"--log_dir={log_dir}", *QUIET, *flags])
        batch = json.loads(Path(log_dir, "config.json").read_text())["total_batch_size"]
    val = [shard for shard in meta["shards"] if shard["split"] == "val"]
    tokens_per_byte = sum(shard["tokens"] for shard in val) / sum(shard["bytes"] for shard in val)
    nats = values["val"][max(values["val"])] * tokens_per_byte
    return values["val"], nats, sum(batch / rate for rate in values["tok/s"].values())


# (name, tokenizer, flags on top of the preset)
RECIPES = [("nanoGPT's recipe", "bytes", NANOGPT),
           ("--preset laptop", "bpe:2048", []),
           ("with a weight decay of 0.1", "bpe:2048", ["--weight_decay=0.1"]),
           ("with AdamW at 2e-3", "bpe:2048", ["--optimizer=adamw", "--max_lr=2e-3", "--min_lr=2e-5"]),
           ("with four layers of 128", "bpe:2048", ["--n_layer=4", "--n_head=4", "--n_embd=128"]),
           ("with a context of 128", "bpe:2048", ["--block_size=128"]),
           ("with 1,024 ids", "bpe:1024", [])]


def bench_laptop(text=None, rounds=1):
    """`--preset laptop` against nanoGPT's recipe and others, on the builtin text or the first 1.1 MB of a file."""
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
                with contextlib.redirect_stdout(io.StringIO()):
                    fineweb.main(["--source", *source, "--tokenizer", tokenizer, "--out", str(data)])
            preset = [] if flags is NANOGPT else ["--preset=laptop"]
            _, nats, seconds = learn(data, *preset, *flags, "--val_every=10000")
            rows.append(dict(recipe=name, tokenizer=tokenizer, flags=" ".join(preset + flags),
                             seconds=round(seconds, 1), nats_per_byte=round(nats, 4)))
            print(f"    {name:42} {nats:.3f} nats per byte in {seconds:.0f} s", flush=True)
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
# running and keeping

BENCHES = {"ladder": bench_ladder, "rows": bench_rows, "laptop": bench_laptop, "muon": bench_muon}


def machine(device):
    """What a number belongs to: processor or GPU, versions, commit, date, command."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {"device": device, "machine": name, "torch": torch.__version__, "python": platform.python_version(),
            "transformers": version("transformers"), "commit": commit or None,
            "date": datetime.date.today().isoformat(),
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
    parser.add_argument("names", nargs="*", help=f"which ones of {', '.join(BENCHES)} (default: ladder)")
    parser.add_argument("--text", help="a text file for laptop (default: the builtin text)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the ways take turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=ROOT / "lessons" / "measured")
    args = parser.parse_args(argv)
    names = args.names or ["ladder"]
    if unknown := set(names) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    own = {"ladder": dict(device=args.device), "rows": dict(device=args.device), "laptop": dict(text=args.text)}
    path = args.out / f"speed_{args.device}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        result = BENCHES[name](**own.get(name, {}), rounds=args.rounds)
        if name == "ladder":
            kept |= {"ladders": result} | machine(args.device)
            draw_ladder(kept, args.out / "ladder.png")
        elif name == "muon":  # not a matter of speed: the same on any device
            (args.out / "muon.json").write_text(json.dumps(result | machine(args.device), indent=1) + "\n")
        else:
            kept[f"{name} on a text file" if args.text else name] = result | machine(args.device)
    path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
