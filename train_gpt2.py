"""
GPT-2 (124M), reproduced: the model and its training in one file that is meant to be read.

    python train_gpt2.py --preset laptop     no GPU, no data, no network: trains in two minutes on two CPU cores
    python train_gpt2.py                     the paper run: 124M on FineWeb-Edu, from shards made by fineweb.py
    torchrun --standalone --nproc_per_node=8 train_gpt2.py       the same text in the same order, on 8 GPUs
    python train_gpt2.py --resume            continue the run in --log_dir
    python train_gpt2.py eval   --init gpt2  val loss and HellaSwag of OpenAI's weights, or of a checkpoint
    python train_gpt2.py sample --init log "Hello, I'm a language model,"
    python train_gpt2.py export --init log --out my-gpt2         a folder that Hugging Face's transformers reads

A map. Sections 1 to 8 are GPT-2 and how it is trained. They end at a line. Below it stands what a run needs on real
machines: several GPUs, interruptions, the command line. Skip that on a first reading.
    1  the model       attention, MLP, block, GPT, and generate: a hundred lines of code are the whole network
    2  weights         OpenAI's parameters in, ours out in Hugging Face's layout
    3  data            shards -> windows -> one order, the same for any number of GPUs
    4  optimizer       which parameters get weight decay, AdamW, Muon, and the learning rate over time
    5  settings        every setting of a run, in which unit and why, and the presets
    6  one step        accumulate, average over processes, clip, update
    7  evaluation      a val loss that counts tokens, and samples
    8  the run         build everything, then one loop: what is logged, saved and evaluated, and when
    9  processes       one GPU or many, which number format, how many rows fit into memory
    10 log, checkpoints    what is written, and how a killed run continues
    11 command line    how flags are read, where models come from, and the actions eval, sample, export

Letters for the sizes of tensors, used everywhere below, with their values in GPT-2 (124M):
    B  rows in a micro-batch, each a separate text       T  tokens in a row, at most block_size = 1024
    C  channels, n_embd = 768                            V  vocabulary, 50257 (padded to 50304 in training)
    nh attention heads, 12                               hs width of a head, C / nh = 64
    A  micro-batches accumulated into one step           W  processes, one per GPU

The model is that of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3, and its
training that of Brown et al., "Language Models are Few-Shot Learners" (2020), appendix B, called "GPT-3" below.
"""
import argparse
import contextlib
import functools
import io
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fineweb
import hellaswag
from fineweb import UserError, insist, load_tokenizer, open_shards, read_json, read_meta, write_file

# ----------------------------------------------------------------------------------------------- 1. the model
# Ids in, logits out: a score for every id of the vocabulary. Each id is looked up as a vector of C numbers: what it
# means, plus where it stands. Then, twelve times over, each position looks at itself and those before it, and processes
# what it saw. What it finds in both is added to its vector, which is called the residual stream. At the end that is
# compared with the vector of every id: the better the two match, the higher the score of that id as the next one.

@dataclass
class GPTConfig:
    """The shape of the network. The defaults are the 124M model that OpenAI released as "gpt2"."""
    block_size: int = 1024   # tokens: the longest context; GPT-2 learns a vector for each of these positions
    vocab_size: int = 50257  # ids: 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12        # blocks
    n_head: int = 12         # heads in a block; all four sizes of GPT-2 have 64 channels per head
    n_embd: int = 768        # channels of the residual stream


class CausalSelfAttention(nn.Module):
    """Tokens exchange information: each takes a weighted average of what it and the tokens before it offer."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "n_embd must be a multiple of n_head"
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x):
        B, T, C = x.size()
        # Every token asks a question (q), advertises what it holds (k) and offers it (v). One product makes all
        # heads, then they are cut apart: C = nh * hs channels become nh separate conversations, each hs wide.
        q, k, v = self.c_attn(x).split(C, dim=2)                         # (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        # Attention, written out (a test runs these four lines and compares):
        #     att = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))            # (B, nh, T, T)
        #     att = att.masked_fill(torch.ones(T, T).tril() == 0, -math.inf)   # no token sees a later one
        #     att = F.softmax(att, dim=-1)                                     # each row sums to 1
        #     y = att @ v                                                      # (B, nh, T, hs)
        # With entries of variance 1, a sum of hs products has variance hs, and softmax would give nearly all weight to
        # one token: hence the square root. The four lines store T x T weights per head, 50 MB per layer and row in
        # float32 at T = 1024. The fused kernel ("flash attention", Dao et al. 2022) never stores them.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)      # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)                           # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Each token is processed alone: to four times the width, through a nonlinearity, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # GELU is a ReLU with a smooth bend. OpenAI's weights were trained with its tanh form. The exact form changes
        # the logits too little to notice, and enough to fail a comparison.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))                                      # (B, T, 4*C)
        return self.c_proj(x)


class Block(nn.Module):
    """Communicate, then compute. Both only ADD to x, so a straight path leads from the last block to the embedding."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        # A LayerNorm brings each vector to mean 0 and variance 1, then scales and shifts its channels as learned. The
        # first Transformer normalized the sum, and so the path itself. GPT-2 normalizes what goes into each part.
        x = x + self.attn(self.ln_1(x))                                  # (B, T, C)
        x = x + self.mlp(self.ln_2(x))                                   # (B, T, C)
        return x


