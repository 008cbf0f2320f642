"""What several test files build with: a tiny GPT-2, worlds without processes, shards made by hand."""
import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from train_gpt2 import GPT, GPTConfig, TrainConfig

# No two sizes are alike, and none is 1 or 2: a swapped pair of axes or a forgotten one cannot go unseen.
TINY = dict(block_size=11, vocab_size=37, n_layer=3, n_head=4, n_embd=24)


def tiny_model(seed=0, noise=0.2, **changes):
    """A small GPT with every parameter shaken: biases at 0 and gains at 1 would hide how they are used."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    return shake(model, noise)


@torch.no_grad()
def shake(model, noise=0.2, seed=1):
    """Add N(0, noise) to every parameter, tied ones once."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p += noise * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def gap(a, b):
    return (a - b).abs().max().item()


def hf_twin(model, **changes):
    """GPT2LMHeadModel with our weights. What to transpose is asked of its layers, not of our names."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D
    c = model.config
    config = dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
                  n_embd=c.n_embd, bos_token_id=None, eos_token_id=None)
    twin = GPT2LMHeadModel(GPT2Config(**{**config, **changes})).eval()
    conv1d = {f"{name}.weight" for name, layer in twin.named_modules() if isinstance(layer, Conv1D)}
    state = {name: w.t() if name in conv1d else w for name, w in model.state_dict().items()}
    twin.to(model.lm_head.weight.dtype).load_state_dict(state, strict=True)
    return twin


def tiny_config(**changes):
    """A TrainConfig of the tiny model's shape."""
    return TrainConfig(**{**TINY, "total_batch_size": 11 * 12, "warmup_steps": 0, **changes})


def random_ids(*shape, seed=2, n=TINY["vocab_size"]):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


class FakeWorld:
    """What train_gpt2.World answers to, for one process on a CPU; it remembers what was asked of it."""

    def __init__(self, rank=0, size=1, scaler=None):
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self.dtype, self.distributed, self.gpu = torch.float32, False, ""
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.held = False    # inside no_sync?
        self.printed = []

    @contextlib.contextmanager
    def no_sync(self, model):
        self.held = True
        yield
        self.held = False

    def autocast(self):
        return contextlib.nullcontext()

    def sum(self, tensor):
        return tensor

    def any(self, flag):
        return bool(flag)

    def first(self, do):
        do()

    def print(self, *args):
        self.printed.append(" ".join(map(str, args)))


def run_worlds(size, do, model):
    """do(world, a copy of the model) on `size` threads that play the processes; world.sum adds over them."""
    shelf, barrier = [None] * size, threading.Barrier(size, timeout=60)

    def one(rank):
        world = FakeWorld(rank, size)

        def all_reduce(tensor):
            shelf[rank] = tensor
            barrier.wait()
            total = sum(shelf[1:], shelf[0].clone())
            barrier.wait()
            return total

        world.sum = all_reduce
        return do(world, copy.deepcopy(model))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


class Letters:
    """A tokenizer of 26 letters, a space and the end of text; the ids above only pad the vocabulary."""

    eot_token = 27

    def encode_ordinary(self, text):
        return [" abcdefghijklmnopqrstuvwxyz".index(c) for c in text]

    def decode(self, ids):
        return "".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in ids)


def write_shards(folder, shards, split="train", suffix=".npy", name="text"):
    """Lists of ids -> shards, numbered in this order, in either of the two layouts."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, ids in enumerate(shards):
        ids = np.asarray(ids, dtype=np.uint16)
        file = folder / f"{name}_{split}_{i:06d}{suffix}"
        if suffix == ".npy":
            np.save(file, ids)
        else:  # llm.c: 256 int32, of which the first three mean something, then the ids
            header = np.zeros(256, dtype=np.int32)
            header[:3] = 20240520, 1, len(ids)
            file.write_bytes(header.tobytes() + ids.tobytes())
    return folder