class GPT(nn.Module):
    """GPT-2, with its parameters under Hugging Face's names: transformer.wte, transformer.h.0.attn.c_attn ..."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # what a token means
            wpe=nn.Embedding(config.block_size, config.n_embd),  # where it stands
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix reads and writes: what is alike as input is alike as output. It saves 38.6M of 163M parameters.
        self.lm_head.weight = self.transformer.wte.weight
        # A run pads the vocabulary to a multiple of 128, a size that GPUs are fast with, and sets n_vocab to the number
        # of ids that its tokenizer knows: generate draws only those.
        self.n_vocab = config.vocab_size
        self.eot = self.n_vocab - 1  # the id of <|endoftext|>, which stands in front of every document
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices are drawn with a standard deviation of 0.02 or less, biases begin at 0, LayerNorms' weights at 1.
        (OpenAI's code draws wpe with 0.01. We keep to 0.02, as Hugging Face and most reproductions do.)"""
        for name, p in self.named_parameters():  # the tied matrix comes once, as wte.weight
            if name.endswith("c_proj.weight"):
                # 2 * n_layer of these add up, and the spread of a sum of n terms grows like sqrt(n). Divided by that,
                # the stream ends about as large in a deep model as in a shallow one (GPT-2, section 2.3).
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    def hidden(self, idx):
        """Ids (B, T), T at most block_size -> the residual stream after the last norm, (B, T, C)."""
        B, T = idx.size()
        assert T <= self.config.block_size, f"{T} tokens in a row, but block_size is {self.config.block_size}"
        pos = torch.arange(T, device=idx.device)                         # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)        # (B, T, C)
        for block in self.transformer.h:
            x = block(x)                                                 # (B, T, C)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Ids (B, T), and the ids that really followed, (B, T) -> logits (B, T, V), and the mean loss in nats or None.
        A target of -100 is left out of the mean. Add a further loss here, under `if self.training`."""
        logits = self.lm_head(self.hidden(idx))                          # (B, T, V)
        if targets is None:
            return logits, None
        # The logits at position t predict token t + 1, so each row is T examples at once. Fresh weights have a loss of
        # about ln V + s^2/2, with s = 0.02 sqrt(C) the logits' standard deviation: 10.98 for 124M, not ln V = 10.82.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # ()
        # Detached, or a compiled backward pass would add a (B, T, V) tensor of zeros for them: gigabytes.
        return logits.detach(), loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, stop=None):
        """Continue each row of idx (B, T) by up to max_new_tokens ids -> (B, T + new). Each takes a forward pass.
        temperature  1 draws as the model says, less is tamer, 0 always takes the most probable id
        top_k        draw among the k most probable ids only
        generator    a torch.Generator on the model's device, which makes the draws repeatable
        stop         an id (<|endoftext|>) that ends a row; it then fills the row until all rows have ended"""
        done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)  # (B, 1)
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size:]  # wpe has no row for later positions
            x = self.hidden(context)[:, -1]                              # (B, C)
            logits = self.lm_head(x)[:, :self.n_vocab].float()           # (B, n_vocab)
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)                # (B, 1)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, self.n_vocab)).values[:, -1:]   # (B, 1)
                    logits = logits.masked_fill(logits < kth, -math.inf)         # (B, n_vocab)
                probs = F.softmax(logits / temperature, dim=-1)          # (B, n_vocab)
                new = torch.multinomial(probs, 1, generator=generator)   # (B, 1)
            if stop is not None:
                new = new.masked_fill(done, stop)                        # (B, 1)
                done = done | (new == stop)                              # (B, 1)
            idx = torch.cat([idx, new], dim=1)
            if done.all():
                break
        return idx

    def num_params(self):
        """How many numbers are learned, the tied matrix counted once: 124,439,808 for the smallest GPT-2."""
        return sum(p.numel() for p in self.parameters())

    # ----------------------------------------------------------------------------------- 2. OpenAI's weights
    # OpenAI's parameters fit into the classes above, name by name, and give the same logits as Hugging Face's
    # implementation. The way back lets all tools for Hugging Face models use what we train.

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """The model of a name on the Hugging Face hub ("gpt2", "gpt2-xl", "OWNER/NAME") or of a local folder.
        Only config.json and *.safetensors are read: neither can hold code. UserError if they don't hold a GPT-2."""
        from transformers import GPT2Config, GPT2LMHeadModel, logging
        logging.set_verbosity_error()  # what is wrong with a folder is said below, in one line
        folder = fetch_pretrained(name_or_folder)
        try:
            c = GPT2Config.from_pretrained(folder)
            wrong = [f"{key} is {getattr(c, key)!r}" for key, value in HF_CONFIG.items() if getattr(c, key) != value]
            insist(not wrong, ", ".join(wrong))
            hf, report = GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32,
                                                         output_loading_info=True)
            # Older files also hold the causal mask, as attn.bias. The dot keeps c_attn.bias, a parameter, in view.
            wrong = sorted(f"{name} missing or unknown" for names in report.values() for name in names
                           if not name.endswith((".attn.bias", ".attn.masked_bias")))
            insist(not wrong, ", ".join(wrong[:3]))
            insist(torch.equal(hf.lm_head.weight, hf.transformer.wte.weight), "lm_head and wte differ")
        except Exception as error:  # no such file, a damaged one, a wrong shape: each library has its own class
            raise UserError(f"{folder} holds no checkpoint (ckpt_*.pt), and no GPT-2 as OpenAI released it, in Hugging "
                            f"Face's layout with safetensors ({fineweb.one_line(error)})") from error
        model = cls(GPTConfig(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                              n_embd=c.n_embd))
        # OpenAI computed x @ W, nn.Linear computes x @ W.T: four kinds of matrices arrive transposed. Three would crash
        # if we forgot. attn.c_proj, which is square, would load silently: so the tests compare logits, not shapes.
        model.load_state_dict({name: p.t() if name.endswith(CONV1D) else p for name, p in hf.state_dict().items()})
        if c.eos_token_id is not None and c.eos_token_id < c.vocab_size:
            model.eot = c.eos_token_id
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, as GPT2LMHeadModel.from_pretrained(folder) or ours reads them.
        The inverse of from_pretrained, except that the rows of wte that only pad the vocabulary are dropped."""
        from transformers import GPT2Config, GPT2LMHeadModel
        c = self.config
        hf = GPT2LMHeadModel(GPT2Config(
            **HF_CONFIG, vocab_size=self.n_vocab, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
            n_embd=c.n_embd, bos_token_id=self.eot, eos_token_id=self.eot, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
        weights = {name: p[:self.n_vocab] if name.endswith(("wte.weight", "lm_head.weight")) else
                   p.t() if name.endswith(CONV1D) else p for name, p in self.state_dict().items()}
        assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]), "an untied head"
        hf.load_state_dict(weights)
        hf.save_pretrained(folder)


# What config.json says of every GPT-2, besides its sizes.
HF_CONFIG = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None,
                 scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
                 tie_word_embeddings=True)
# The four matrices of a block that GPT-2's checkpoint stores as (inputs, outputs).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# ---------------------------------------------------------------------------------------------------- 3. data
# fineweb.py leaves one long row of ids, cut into files ("shards"). We cut it further, into windows of block_size
# inputs, and number them. What a step reads is then a list of numbers. For one text and one batch size, that list
# depends on the seed and the step alone: not on the number of GPUs, the micro-batch size, or interruptions.

class Corpus:
    """One split, "train" or "val", of a folder of shards. A window is block_size inputs plus one id, the last target.
    UserError if there are no shards, one is damaged, all are too short, or an id is not below vocab_size."""

    def __init__(self, data_dir, split, block_size, vocab_size):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.files, self.shards = zip(*open_shards(data_dir, split))  # the ids stay on disk until they are read
        self.n_tokens = sum(len(ids) for ids in self.shards)
        # The last target of a window is the first input of the next, so every id is an input at most once.
        counts = [max(0, len(ids) - 1) // block_size for ids in self.shards]
        self.first = np.cumsum([0, *counts])  # number of the first window of each shard
        self.n_windows = int(self.first[-1])
        insist(self.n_windows, f"the {split} split of {data_dir} is shorter than --block_size {block_size}: add text")
        for number, count in zip(self.first, counts):  # a wrong vocabulary mostly shows now, not after an hour
            self.windows(range(number, number + min(count, 16)))

    def windows(self, numbers):
        """Numbers of n windows -> their ids, (n, T+1) int64 on the CPU."""
        n, T, V = len(numbers), self.block_size, self.vocab_size
        tokens = np.empty((n, T + 1), dtype=np.int64)                    # (n, T+1)
        for row, number in zip(tokens, numbers):
            shard = np.searchsorted(self.first, number, side="right") - 1
            start = (number - self.first[shard]) * T
            row[:] = self.shards[shard][start:start + T + 1]
            insist(row.max() < V, f"{self.files[shard]} holds the id {row.max()}, --vocab_size is {V}: use other data")
        return torch.from_numpy(tokens)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order in which an epoch visits n windows: the same on every process, a new one each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def rows_of_step(step, n_windows, rows, cfg):
    """The numbers of the windows that make up a step, (rows,): the same on every process. A step never spans two
    epochs: what is left at the end of one, less than a step, is not read in that epoch.
    >>> rows_of_step(1, 10, 4, TrainConfig(shuffle=False)), rows_of_step(2, 10, 4, TrainConfig(shuffle=False))
    (array([4, 5, 6, 7]), array([0, 1, 2, 3]))
    """
    epoch, at = divmod(step, n_windows // rows)
    if not cfg.shuffle:
        return np.arange(at * rows, (at + 1) * rows)
    return permutation(n_windows, cfg.seed, epoch)[at * rows:(at + 1) * rows]  # (rows,)


class DataLoaderLite:
    """Gives each process its share of a step, and reads the next step in a thread while this one trains."""

    def __init__(self, corpus, micro_batch_size, cfg, world):
        size, part = cfg.total_batch_size, cfg.block_size * micro_batch_size * world.size
        insist(size % part == 0, f"--total_batch_size {size} is not a multiple of {part}, the product of block_size, "
               f"micro_batch_size and processes: use {max(1, round(size / part)) * part}")
        insist(size <= corpus.n_windows * cfg.block_size, f"{corpus.n_tokens} train tokens, less than a step: add text")
        self.corpus, self.B, self.cfg, self.world = corpus, micro_batch_size, cfg, world
        self.thread, self.ahead = ThreadPoolExecutor(1), {}

    def read(self, step):
        """This process's share of a step: ids (A, B, T+1) on the CPU."""
        B, T, W = self.B, self.cfg.block_size, self.world.size
        numbers = rows_of_step(step, self.corpus.n_windows, self.cfg.total_batch_size // T, self.cfg)  # (A*W*B,)
        # Micro-batch i of process r takes B rows from (i*W + r)*B on: whatever W and B are, all together take the same.
        mine = numbers.reshape(-1, W, B)[:, self.world.rank]             # (A, B)
        tokens = self.corpus.windows(mine.flatten()).view(-1, B, T + 1)  # (A, B, T+1)
        return tokens.pin_memory() if self.world.device.type == "cuda" else tokens

    def batch(self, step):
        """Inputs and targets of a step on the device, (A, B, T) each: targets are the inputs, shifted by one."""
        tokens = (self.ahead.pop(step, None) or self.thread.submit(self.read, step)).result()   # (A, B, T+1)
        tokens = tokens.to(self.world.device, non_blocking=tokens.is_pinned())  # (A, B, T+1)
        if step + 1 < self.cfg.max_steps:
            self.ahead = {step + 1: self.thread.submit(self.read, step + 1)}
        x = tokens[:, :, :-1].contiguous()                               # (A, B, T)
        y = tokens[:, :, 1:].contiguous()                                # (A, B, T)
        return x, y

# ---------------------------------------------------------------------------------- 4. optimizer and schedule
# The recipe that GPT-3's paper gave and GPT-2's left out. AdamW divides each parameter's averaged gradient by the
# root of the average of its squares: a parameter moves by at most about the learning rate per step. These averages are
# noisy at first, hence the warm-up; and the last steps should settle rather than wander, hence the decay to a tenth.

def configure_optimizers(model, cfg, device, dtype=torch.float32):
    """The optimizers of a model, as a list: [AdamW] or [Muon, AdamW]. train_step sets their learning rate."""
    params = [p for p in model.parameters() if p.requires_grad]
    # Muon is for matrices that lead from channels to channels. Everything else stays with AdamW.
    blocks = set(model.transformer.h.parameters())
    hidden = [p for p in params if p in blocks and p.dim() == 2 and cfg.optimizer == "muon"]
    rest = [p for p in params if p not in set(hidden)]
    # Weight decay shrinks matrices a little each step, so that a weight stays large only where gradients keep it so.
    # Biases and LayerNorms' weights only shift and scale, and shrinking them gains nothing.
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    # beta2 = 0.95 averages squared gradients over about 20 steps. Adam's default, 0.999, averages over 1,000: too
    # slow to react when gradients grow, and large batches are not noisy enough to need it. GPT-3 gives the value.
    optimizers = [torch.optim.AdamW(groups, lr=cfg.max_lr, betas=(0.9, 0.95), eps=1e-8,
                                    fused=device.type in ("cuda", "cpu"))]  # one kernel for all parameters
    if hidden:
        # match_rms_adamw scales Muon's updates to the size of AdamW's, so one learning rate serves both. PyTorch's
        # Muon always multiplies in bfloat16; ours, in float32, is for runs in float32 and float16.
        muon = torch.optim.Muon if dtype == torch.bfloat16 else Muon
        optimizers.insert(0, muon(hidden, lr=cfg.max_lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Muon(torch.optim.Muon):
    """Jordan et al. (2024): all singular values of the momentum become about 1, so no direction is learned much faster
    than another. The same as PyTorch's with the settings above, and with the same state, but computed in float32."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    # Nesterov's idea: the newest gradient counts once more.
                    update = p.grad.lerp(momentum, group["momentum"])    # (R, K)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(orthogonal(update), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(x):
    """A matrix (R, K) -> nearly the orthogonal matrix with the same directions. The singular values that come out lie
    between 0.68 and 1.14, if those that go in, divided by the norm of x, are at least 0.01."""
    if x.size(0) > x.size(1):  # the result is the same, but x x^T is smaller with the shorter side first
        return orthogonal(x.T).T
    x = x / x.norm().clamp(min=1e-7)                                     # (R, K)
    # x x^T x keeps the directions of x and cubes its singular values. So odd polynomials in x change only these, and
    # this one, applied five times, brings each close to 1 (a Newton-Schulz iteration).
    for _ in range(5):
        gram = x @ x.T                                                   # (R, R)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x     # (R, K)
    return x


def get_lr(step, cfg):
    """The learning rate of a step, counted from 0: a line up to max_lr, then half a cosine down to min_lr.
    >>> [round(get_lr(step, TrainConfig()), 12) for step in (0, 714, 715, 19072)]
    [8.39161e-07, 0.0006, 0.0006, 6e-05]
    """
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps  # + 1: with a rate of 0 the first step would be wasted
    if step >= cfg.max_steps - 1:
        return cfg.min_lr
    progress = (step - cfg.warmup_steps) / (cfg.max_steps - 1 - cfg.warmup_steps)  # 0 at the top, 1 at the end
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.max_lr - cfg.min_lr)

# ------------------------------------------------------------------------------------------------ 5. settings
# Every field is a flag, too. Its type is int, float, str, bool or a Literal of words; the comment after it is its help.

@dataclass
class TrainConfig(GPTConfig):
    """A run: the shape of a model, and everything that decides how it is trained. The defaults are the paper run."""
    vocab_size: int = 0      # ids; 0: those of --init's model, else of the data, padded to a multiple of 128
    init: str = "scratch"    # scratch, gpt2 (-medium ...), a Hugging Face folder, a checkpoint, a log folder
    data_dir: str = "data/edu_fineweb10B"  # folder of shards, as fineweb.py writes them
    shuffle: bool = True     # visit the text in a new random order each epoch; 0: in the order of the shards
    seed: int = 1337         # decides the first weights, the order of the text, and the samples
    total_batch_size: int = 524288  # tokens per step, over all processes: 2^19, GPT-3's 0.5M for this size
    micro_batch_size: int | str = "auto"  # rows per forward: memory and speed, not the result; auto: what fits
    max_steps: int = 19073   # updates of the weights: 10e9 tokens / 524,288
    max_lr: float = 6e-4     # learning rate after warm-up, GPT-3's for 125M (table 2.1)
    min_lr: float = 6e-5     # learning rate of the last step: a tenth of max_lr, as in GPT-3
    warmup_steps: int = 715  # steps: GPT-3 warms up over 375M tokens, / 524,288
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: orthogonal updates for the matrices inside blocks
    weight_decay: float = 0.1  # on matrices only, never on biases and LayerNorms
    grad_clip: float = 1.0     # largest norm of the gradient of all parameters; 0: no limit
    # evaluation; "every" is in steps, 0 means never, and what is on is also done after the last step
    val_every: int = 250       # steps between measurements of the val loss
    val_tokens: int = 10485760   # tokens of the val split to score: 20 x 64 x 1024 x 8, as in Karpathy's build-nanogpt
    hellaswag_every: int = 250   # steps between HellaSwag scores; a run shorter than this has none
    sample_every: int = 250    # steps between samples of what the model writes
    prompt: str = "Hello, I'm a language model,"  # how these samples begin
    checkpoint_every: int = 250  # steps between checkpoints: model, optimizer and step, 1.5 GB at 124M
    keep_checkpoints: int = 2  # checkpoints that stay: the newest ones
    log_dir: str = "log"       # folder for log.txt, config.json and the checkpoints
    resume: bool = False       # continue from the newest good checkpoint in log_dir; without one, start
    device: str = "auto"       # cuda, cuda:1, mps or cpu; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; weights stay float32
    compile: Literal["auto", "0", "1"] = "auto"  # fuse the model into few kernels; auto: on CUDA
    wandb: str = ""            # a Weights & Biases project to log to as well


# Learning rates fall as models grow. GPT-3, table 2.1: 6e-4 for 125M, then 3e-4, 2.5e-4 and 2e-4.
PRESETS = {
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, min_lr=3e-5),     # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4, min_lr=2.5e-5),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4, min_lr=2e-5),         # 1558M
    # 124M on children's stories, 3,000 steps. GPT-3's warm-up would be a quarter of such a run.
    "tinystories": dict(data_dir="data/tinystories", max_steps=3000, warmup_steps=100, weight_decay=0.001,
                        hellaswag_every=0, prompt="Once upon a time"),
    # What two CPU cores learn in two minutes, from text that Python itself carries. At this size two wide layers
    # learn more in that time than four narrow ones, and Muon more than AdamW (lesson 09 has the numbers).
    "laptop": dict(data_dir="data/builtin", block_size=64, n_layer=2, n_head=3, n_embd=192, total_batch_size=2048,
                   max_steps=540, optimizer="muon", max_lr=1.6e-2, min_lr=1.6e-4, warmup_steps=25, weight_decay=1.0,
                   val_every=90, hellaswag_every=0, sample_every=180, checkpoint_every=90, prompt="Return the"),
}

# ------------------------------------------------------------------------------------------------ 6. one step
# What half a million tokens store for the backward pass doesn't fit into a GPU. So a step is cut twice: over the
# W processes, and over time, into A micro-batches whose gradients add up. One process with A = 32, or eight with A = 4,
# make the same update from the same text, up to rounding. `world` is this process among all of them (section 9).

def train_step(model, optimizers, x, y, lr, cfg, world):
    """One update from inputs and targets (A, B, T) -> (mean loss of all processes, norm of the gradient unclipped)."""
    A = len(x)
    loss_sum = torch.zeros((), device=world.device)                      # ()
    for i in range(A):
        # DDP averages the gradients over all processes, bucket by bucket, during backward(). Once, for the last
        # micro-batch, is enough. DDP decides in forward() whether the coming backward() averages, so forward() must
        # be inside no_sync too; with backward() alone inside, it would average every time.
        with world.no_sync(model) if i < A - 1 else contextlib.nullcontext():
            with world.autocast():
                loss = model(x[i], y[i])[1]                              # ()
            # backward() ADDS to .grad. After all micro-batches that would be the SUM of their gradients, but one
            # large batch has the MEAN: dividing makes the two equal. Clipping and AdamW both hide it if this is
            # missing, since both mostly ignore the gradient's length.
            loss = loss / A                                              # ()
            world.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    for optimizer in optimizers:
        world.scaler.unscale_(optimizer)  # float16 gradients were scaled up: clip what they really are
        for group in optimizer.param_groups:
            group["lr"] = lr
    # One unusual batch must not throw the model off. If the gradient, taken as one long vector, is longer than
    # grad_clip, it is shortened to that. It keeps its direction, which clipping each entry would change.
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)  # ()
    for optimizer in optimizers:
        if norm.isfinite():  # else none of them steps: in float16 that is normal, and the scaler then scales by less
            optimizer.step()
        # Zeros rather than None: the gradients stay where DDP keeps its buckets, and are not stored twice.
        optimizer.zero_grad(set_to_none=False)
    world.scaler.update()
    return world.sum(loss_sum) / world.size, norm

# ---------------------------------------------------------------------------------------------- 7. evaluation
# Two ways to look at a model: its loss on text that it never trains on, and what it writes. hellaswag.py is a third.

def evaluate_loss(model, corpus, B, cfg, world):
    """Mean loss in nats over the first val_tokens of a corpus -> (loss, tokens scored), the same on every process.
    Counted in tokens, since 20 batches are different text on 8 GPUs than on one. Losses and counts are summed over
    processes and divided once; a mean of means would give a short batch too much weight."""
    n, T = min(max(1, cfg.val_tokens // cfg.block_size), corpus.n_windows), cfg.block_size
    losses, count = [torch.zeros((), device=world.device)], 0
    with hellaswag.evaluating(model):
        for start in range(world.rank * B, n, world.size * B):
            tokens = corpus.windows(range(start, min(start + B, n)))
            # A short last batch is filled up with -100, which isn't a target: another shape would be compiled anew.
            tokens = F.pad(tokens, (0, 0, 0, B - len(tokens)), value=-100)   # (B, T+1)
            x = tokens[:, :-1].clamp(min=0).to(world.device)             # (B, T)
            y = tokens[:, 1:].to(world.device)                           # (B, T)
            with world.autocast():
                loss = model(x, y)[1]                                    # ()
            scored = min(B, n - start) * T
            count += scored
            losses.append(loss * scored)  # stays on the device: reading it would wait for it
    total = torch.stack(losses).cpu().double().sum()  # .cpu() first: Macs have no float64 on the GPU
    loss, count = world.sum(torch.stack([total, torch.tensor(count).double()])).tolist()
    return loss / count, int(count)


def continue_text(model, tokenizer, text, rows, new_tokens, seed, temperature=1.0, top_k=50, **how):
    """`rows` continuations of a text, as texts; an empty text starts a new document. how: what else generate takes."""
    prompt = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]
    device = model.transformer.wte.weight.device
    idx = torch.tensor([prompt] * rows, device=device)                   # (rows, T)
    generator = torch.Generator(device).manual_seed(seed)
    with hellaswag.evaluating(model):
        idx = model.generate(idx, new_tokens, temperature, top_k, generator, stop=tokenizer.eot_token, **how)
    texts, eot = [], tokenizer.eot_token
    for row in idx.tolist():  # <|endoftext|> is dropped in front, and ends the text after that
        end = [*row, eot].index(eot, 1)
        texts.append(tokenizer.decode(row[row[0] == eot:end]))
    return texts

# ------------------------------------------------------------------------------------------------- 8. the run

def train(cfg):
    """The action `train`: one run, from what cfg says -> its log, {stream: {step: value}}."""
    # ---- build. What is wrong with the input shows here, before it has cost anything.
    world = World(cfg)
    meta, tokenizer, questions = open_data(cfg, world, quiz=0 < cfg.hellaswag_every <= cfg.max_steps)
    train_data = Corpus(cfg.data_dir, "train", cfg.block_size, cfg.vocab_size)
    val_data = Corpus(cfg.data_dir, "val", cfg.block_size, cfg.vocab_size)
    meta["train_tokens"] = train_data.n_tokens
    torch.manual_seed(cfg.seed)  # the same weights on every process
    raw_model = GPT(cfg).to(world.device)
    raw_model.n_vocab, raw_model.eot = meta["vocab_size"], meta["eot"]
    optimizers = configure_optimizers(raw_model, cfg, world.device, world.dtype)
    start = restore(raw_model, optimizers, meta, tokenizer, cfg, world)  # what --resume and --init say
    loader = DataLoaderLite(train_data, 1 if cfg.micro_batch_size == "auto" else cfg.micro_batch_size, cfg, world)
    # Two names for one set of parameters. `model` is compiled and averages gradients over processes. It needs one shape
    # and all processes at once: training and val loss have both. HellaSwag, samples and checkpoints use `raw_model`,
    # which takes any shape and can be used by one process alone.
    model = world.wrap(raw_model)
    loader.B = B = fit_micro_batch(model, cfg, world)
    log = Log(cfg, world, start)
    size, T, W = cfg.total_batch_size, cfg.block_size, world.size
    epoch = train_data.n_windows * T // size  # steps
    world.print(f"model: {raw_model.num_params():,} parameters, {cfg.vocab_size:,} rows in the vocabulary\n"
                f"data: {cfg.data_dir} ({meta['tokenizer']}), {train_data.n_tokens:,} train tokens, of which an epoch "
                f"reads {epoch * size:,} in {epoch:,} steps\n"
                f"batch: {size:,} tokens = {B} rows x {T} tokens x {size // (B * T * W)} accumulated x {W} processes\n"
                f"steps: {start} to {cfg.max_steps}, {cfg.max_steps / epoch:.2f} epochs"
                + "; no checkpoint to resume yet" * (cfg.resume and start == 0))
    seconds = []  # of each step, for the estimate of the time left

    # ---- the loop. `step` is the number of updates made so far. The last turn only saves and evaluates.
    def due(every):  # every so many steps (0: never), and after the last one
        return every > 0 and (step % every == 0 or step == cfg.max_steps)

    with contextlib.closing(log), catch_signals() as asked:
        for step in range(start, cfg.max_steps + 1):
            # Checkpoint: when due or asked to stop; process 0 writes raw_model. First, since evaluations take a while.
            stopping = world.any(asked)  # a signal to one process stops all of them, at the same step
            if step > start and (stopping or due(cfg.checkpoint_every)):
                log.checkpoint(step, meta, raw_model, optimizers)
            if stopping:
                world.print(f"stopped after {step} steps, as asked; the same command with --resume continues")
                break

            # Val loss: when due; every process scores a share, through `model`, since all batches have one shape.
            if due(cfg.val_every):
                val_loss, tokens = evaluate_loss(model, val_data, B, cfg, world)
                log.write(step, {"val": val_loss}, f"step {step:5d} | {describe_loss(val_loss, tokens, cfg, meta)}")

            # HellaSwag: when due; every process answers a share, with raw_model, since questions differ in length.
            if questions and due(cfg.hellaswag_every):
                score = hellaswag.evaluate(raw_model, questions, tokenizer, **world.share)
                log.write(step, {"hella": score["acc_norm"]}, f"HellaSwag: {hellaswag.describe(score)}")

            # Samples: when due; process 0 alone, with raw_model, since the text grows with each token.
            if tokenizer and due(cfg.sample_every) and world.rank == 0:
                for text in continue_text(raw_model, tokenizer, cfg.prompt, 2, 64, cfg.seed + step):
                    world.print("sample | " + text.replace("\n", "\n       | "))
            if step == cfg.max_steps:
                break

            # One step: always; every process trains on its share, through `model`. Only this is timed.
            started = time.perf_counter()
            torch.manual_seed(cfg.seed + step * world.size + world.rank)  # repeatable, should you add dropout
            lr = get_lr(step, cfg)
            x, y = loader.batch(step)                                    # (A, B, T)
            loss, norm = train_step(model, optimizers, x, y, lr, cfg, world)
            loss, norm = loss.item(), norm.item()  # waits for the device: only now is the step over
            seconds.append(time.perf_counter() - started)
            # A gradient that overflows is nothing unusual in float16, and train_step has left that step out.
            insist(math.isfinite(loss) and (math.isfinite(norm) or world.scaler.is_enabled()),
                   f"step {step}: loss {loss}, norm of the gradient {norm}, learning rate {lr:.3g}. No checkpoint has "
                   "it: --resume with a lower --max_lr, or with --dtype float32")
            log.write(step, {"train": loss, "lr": lr, "norm": norm, "tok/s": size / seconds[-1]},
                      describe_step(step, loss, lr, norm, seconds, raw_model, cfg, world))
    if step == cfg.max_steps:
        world.print(f"done: log, configuration and checkpoints are in {cfg.log_dir}. Try next:\n"
                    f"  python lessons/plot_log.py {cfg.log_dir}\n"
                    f"  python lessons/explore.py {cfg.log_dir} --out my-gpt2.html\n"
                    f"  python train_gpt2.py sample --init {cfg.log_dir}")
    return log.values

# =====================================================================================================================
# The line. You have read how GPT-2 is trained. What follows is what a run needs on real machines.
# =====================================================================================================================

# ----------------------------------------------------------------------------------- 9. processes and devices

class World:
    """One process or many, on whatever device, with the same calls. torchrun sets RANK, WORLD_SIZE and LOCAL_RANK."""

    def __init__(self, cfg):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.distributed = "RANK" in os.environ  # one process under torchrun is treated as many
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        # float16 loses what is smaller than 6e-8, as many gradients are. The scaler multiplies the loss, and with it
        # the gradients, and divides them again before the update. For other dtypes it does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.gpu, self.compiles, cuda = "", cfg.compile == "1", self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32: float32 products keep 10 bits of the mantissa
            self.gpu = torch.cuda.get_device_name(self.device)
            if cfg.compile == "auto":  # Triton, which compiles, may be missing, and refuses GPUs before Volta
                self.compiles = bool(find_spec("triton")) and torch.cuda.get_device_capability(self.device) >= (7, 0)
        if self.distributed:
            insist(self.device.type != "mps", "several processes can't share a Mac's GPU: use --device cpu")
            # torchrun keeps one store of addresses for all its restarts. The prefix hides the addresses of dead
            # processes; several machines count restarts separately, and have to do without.
            store = next(dist.rendezvous("env://"))[0]
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.size,
                                    timeout=timedelta(minutes=30))  # process 0 may be busy alone for a while
            self.group = dist.group.WORLD  # kept, since DDP would free it last, and hang
        self.share = dict(rank=self.rank, world_size=self.size, all_reduce=self.sum, dtype=self.dtype)  # for HellaSwag
        device, dtype = f"{self.device} {self.gpu}".strip(), str(self.dtype).removeprefix("torch.")
        self.print(f"device {device}, processes {self.size}, compile {int(self.compiles)}, {dtype}")

    def print(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self):
        """Matrix products in self.dtype, norms and losses in float32. For float32 itself it changes nothing."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def wrap(self, model):
        """The same parameters, compiled into few kernels. backward() averages gradients: 498 MB at 124M."""
        # Every shape makes a graph. After 8 of them, over all models of a process, PyTorch would stop compiling.
        torch._dynamo.config.recompile_limit = 64
        model = torch.compile(model, dynamic=False) if self.compiles else model
        return DDP(model, gradient_as_bucket_view=True) if self.distributed else model

    def no_sync(self, model):
        """Inside, backward() adds to the gradients of this process alone."""
        return model.no_sync() if isinstance(model, DDP) else contextlib.nullcontext()

    def sum(self, tensor):
        """A tensor, added up over all processes: the one reduction that every backend knows."""
        if self.distributed:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Is it true on any process? All get the same answer, so all do the same next."""
        return self.sum(torch.tensor(float(bool(flag)))).item() > 0

    def first(self, do):
        """Process 0 runs do() while the others wait. If it meets wrong input, all of them stop."""
        error = None
        try:
            if self.rank == 0:
                do()
        except (UserError, OSError) as found:
            error = found
        if self.any(error):
            raise error or UserError("process 0 has said why")


def pick_device(name):
    """What --device names, or with "auto" the best there is. Process i of a machine gets its GPU number i."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used here ({str(error).splitlines()[0]}): try cpu") from None


def pick_dtype(name, device):
    """The dtype of activations. bfloat16 has the range of float32; float16 hasn't, and needs the scaler."""
    insist(device.type != "mps" or name in ("auto", "float32"), f"--dtype {name}: in half precision, attention on Macs "
           "can see later tokens (PyTorch issue 195910): use float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)  # is_bf16_supported() counts emulation too
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # from PyTorch 2.12 on
    return torch.bfloat16 if device.type == "cpu" and (can.get("avx512_bf16") or can.get("amx_bf16")) else torch.float32


def fit_micro_batch(model, cfg, world):
    """Rows per forward: as asked, or with "auto" the most that fit, of those that divide a process's rows of a step.
    4,096 tokens keep a CPU busy. On a GPU we try forward and backward, of the model as it will be trained: DDP splits
    the graph it compiles, and one made without it would be used again and send all gradients at the end."""
    if cfg.micro_batch_size != "auto":
        return cfg.micro_batch_size

    def fits(B):
        try:
            # Adam's two moments, which don't exist yet, and 2^28 numbers, a gigabyte, for what else comes and goes.
            spare = torch.empty(2 * sum(p.numel() for p in model.parameters()) + 2**28, device=world.device)
            x = torch.zeros(B, cfg.block_size, dtype=torch.long, device=world.device)  # (B, T)
            with world.no_sync(model):  # no process may wait for one that has failed
                with world.autocast():
                    loss = model(x, x.clone())[1]  # two tensors: compiled code would note that they are the same
                loss.backward()
            return True
        except RuntimeError as error:  # PyTorch, cuBLAS, Triton and the driver each say it in their own way
            if not re.search("out of memory|ALLOC_FAILED", str(error)):
                raise
            return False

    rows, cuda = cfg.total_batch_size // cfg.block_size // world.size, world.device.type == "cuda"
    # Kernels that count with 32 bits have failed on 2^31 logits and more.
    most = (2**31 - 1) // (cfg.block_size * cfg.vocab_size) if cuda else 4096 // cfg.block_size
    sizes = [B for B in range(max(1, min(most, rows)), 0, -1) if rows % B == 0]
    if not cuda:
        return sizes[0]
    for B in sizes:
        fitted = not world.any(not fits(B))
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        world.print(f"micro-batch of {B} rows: {'fits' if fitted else 'does not fit'}")
        if fitted:
            return B
    raise UserError(f"this GPU's memory is too small, tried {sizes} rows: use a smaller --block_size or --preset")


@contextlib.contextmanager
def catch_signals():
    """Note SIGTERM and Ctrl-C in a list, for the loop to see. Saving at once could catch the model half updated."""
    asked = []

    def handler(signum, frame):
        asked.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means now

    with contextlib.ExitStack() as afterwards:
        for number in (signal.SIGTERM, signal.SIGINT):
            afterwards.callback(signal.signal, number, signal.signal(number, handler))
        yield asked

# -------------------------------------------------------------------------------------- 10. log and checkpoints
# The promise: killed at any moment and resumed, a run ends with the same weights and log but for tok/s, to the last bit
# on a CPU. A step needs nothing but the state before it and its number, so it takes files that are never half written.

class Log:
    """What a run writes into log_dir: checkpoints; config.json; and log.txt, a line `step stream value` per number of
    the streams train, val, hella, lr, norm and tok/s. `values` holds these as {stream: {step: value}}."""

    def __init__(self, cfg, world, start):
        self.cfg, self.world, self.folder = cfg, world, Path(cfg.log_dir)
        self.values, self.pending, self.tracker = {}, "", None  # pending: lines that a full disk has refused
        self.thread = ThreadPoolExecutor(1)  # writes checkpoints
        self.saving = self.thread.submit(int)  # the newest, which may not be complete; at first nothing
        world.first(lambda: self.open(start))

    def open(self, start):
        """For process 0: make the folder, lock it, and keep of its log what comes before `start`."""
        from filelock import FileLock, Timeout
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / "lock")  # the system drops it when the process ends, even by kill -9
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"another run is writing to {self.folder}: choose another --log_dir") from None
        except (OSError, NotImplementedError):  # some network disks have no locks
            pass
        if self.cfg.wandb:
            try:
                import wandb
                self.tracker = wandb.init(project=self.cfg.wandb, dir=self.cfg.log_dir, config=asdict(self.cfg))
            except Exception as error:  # not installed, not logged in, not reachable
                raise UserError(f"--wandb {self.cfg.wandb}: {fineweb.one_line(error)}") from error
        old = [file for kind in ("log.*", "config.json", "ckpt_*.pt") for file in self.folder.glob(kind)]
        if old and not self.cfg.resume:
            aside = next(path for n in range(1, 10**6) if not (path := self.folder / f"earlier-{n}").exists())
            aside.mkdir()
            for file in old:
                file.rename(aside / file.name)
            print(f"{self.folder} held a run, which is now in {aside} (--resume would have continued it)")
        path, kept = self.folder / "log.txt", ""
        for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
            if (found := re.fullmatch(r"(\d+) (\S+) (\S+)\n", line)) and int(found[1]) < start:
                self.values.setdefault(found[2], {})[int(found[1])] = float(found[3])
                kept += line
        write_file(path, lambda file: file.write(kept.encode()))
        fineweb.write_json(self.folder / "config.json", {**asdict(self.cfg), "resume": False})

    def write(self, step, streams, text):
        """write(3, {"train": 4.2, "norm": 0.9}, text) prints the text and writes two lines. Names have no spaces."""
        self.world.print(text)
        for stream, value in streams.items():
            self.values.setdefault(stream, {})[step] = value
            self.pending += f"{step} {stream} {value:.8g}\n"
        try:
            if self.world.rank == 0:
                with open(self.folder / "log.txt", "a") as file:
                    file.write(self.pending)
            self.pending = ""
        except OSError as error:  # a full disk: the lines wait for better times
            print(f"WARNING: the log of step {step} can't be written yet: {error}")
        if self.tracker:
            self.tracker.log(streams, step=step)

    def checkpoint(self, step, meta, model, optimizers):
        """Write ckpt_STEP.pt in a thread. It needs no random states: weights, order, samples come from (seed, step)."""
        if self.world.rank == 0:
            self.saving.result()  # the one before, if the disk is that slow
            copy = io.BytesIO()  # the next step changes the weights
            torch.save(dict(step=step, config=asdict(self.cfg), data=meta, model=model.state_dict(),
                            optimizers=[optimizer.state_dict() for optimizer in optimizers],
                            scaler=self.world.scaler.state_dict()), copy)
            self.saving = self.thread.submit(self.save, self.folder / f"ckpt_{step:08d}.pt", copy)

    def save(self, path, copy):
        try:
            write_file(path, lambda file: file.write(copy.getbuffer()))
            older = [file for file in sorted(self.folder.glob("ckpt_*.pt")) if file <= path]  # newer ones are damaged
            for file in older[:-self.cfg.keep_checkpoints]:
                file.unlink()
        except OSError as error:
            print(f"WARNING: {path} can't be written, older checkpoints stay: {error}", flush=True)

    def close(self):
        self.saving.result()
        if self.tracker:
            self.tracker.finish()
        if self.world.rank == 0:
            self.lock.release()


def find_checkpoint(source):
    """The checkpoint in a file, or the newest good one in a log folder; None without any, UserError if all are bad."""
    files = [Path(source)] if os.path.isfile(source) else sorted(Path(source).glob("ckpt_*.pt"), reverse=True)
    for file in files:
        try:
            # A pickle is a program; with weights_only it can only build tensors, numbers, strings, lists and dicts.
            found = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
            with torch.device("meta"):  # do the weights have the names and shapes of the model? It takes no memory
                GPT(TrainConfig(**found["config"])).load_state_dict({**found["model"]}, assign=True)
            assert found.keys() >= {"step", "optimizers", "scaler"} and "json" in found["data"]
            return found
        except Exception as error:  # damaged files fail in a dozen ways
            bad = f"{file} is damaged, or written by another version of this program ({type(error).__name__})"
            insist(file != files[-1], bad)
            print(f"{bad}: trying the one before")

# ------------------------------------------------------------------- 11. the command line and the other actions

def fetch_pretrained(name):
    """The folder of a model: a local one as it is, one of the Hugging Face hub after it was downloaded, once."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    try:
        insist("/" in name or name.startswith("gpt2"), "not a name on the hub")
        return snapshot_download(name if "/" in name else f"openai-community/{name}", allow_patterns=[
            "config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json"])
    except Exception as error:
        raise UserError(f"{name}: no such checkpoint, log folder or Hugging Face folder is here, and the hub can't be "
                        f"reached or doesn't have it ({type(error).__name__})") from error


def load_model(source, optional=False):
    """(model, tokenizer) of a name, a Hugging Face folder, a checkpoint file or a log folder. A tokenizer that is not
    at hand is a UserError or, where it is `optional`, None."""
    if checkpoint := find_checkpoint(source):
        model, meta = GPT(TrainConfig(**checkpoint["config"])), checkpoint["data"]
        model.load_state_dict(checkpoint["model"])
        model.n_vocab, model.eot, name, text = (meta[key] for key in ("vocab_size", "eot", "tokenizer", "json"))
    else:
        model, folder = GPT.from_pretrained(source), fetch_pretrained(source)
        name, text = folder if Path(folder, "tokenizer.json").exists() else "gpt2", None
    try:
        tokenizer = fineweb.tokenizer_from_json(text, name, model.eot) if text else load_tokenizer(name)
        insist(tokenizer.n_vocab <= model.config.vocab_size, f"{source}: its tokenizer has more ids than its model")
    except UserError as error:
        insist(optional, error)
        return model, None
    model.n_vocab, model.eot = min(model.n_vocab, tokenizer.n_vocab), tokenizer.eot_token
    return model, tokenizer


def open_data(cfg, world, quiz):
    """What data_dir holds -> (its meta.json, with its tokenizer as text unless that is GPT-2's; its tokenizer; for a
    quiz, HellaSwag's questions). Without tokenizer or questions a run goes on: they are None, and a word says why."""
    if cfg.data_dir == PRESETS["laptop"]["data_dir"]:  # Python carries this text; any other takes hours to prepare
        world.first(lambda: Path(cfg.data_dir, "meta.json").exists() or fineweb.main(
            ["--source", "builtin", "--tokenizer", f"bpe:{cfg.vocab_size or 2048}", "--out", cfg.data_dir]))
    open_shards(cfg.data_dir, "val")  # are there any?
    meta, tokenizer, questions = read_meta(cfg.data_dir), None, None
    meta["json"], cfg.vocab_size = None, cfg.vocab_size or -(-meta["vocab_size"] // 128) * 128
    insist(meta["vocab_size"] <= cfg.vocab_size, f"{cfg.data_dir} has {meta['vocab_size']} ids: leave --vocab_size out")
    try:
        tokenizer = load_tokenizer("gpt2" if meta["tokenizer"] == "gpt2" else cfg.data_dir)
        meta["json"] = fineweb.tokenizer_to_json(tokenizer) if tokenizer.name != "gpt2" else None
        if quiz:
            world.first(hellaswag.find_data)
            questions = list(hellaswag.iterate_examples("val"))
    except UserError as error:
        world.print(f"no {'HellaSwag score' if tokenizer else 'samples and no HellaSwag'}: {error}")
    return meta, tokenizer, questions


def load_init(cfg, meta, tokenizer):
    """The model of --init. UserError unless its own tokenizer and that of the shards cut a long text, the docstring of
    this file, into the same ids. Where one of them is not at hand, the number of ids has to do."""
    model, own = load_model(cfg.init, optional=True)
    cuts = [(t.encode_ordinary(__doc__), t.eot_token) for t in (own, tokenizer) if t]
    same = cuts[0] == cuts[1] if len(cuts) == 2 else model.n_vocab == meta["vocab_size"]
    insist(same, f"{cfg.data_dir} was made with another tokenizer ({meta['tokenizer']}) than the model {cfg.init}: use "
           "shards made with its own")
    return model


def restore(model, optimizers, meta, tokenizer, cfg, world):
    """In a resumed run, put all into the state of the newest checkpoint; else give the model the weights of --init, of
    which a shorter --block_size leaves out the later positions -> the number of steps made so far."""
    cfg.resume = world.any(cfg.resume)  # only the machine whose process died is told of a restart
    checkpoint = find_checkpoint(cfg.log_dir) if cfg.resume else None
    step = checkpoint["step"] if checkpoint else 0
    insist(not world.any(world.sum(torch.tensor(float(step))) != step * world.size),
           f"--log_dir {cfg.log_dir} holds other checkpoints on other machines: use a folder they share")
    insist(step <= cfg.max_steps, f"--max_steps {cfg.max_steps}: the run in {cfg.log_dir} has made {step} already")
    fixed = [field.name for field in fields(GPTConfig)]  # else the weights would not fit
    if checkpoint:
        fixed += ["optimizer", "shuffle", "seed", "total_batch_size", "tokenizer", "train_tokens"]  # or the text differ
        source, then, weights = cfg.log_dir, {**checkpoint["data"], **checkpoint["config"]}, checkpoint["model"]
    elif cfg.init != "scratch":
        other = load_init(cfg, meta, tokenizer)
        source, then, weights = cfg.init, asdict(other.config), other.state_dict()
        then["block_size"] = min(then["block_size"], cfg.block_size)
    else:
        return 0
    now = {**meta, **asdict(cfg)}
    differ = [f"{name} {then.get(name)} -> {now[name]}" for name in fixed if then.get(name) != now[name]]
    insist(not differ, f"{source} has other settings ({', '.join(differ)}): leave them out, or use another --log_dir")
    model.load_state_dict({name: w[:cfg.block_size] if "wpe" in name else w for name, w in weights.items()})
    if checkpoint:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            # the averages are the checkpoint's, the settings (decay ...) those of cfg
            groups = [{**old, **new, "params": old["params"]}
                      for old, new in zip(state["param_groups"], optimizer.param_groups)]
            optimizer.load_state_dict({**state, "param_groups": groups})
        if world.scaler.is_enabled() and checkpoint["scaler"]:  # {} where the run was not in float16 until now
            world.scaler.load_state_dict(checkpoint["scaler"])
    return step


def describe_loss(loss, tokens, cfg, meta):
    """A val loss, with its text's name and, where that is known, in bits per byte, which compare across tokenizers."""
    val = [shard for shard in meta["shards"] if shard["split"] == "val" and shard.get("bytes")]
    n_tokens, n_bytes = (sum(shard[key] for shard in val) for key in ("tokens", "bytes"))
    bits = f", {loss / math.log(2) * n_tokens / n_bytes:.4f} bits per byte" if val else ""
    return f"val loss {loss:.4f}{bits} (on {tokens:,} tokens of {cfg.data_dir})"


# Peak dense 16-bit FLOP/s, from the makers' data sheets, by the name that the driver gives.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8e12, "NVIDIA RTX 6000 Ada Generation": 364e12,
    "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 5090": 209.5e12, "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA RTX A6000": 154.8e12, "NVIDIA GeForce RTX 3090": 71e12, "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12, "Tesla T4": 65e12}


def describe_step(step, loss, lr, norm, seconds, model, cfg, world):
    """The console's line for a step. Its MFU, "model FLOPs utilization", is the share of the GPU's arithmetic that is
    used by the 6N + 12LCT operations per token of N parameters in L layers (PaLM, appendix B)."""
    # The median of the last steps: the first one, in which the model is compiled, would spoil a mean.
    left = timedelta(seconds=int((cfg.max_steps - step - 1) * np.median(seconds[-21:])))
    tok_s = cfg.total_batch_size / seconds[-1]
    gpu = f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most" if torch.cuda.is_initialized() else ""
    if peak := PEAK_FLOPS.get(world.gpu):
        n = model.num_params() - cfg.block_size * cfg.n_embd  # looking up a position is not a product
        gpu += f" | MFU {(6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size) * tok_s / world.size / peak:.1%}"
    return (f"step {step:5d} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | {seconds[-1] * 1000:.1f} ms | "
            f"{tok_s:,.0f} tok/s{gpu} | ETA {left}")


def evaluate(cfg):
    """eval: the val loss on data_dir, and HellaSwag, of what --init names -> {"val": loss, ...}."""
    world = World(cfg)
    meta, tokenizer, questions = open_data(cfg, world, quiz=cfg.hellaswag_every)
    model = load_init(cfg, meta, tokenizer)
    val = Corpus(cfg.data_dir, "val", cfg.block_size, model.config.vocab_size)
    B = fit_micro_batch(model.to(world.device), cfg, world)
    loss, tokens = evaluate_loss(model, val, B, cfg, world)
    world.print(describe_loss(loss, tokens, cfg, meta))
    values = dict(val=loss, tokens=tokens)
    if questions:
        values |= hellaswag.evaluate(model, questions, tokenizer, **world.share)
        world.print(f"HellaSwag: {hellaswag.describe(values)}")
    return values


def sample(cfg, text=None, temperature=0.8, top_k=50, max_new_tokens=200, num_samples=1):
    """sample: what --init names continues a text -> the texts."""
    insist(temperature >= 0 and top_k > 0 and max_new_tokens >= 0 and num_samples > 0,
           "--temperature and --max_new_tokens must not be negative, --top_k and --num_samples must be above 0")
    world = World(cfg)
    model, tokenizer = load_model(cfg.init)
    texts = continue_text(model.to(world.device), tokenizer, cfg.prompt if text is None else text, num_samples,
                          max_new_tokens, cfg.seed, temperature, top_k)
    world.print("\n\n".join(texts))
    return texts


def export(cfg, out):
    """export: what --init names as a Hugging Face folder, with its tokenizer where that is at hand."""
    model, tokenizer = load_model(cfg.init, optional=True)
    if tokenizer:
        fineweb.save_tokenizer(tokenizer, out)
    model.save_pretrained(out)
    if not (card := Path(out, "README.md")).exists():
        card.write_text("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2]\n---\n\n"
                        f"# A GPT-2 of {model.config.n_layer} layers and {model.config.n_embd} channels\n\n"
                        f"Exported from {Path(cfg.init).name}. It continues texts, but follows no instructions.\n")
    print(f"wrote {out}{', without a tokenizer' * (not tokenizer)}; transformers: pipeline('text-generation', '{out}')")


ACTIONS = dict(train=train, eval=evaluate, sample=sample, export=export)


def parse_config(action, argv):
    """Words -> (TrainConfig, {what the action takes besides}). The first of these that has a setting decides: a flag,
    the file of --config, --preset; with --resume, log_dir/config.json, else the model of --init (its shape for a new
    run, all settings of its run for the other actions); the default in TrainConfig."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun starts anew after a death
        argv = [*argv, "--resume"]
    given = vars(make_parser(action).parse_args(argv))
    preset, file = PRESETS[given.pop("preset", "gpt2")], given.pop("config", None)
    types = {field.name: field.type for field in fields(TrainConfig)}
    extra = {name: given.pop(name) for name in given.keys() - types}
    settings = {**preset, **(read_json(file) if file else {}), **given}
    log_dir = settings.get("log_dir", TrainConfig.log_dir)
    init = settings.get("init", "scratch" if action == "train" else log_dir)
    remembered = Path(log_dir, "config.json")
    if settings.get("resume") and remembered.exists():
        settings = {**read_json(remembered), **settings}
    elif init != "scratch":
        checkpoint = find_checkpoint(init)
        found = checkpoint["config"] if checkpoint else read_json(Path(fetch_pretrained(init), "config.json"))
        found.setdefault("block_size", found.get("n_positions", GPTConfig.block_size))  # Hugging Face's name for it
        taken = types if checkpoint and action != "train" else [field.name for field in fields(GPTConfig)]
        settings = {**{name: found[name] for name in taken if name in found}, **settings, "init": init}
    insist(settings.keys() <= types.keys(), f"unknown settings in a file: {', '.join(settings.keys() - types)}")
    cfg = TrainConfig(**{name: convert(name, types[name], value) for name, value in settings.items()})
    insist(cfg.n_embd % cfg.n_head == 0, f"--n_embd {cfg.n_embd} is not a multiple of --n_head {cfg.n_head}")
    insist(cfg.min_lr <= cfg.max_lr, f"--min_lr {cfg.min_lr} is above --max_lr {cfg.max_lr}")
    return cfg, extra


def make_parser(action):
    """A parser whose flags are the fields of TrainConfig, and whose help is the comments after them."""
    # With SUPPRESS, what was not given is absent, so that it can be told from what was given its default.
    parser = fineweb.Parser(prog=f"train_gpt2.py {action}", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add, source = parser.add_argument, Path(__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    for field in fields(TrainConfig):
        options = dict(nargs="?", const="1") if field.type is bool else {}
        add(f"--{field.name}", help=comments.get(field.name, "").replace("%", "%%"), **options)
    add("--preset", choices=PRESETS, help="a set of values for the flags above")
    add("--config", metavar="FILE.json", help="a file of flags, such as the config.json of a run")
    if action == "sample":
        add("text", nargs="?", help="what the model shall continue")
        add("--temperature", type=float, help="0: the most probable id; 1: as the model says; 0.8")
        add("--top_k", type=int, help="draw among the k most probable ids; 50")
        add("--max_new_tokens", type=int, help="ids to write at most; 200")
        add("--num_samples", type=int, help="how many texts; 1")
    if action == "export":
        add("--out", required=True, help="the folder to write")
    return parser


def convert(name, kind, value):
    """A word of the command line, or a value in a JSON file -> a field's value, of its type and in its range."""
    if name == "micro_batch_size":
        kind = str if value == "auto" else int
    choices = ("0", "1", "False", "True") if kind is bool else get_args(kind)
    if choices:
        insist(str(value) in choices, f"--{name} {value}: choose from {', '.join(choices)}")
        return str(value) in ("1", "True") if kind is bool else str(value)
    above = name in ("block_size", "n_layer", "n_head", "n_embd", "total_batch_size", "micro_batch_size", "max_steps",
                     "max_lr", "val_tokens", "keep_checkpoints")  # 0
    try:
        new = kind(value)
        good = (isinstance(value, str) or new == value) and (kind is str or 0 <= new < math.inf and (new or not above))
    except (TypeError, ValueError):
        good = False
    insist(good, f"--{name} {value}: must be {kind.__name__}, {'above 0' if above else '0 or more'}")
    return new


def main(argv=None):
    """Run a command line, given as a list of words or else the program's own. UserError on wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    action = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    insist(action in ACTIONS, f"there is no action {action!r}: choose from {', '.join(ACTIONS)}")
    cfg, extra = parse_config(action, argv)
    return ACTIONS[action](cfg, **extra)


def command():
    """The program: main, with one line instead of a traceback for wrong input -> its exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a Windows console may lack a letter that the model writes
    rank, status = os.environ.get("RANK"), 0
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        # torchrun ends all when the first one leaves. Mostly all have met the same: process 0 is given time to say it.
        time.sleep(10 if rank not in (None, "0") else 0)
        advice = "try half as many rows, --micro_batch_size: " * isinstance(error, torch.OutOfMemoryError)
        print(f"train_gpt2.py: {advice}{' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    if rank:
        # Leave at once, after an error too. Closing the group would wait for processes that wait for us; and its
        # threads outlive it, and can abort a Python that shuts down.
        sys.stdout.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(command())
