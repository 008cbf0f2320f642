"""
GPT-2 (124M), reproduced: the model, the data and the training run in one file that is meant to be read.

    python train_gpt2.py --preset laptop     no GPU, no data, no network: trains in minutes on two CPU cores
    python train_gpt2.py                     the paper run: 124M on FineWeb-Edu, from shards that fineweb.py makes
    torchrun --standalone --nproc_per_node=8 train_gpt2.py       the same run on 8 GPUs, with the same numbers
    python train_gpt2.py --resume            continue the run in --log_dir
    python train_gpt2.py eval   --init gpt2  val loss and HellaSwag of OpenAI's weights, or of any checkpoint
    python train_gpt2.py sample --init log "Hello, I'm a language model,"
    python train_gpt2.py export --init log --out my-gpt2         a folder that Hugging Face's transformers reads
    python train_gpt2.py plot   --log_dir log                    log/log.png: the curves, with GPT-2's for comparison

A map, in reading order. The ideas come first; section 9 is plumbing, to be skipped on a first reading.

    2  config       what can be set, in which unit, and why it is what it is
    3  model        attention, MLP, block, GPT: a hundred lines of code are the whole network
    4  weights      OpenAI's parameters in, and ours out in Hugging Face's layout
    5  data         shards -> windows -> one global order, the same for any number of GPUs
    6  optimiser    which parameters decay, AdamW, Muon, and the learning rate over time
    7  the step     accumulate, average over processes, clip, update
    8  evaluation   a val loss that counts tokens, and samples
    9  plumbing     processes and devices, the log, checkpoints, the command line
    10 main         the loop that ties all of it together, and the other actions

Letters that stand for the sizes of tensors, everywhere below, with their values in GPT-2 (124M):

    B  rows in a micro-batch, each a text of its own     T  tokens in a row, at most block_size = 1024
    C  channels, n_embd = 768                            V  vocabulary, 50257 (padded to 50304 in training)
    nh heads of attention, 12                            hs width of a head, C / nh = 64
    A  micro-batches accumulated into one step           W  processes, one a GPU

The model is that of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
Where that paper is silent on training, we follow Brown et al., "Language Models are Few-Shot Learners" (2020),
appendix B: "GPT-3" below.
"""
# ------------------------------------------------------------------------------------------------- 1. imports
import argparse
import contextlib
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from fineweb import Parser, UserError, load_tokenizer, save_tokenizer


# -------------------------------------------------------------------------------------------------- 2. config
# Every field is also a flag of the same name, and the comment behind it is the flag's help.

@dataclass
class GPTConfig:
    """The shape of the network. The defaults are the 124M model that OpenAI released as "gpt2"."""
    block_size: int = 1024   # tokens: the longest context; GPT-2 learns a vector for each of these positions
    vocab_size: int = 50257  # ids: 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12        # blocks
    n_head: int = 12         # heads in a block; all four sizes of GPT-2 have 64 channels a head
    n_embd: int = 768        # channels of the residual stream


@dataclass
class TrainConfig(GPTConfig):
    """A run: a shape, and everything that decides how it is trained. The defaults are the paper run."""
    # model
    vocab_size: int = 50304  # ids: 50257 padded to a multiple of 128, a size that GPUs are fast with
    init: str = "scratch"    # scratch, gpt2 (-medium ...), a Hugging Face folder, a checkpoint, a log folder
    # data
    data_dir: str = "data/edu_fineweb10B"  # folder of shards, as fineweb.py writes them
    shuffle: bool = True     # visit the text in a new random order each epoch; 0: in the order of the shards
    seed: int = 1337         # decides the first weights, the order of the text, and the samples
    # batch
    total_batch_size: int = 524288  # tokens per step, over all processes: 2^19, GPT-3's 0.5M for this size
    micro_batch_size: int | str = "auto"  # rows per forward: memory and speed, not the result; auto: what fits
    # schedule
    max_steps: int = 19073   # updates of the weights: 10e9 tokens / 524,288
    max_lr: float = 6e-4     # learning rate after warm-up, GPT-3's for 125M (table 2.1)
    min_lr: float = 6e-5     # learning rate of the last step: a tenth of max_lr, as in GPT-3
    warmup_steps: int = 715  # steps: GPT-3 warms up over 375M tokens, / 524,288
    # optimiser
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: orthogonal updates for matrices inside blocks
    weight_decay: float = 0.1  # on matrices only, never on biases and norms
    grad_clip: float = 1.0     # longest gradient, as one vector of all parameters; 0: any
    # evaluation; "every" is in steps, 0 means never, and what is on is also done after the last step
    val_every: int = 250       # steps between measurements of the val loss
    val_tokens: int = 10485760   # tokens of the val split to score: 20 x 64 x 1024 x 8, on any hardware
    hellaswag_every: int = 250   # steps between HellaSwag scores; a run shorter than that does without
    sample_every: int = 250    # steps between samples of what the model writes
    prompt: str = "Hello, I'm a language model,"  # how these samples begin
    # system
    checkpoint_every: int = 250  # steps between checkpoints: model, optimiser and step, 1.5 GB at 124M
    keep_checkpoints: int = 2  # files: the newest ones stay
    log_dir: str = "log"       # folder for log.txt, config.json and the checkpoints
    resume: bool = False       # continue the newest good checkpoint of log_dir; if there is none, start
    device: str = "auto"       # cuda, cuda:1, mps or cpu; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; weights stay float32
    compile: Literal["auto", "0", "1"] = "auto"  # fuse the model into few kernels; auto: on CUDA
    wandb: str = ""            # a Weights & Biases project to log to as well


# Learning rates fall as models grow. GPT-3, table 2.1: 6e-4 for 125M,
# 3e-4, 2.5e-4 and 2e-4 for the next three.
PRESETS = {
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, min_lr=3e-5),     # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4, min_lr=2.5e-5),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4, min_lr=2e-5),         # 1558M
    # 124M on children's stories, 3,000 steps of 64 x 8 rows. GPT-3's
    # warm-up would be a quarter of such a run.
    "tinystories": dict(data_dir="data/tinystories", max_steps=3000, warmup_steps=100, weight_decay=0.001,
                        hellaswag_every=0, prompt="Once upon a time"),
    # What two CPU cores learn in two minutes, from text that Python itself carries. At this size two wide layers
    # learn more in that time than four narrow ones, and Muon more than AdamW (lesson 09 has the numbers).
    "laptop": dict(data_dir="data/builtin", vocab_size=2048, block_size=64, n_layer=2, n_head=3, n_embd=192,
                   total_batch_size=2048, max_steps=540, optimizer="muon", max_lr=1.6e-2, min_lr=1.6e-4,
                   warmup_steps=25, val_every=90, hellaswag_every=0, sample_every=180, checkpoint_every=90,
                   prompt="Return the"),
}


# --------------------------------------------------------------------------------------------------- 3. model
# Ids in, odds out. Each id is looked up as a vector of C numbers (what it means, plus where
# it stands). Twelve times over, each position then looks around among those before it, and
# thinks about what it saw; it writes both results onto its vector by addition, which is why
# that vector is called the residual stream. What stands there at the end is compared with
# the vector of every id in the vocabulary: the better it fits, the likelier that id.

class CausalSelfAttention(nn.Module):
    """Tokens exchange information: each takes in a weighted average of what it and those before it offer."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x, mask=None):
        B, T, C = x.size()
        # Every token asks a question (q), advertises what it holds (k) and offers it (v). One product makes
        # all heads, then they are cut apart: C = nh * hs channels become nh separate conversations, hs wide.
        q, k, v = self.c_attn(x).split(C, dim=2)                         # (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        # softmax(q k^T / sqrt(hs)) v, with the future masked out. Step by step it would store weights of shape
        # (B, nh, T, T), 50 MB a row and layer at T = 1024; the fused kernel ("flash attention") never does. A
        # sum of hs products has variance hs: without the root the softmax would start out saturated.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)                           # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Each token thinks alone: four times as wide, a bend, and back. Two thirds of a block's weights."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # The tanh form of GELU is a shortcut of its time, but OpenAI's weights were trained with
        # it. The exact form moves the logits too little to notice and enough to fail a comparison.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))                                      # (B, T, 4*C)
        return self.c_proj(x)


class Block(nn.Module):
    """Communicate, then compute. Both only ADD to x: a straight path leads from the loss to the embedding."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None):
        # The first Transformer normalised after each addition, and so on the path itself. GPT-2
        # normalises what goes into each part, and nothing stands between a block's input and its output.
        x = x + self.attn(self.ln_1(x), mask)                            # (B, T, C)
        x = x + self.mlp(self.ln_2(x))                                   # (B, T, C)
        return x


class GPT(nn.Module):
    """GPT-2, with its parameters under the names of OpenAI's checkpoint: wte, wpe, h.0.attn.c_attn ..."""

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
        # One matrix for reading and for writing: tokens that mean alike are alike as input and as output. It
        # saves 38.6M of what would be 163M parameters.
        self.lm_head.weight = self.transformer.wte.weight
        # How many ids a tokenizer can decode. The rows past them only
        # pad the matrix; training sets the number.
        self.n_vocab = 50257 if config.vocab_size == 50304 else config.vocab_size
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw every tensor once: N(0, 0.02), biases 0, gains 1, and
        smaller what adds to the residual stream.

        OpenAI's code draws wpe from N(0, 0.01). We keep to 0.02, as Hugging Face and most reproductions do.
        """
        for name, p in self.named_parameters():  # the tied matrix comes once, as wte.weight
            if name.endswith("c_proj.weight"):
                # 2 * n_layer projections add up in the residual stream, and a
                # sum of n independent terms grows like sqrt(n). Divided by that,
                # the stream has one size at any depth (GPT-2, section 2.3).
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)

    def hidden(self, idx, pos=None, mask=None):
        """Ids (B, T) -> what the network makes of each position, (B, T, C), ready for lm_head.

        pos, (T,) or (B, T), replaces the positions 0, 1, 2 ...; mask, (T, T) or (B, 1, T, T) and True where a
        token may look, replaces "at everything before". hellaswag.py puts several endings behind one context.
        """
        B, T = idx.size()
        if pos is None:
            pos = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)        # (B, T, C)
        for block in self.transformer.h:
            x = block(x, mask)                                           # (B, T, C)
        x = self.transformer.ln_f(x)                                     # (B, T, C)
        return x

    def forward(self, idx, targets=None):
        """Ids (B, T) and those that really followed, (B, T) -> logits
        (B, T, V) and the mean loss in nats, or None.

        T is at most block_size. A target of -100 does not count in the mean.
        """
        logits = self.lm_head(self.hidden(idx))                          # (B, T, V)
        # Position t holds the odds for token t + 1: each row is T examples at once. Fresh weights score about
        # ln V + s^2/2, where s = 0.02 sqrt(C) is the spread of the logits: 10.98 for 124M, not ln V = 10.82.
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, stop=None):
        """Continue each row of idx (B, T) by up to max_new_tokens ids, one at a time -> (B, T + new).

        temperature  1 draws as the model says, less is tamer, 0 always takes the likeliest id
        top_k        draw among the k likeliest ids only
        generator    a torch.Generator on the model's device, which makes the draws repeatable
        stop         an id (<|endoftext|>) that ends a row; it fills the row up until all rows have ended
        """
        done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)  # (B, 1)
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size:]  # positions beyond have never been trained
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
        """How many numbers are learned, the tied matrix counted once: 124,439,808 for GPT-2's smallest."""
        return sum(p.numel() for p in self.parameters())

    # ----------------------------------------------------------------------------------- 4. OpenAI's weights
    # The proof that the classes above are GPT-2: OpenAI's parameters fit into
    # them, name by name, and give the same logits as Hugging Face's
    # implementation. The way back lets its whole world use what we have trained.

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """The model behind a Hugging Face name ("gpt2", "gpt2-xl",
        "someone/their-gpt2") or in a local folder.

        Only config.json and *.safetensors are read, which hold no code. UserError where they hold no GPT-2.
        """
        folder = fetch_pretrained(name_or_folder)
        model, stored = cls(read_hf_config(folder)), read_safetensors(folder)
        params = dict(model.named_parameters())
        if odd := sorted(params.keys() ^ stored.keys()):
            raise UserError(f"{folder} does not hold GPT-2's tensors: {', '.join(odd[:3])} missing or unknown")
        with torch.no_grad():
            for name, p in params.items():
                # OpenAI computed x @ W, inputs first; nn.Linear computes x @ W.T. So these four kinds
                # arrive transposed. Three are rectangular and would crash if we forgot; attn.c_proj is
                # square and would load in silence, which is why the tests compare logits and not shapes.
                w = stored[name].t() if is_conv1d(name) else stored[name]
                if w.shape != p.shape:
                    raise UserError(f"{folder}: {name} is {tuple(w.shape)}, config.json says {tuple(p.shape)}")
                p.copy_(w)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors for GPT2LMHeadModel.from_pretrained(folder), or ours.

        The inverse of from_pretrained, but for the rows of wte that
        only pad the vocabulary: they stay behind.
        """
        from safetensors.torch import save_file
        weights = {}
        for name, p in self.named_parameters():  # lm_head is wte, and not written twice
            w = p[:self.n_vocab] if name == "transformer.wte.weight" else p.t() if is_conv1d(name) else p
            weights[name] = w.detach().float().cpu().contiguous()
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        # <|endoftext|>, the last id of all our vocabularies, opens a document and so ends the one before.
        c, eot = self.config, self.n_vocab - 1
        values = dict(HF_CONFIG, architectures=["GPT2LMHeadModel"], n_positions=c.block_size, n_ctx=c.block_size,
                      vocab_size=self.n_vocab, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                      bos_token_id=eot, eos_token_id=eot, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        Path(folder, "config.json").write_text(json.dumps(values, indent=2) + "\n")


# What config.json must say, or leave out, for a model that computes what the classes above compute.
HF_CONFIG = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None,
                 scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
                 tie_word_embeddings=True)


def is_conv1d(name):
    """Is this one of the four matrices in a block that GPT-2's checkpoint stores as (inputs, outputs)?"""
    return name.endswith(("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"))


def fetch_pretrained(name_or_folder):
    """A local folder as it is; the files of a Hugging Face name,
    downloaded once -> the folder they are in."""
    if os.path.isdir(name_or_folder):
        return name_or_folder
    from huggingface_hub import snapshot_download
    name = f"openai-community/{name_or_folder}" if name_or_folder in PRESETS else name_or_folder
    try:
        return snapshot_download(name, allow_patterns=["config.json", "*.safetensors", "tokenizer.json"])
    except Exception as error:  # no network, no such name, no permission: a dozen classes of error
        raise UserError(f"{name_or_folder!r} is no folder here and can't be had from the Hugging Face hub "
                        f"({type(error).__name__}): check the name and the network") from error


def read_hf_config(folder):
    """The folder's config.json -> GPTConfig; UserError where it describes something else than GPT-2."""
    try:
        c = json.loads(Path(folder, "config.json").read_text())
        for key, must in HF_CONFIG.items():
            if c.get(key, None if key == "model_type" else must) != must:
                raise UserError(f"{folder} is no GPT-2: {key} is {c.get(key)!r} in its config.json, not {must!r}")
        return GPTConfig(c["n_positions"], c["vocab_size"], c["n_layer"], c["n_head"], c["n_embd"])
    except (OSError, json.JSONDecodeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} holds neither a checkpoint (ckpt_*.pt) nor a GPT-2 in Hugging Face's layout "
                        f"({type(error).__name__}: {error})") from error


def read_safetensors(folder):
    """All tensors of *.safetensors under our names: with
    "transformer." in front, without buffers and lm_head."""
    from safetensors.torch import load_file
    stored = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            stored.update(load_file(file))
        except Exception as error:  # safetensors has a class of its own for damaged files
            raise UserError(f"{file} can't be read ({error}): fetch it again") from error
    if not stored:
        raise UserError(f"{folder} holds no *.safetensors (pickled weights could run code, and are not read)")
    stored = {"transformer." + name.removeprefix("transformer."): w for name, w in stored.items()}
    head = stored.pop("transformer.lm_head.weight", None)
    if head is not None and not torch.equal(head, stored.get("transformer.wte.weight", head)):
        raise UserError(f"{folder}: lm_head and wte differ, GPT-2 has one matrix for both")
    # Older files hold the causal mask as h.N.attn.bias. Mind the dot: attn.c_attn.bias is a parameter.
    return {name: w for name, w in stored.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


# ---------------------------------------------------------------------------------------------------- 5. data
# fineweb.py leaves one long row of ids, cut into files ("shards"). We cut it further,
# into windows of block_size inputs, and number them. What a step reads is then a list
# of numbers, and that list depends on the seed and the step alone: not on the number
# of GPUs, not on the micro-batch, not on how often the run was interrupted.

def open_shards(data_dir, split):
    """The shards of a split in their order, [(file, ids)]; ids is a row of uint16 that stays on disk.

    Two layouts: numpy's .npy, and the .bin of llm.c and modded-nanogpt (256 int32: 20240520, 1, number
    of ids; then the ids). Nothing in a file is executed. UserError if there are none, or one is damaged.
    """
    shards, name = [], re.compile(rf".*_{split}_\d+\.(npy|bin)")
    for file in sorted(f for f in Path(data_dir).glob("*") if name.fullmatch(f.name)):
        try:
            if file.suffix == ".npy":
                ids = np.load(file, mmap_mode="r", allow_pickle=False)
            else:
                ids = np.memmap(file, dtype=np.uint16, mode="r", offset=1024)
                if tuple(np.fromfile(file, dtype=np.int32, count=3)) != (20240520, 1, len(ids)):
                    raise ValueError("its header is not that of a shard of this length")
            if ids.dtype != np.uint16 or ids.ndim != 1:
                raise ValueError(f"{ids.ndim}-dimensional {ids.dtype}, where a shard is a row of uint16")
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it and make it again with fineweb.py") from error
        shards.append((file, ids))
    if not shards:
        raise UserError(f"no {split} shards in {Path(data_dir).resolve()}: `python fineweb.py --out {data_dir}` "
                        "makes them from FineWeb-Edu, --source from other text; --preset laptop needs none")
    return shards


class Corpus:
    """One split, "train" or "val", of a folder of shards. Window i is block_size inputs, and one id more.

    UserError if there are no shards, one is damaged, or an id is not below vocab_size.
    """

    def __init__(self, data_dir, split, block_size, vocab_size):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.files, self.shards = zip(*open_shards(data_dir, split))
        self.n_tokens = sum(len(ids) for ids in self.shards)
        # The last target of a window is the first input of the next, so every id is an input at most once.
        counts = [max(0, len(ids) - 1) // block_size for ids in self.shards]
        self.first = np.cumsum([0, *counts])  # number of the first window of each shard
        self.n_windows = int(self.first[-1])
        for number, count in zip(self.first, counts):  # a foreign vocabulary shows here, not after an hour
            self.windows(range(number, number + min(count, 16)))

    def windows(self, numbers):
        """Numbers of n windows -> their ids, (n, T+1) int64 on the CPU."""
        n, T = len(numbers), self.block_size
        tokens = np.empty((n, T + 1), dtype=np.int64)                    # (n, T+1)
        for row, number in zip(tokens, numbers):
            shard = np.searchsorted(self.first, number, side="right") - 1
            start = (number - self.first[shard]) * T
            row[:] = self.shards[shard][start:start + T + 1]
            if row.max() >= self.vocab_size:
                raise UserError(f"{self.files[shard]} holds the id {row.max()}, but --vocab_size is "
                                f"{self.vocab_size}: it was made with another tokenizer")
        return torch.from_numpy(tokens)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order in which an epoch visits n windows: the same on every process, a new one each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def rows_of_step(step, n_windows, rows, cfg):
    """The numbers of the windows that make up a step, (rows,), whoever asks. A step never
    spans two epochs: what is left at the end of one, less than a step, is not read in it.

    >>> rows_of_step(1, 10, 4, TrainConfig(shuffle=False)), rows_of_step(2, 10, 4, TrainConfig(shuffle=False))
    (array([4, 5, 6, 7]), array([0, 1, 2, 3]))
    """
    epoch, at = divmod(step, n_windows // rows)
    order = permutation(n_windows, cfg.seed, epoch) if cfg.shuffle else np.arange(n_windows)
    return order[at * rows:(at + 1) * rows]                              # (rows,)


class DataLoaderLite:
    """Hands each process its share of a step, and reads the next step in a thread while this one trains."""

    def __init__(self, corpus, micro_batch_size, cfg, world):
        self.corpus, self.B, self.cfg, self.world = corpus, micro_batch_size, cfg, world
        self.thread, self.ahead = ThreadPoolExecutor(1), {}

    def read(self, step):
        """This process's share of a step: ids (A, B, T+1) on the CPU."""
        B, T, W = self.B, self.cfg.block_size, self.world.size
        rows = self.cfg.total_batch_size // T
        numbers = rows_of_step(step, self.corpus.n_windows, rows, self.cfg)  # (A*W*B,)
        # Micro-step i of process r takes rows (i*W + r)*B and on: whatever W and B are, the step is one set
        # of rows. Had each process a reading position of its own, they would soon be in different shards.
        mine = numbers.reshape(-1, W, B)[:, self.world.rank]             # (A, B)
        tokens = self.corpus.windows(mine.flatten()).view(-1, B, T + 1)  # (A, B, T+1)
        return tokens.pin_memory() if self.world.device.type == "cuda" else tokens

    def batch(self, step):
        """Inputs and targets of a step on the device, (A, B, T) each:
        the targets are the inputs, one id on."""
        future = self.ahead.pop(step, None) or self.thread.submit(self.read, step)
        tokens = future.result()                                         # (A, B, T+1)
        tokens = tokens.to(self.world.device, non_blocking=tokens.is_pinned())  # (A, B, T+1)
        if step + 1 < self.cfg.max_steps:
            self.ahead = {step + 1: self.thread.submit(self.read, step + 1)}
        x = tokens[:, :, :-1].contiguous()                               # (A, B, T)
        y = tokens[:, :, 1:].contiguous()                                # (A, B, T)
        return x, y


# ---------------------------------------------------------------------------------- 6. optimiser and schedule
# The recipe that GPT-3's paper gave and that GPT-2's left out. AdamW divides each parameter's
# averaged gradient by the root of its averaged square, so that every parameter moves by about the
# learning rate a step, whatever the size of its gradient. The first of these averages are noisy,
# hence the warm-up; and the last steps should settle rather than wander, hence the decay to a tenth.

def configure_optimizers(model, cfg, device):
    """The optimisers of a model, as a list: [AdamW] or [Muon, AdamW]. train_step sets their learning rate."""
    # Weight decay pulls towards zero what no gradient holds in place, so that
    # no weight grows without a reason. Matrices have such freedom. Biases and
    # gains only shift and scale, and pulling at them serves nothing.
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    # beta2 = 0.95 averages squared gradients over about 20 steps; Adam's default of 0.999, over 1,000,
    # reacts too late when they grow, and large batches are not noisy enough to need it (GPT-3, appendix B).
    adamw = functools.partial(torch.optim.AdamW, lr=cfg.max_lr, betas=(0.9, 0.95), eps=1e-8,
                              fused=device.type in ("cuda", "cpu"))  # one kernel for all parameters
    groups = [dict(params=decay, weight_decay=cfg.weight_decay), dict(params=no_decay, weight_decay=0.0)]
    if cfg.optimizer == "adamw":
        return [adamw(groups)]
    # Muon is for matrices that lead from channels to channels; embeddings stay with AdamW. match_rms_adamw
    # gives its updates the size of AdamW's, so that one learning rate serves both.
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    groups[0]["params"] = [model.transformer.wte.weight, model.transformer.wpe.weight]
    muon = Muon if device.type == "cpu" else torch.optim.Muon
    return [muon(hidden, lr=cfg.max_lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"),
            adamw(groups)]


class Muon(torch.optim.Muon):
    """Jordan et al. (2024): a momentum whose directions are made equally strong, so that all learn at one pace.

    PyTorch's own computes in bfloat16, at home on GPUs. A CPU may have to
    emulate that, and two processes rounded so would no longer equal one.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:  # without those that someone has frozen
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's idea: the newest gradient counts once more.
                update = p.grad.lerp(momentum, group["momentum"])        # (R, K)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(update), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(x):
    """A matrix (R, K) -> nearly the orthogonal one with its directions: singular values between 0.7 and 1.2."""
    if x.size(0) > x.size(1):  # the result is the same, but x x^T is smaller with the shorter side first
        return orthogonal(x.T).T
    x = x / x.norm().clamp(min=1e-7)                                     # (R, K)
    # x x^T x has the directions of x and the cubes of its singular values. So a polynomial of x changes these
    # alone, and this one, five times over, brings whatever lies between 0.01 and 1 close to 1.
    for _ in range(5):
        gram = x @ x.T                                                   # (R, R)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x     # (R, K)
    return x


def get_lr(step, cfg):
    """The learning rate of a step, the first being 0: a line up to max_lr, then half a cosine down to min_lr.

    >>> [round(get_lr(step, TrainConfig()), 12) for step in (0, 714, 715, 19072)]
    [8.39161e-07, 0.0006, 0.0006, 6e-05]
    """
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps  # + 1: at a rate of 0 the first step would be wasted
    if step >= cfg.max_steps - 1:
        return cfg.min_lr
    progress = (step - cfg.warmup_steps) / (cfg.max_steps - 1 - cfg.warmup_steps)  # 0 at the top, 1 at the end
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.max_lr - cfg.min_lr)


# --------------------------------------------------------------------------------------- 7. one training step
# Half a million ids do not fit into a GPU at once. So a step is cut twice: over the processes, W of them,
# and over time, into A micro-batches whose gradients add up. Neither cut may change the result: one process
# with A = 32, or eight with A = 4, make the same update from the same text. The tests hold the two to that.

def train_step(model, optimizers, x, y, lr, cfg, world):
    """One update from inputs and targets (A, B, T) -> (mean loss over all
    processes, norm of the whole gradient before clipping), two tensors on
    the device: to read their values is the only time that a step waits."""
    steps = len(x)
    loss_sum = torch.zeros((), device=world.device)                      # ()
    for i in range(steps):
        # Processes average their gradients at the end of backward(). Once, after the last micro-step, is enough.
        # DDP decides it in forward(): no_sync around backward() alone would change nothing, and around forward()
        # alone it would leave each process with gradients of its own.
        with world.no_sync(model) if i < steps - 1 else contextlib.nullcontext():
            with world.autocast():
                _, loss = model(x[i], y[i])                              # ()
            # backward() ADDS to .grad. After all micro-batches that would be the SUM of their gradients,
            # where one large batch has the MEAN: dividing makes the two equal. Clipping and AdamW both hide
            # it if this line is missing, for they look at the gradient's direction more than at its length.
            loss = loss / steps                                          # ()
            world.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    for optimizer in optimizers:
        world.scaler.unscale_(optimizer)  # float16 gradients were scaled up: clip what they really are
        for group in optimizer.param_groups:
            group["lr"] = lr
    # One odd batch must not throw the model off. If the gradient, taken as one long vector, is longer than
    # grad_clip, it is shortened to that. Its direction stays, as it would not if each entry were clipped.
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)  # ()
    for optimizer in optimizers:
        world.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    world.scaler.update()
    return world.sum(loss_sum) / world.size, norm


# ---------------------------------------------------------------------------------------------- 8. evaluation
# Three ways to look at a model: the loss on text that it never trains on, a
# multiple-choice test that others have taken too (hellaswag.py), and what it writes.

@contextlib.contextmanager
def evaluating(model):
    """For a while: eval mode, and no gradients. Afterwards the model is in the mode that it was found in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate_loss(model, corpus, B, cfg, world):
    """Mean loss in nats over the first val_tokens of a corpus -> (loss, ids scored), alike on every process.

    Counted in ids, not in batches: 20 batches are other text on 8 GPUs than on one,
    and their losses could not be compared. Losses and counts are summed over processes
    and divided once, since a mean of means would give a short batch too much weight.
    """
    n, T = min(max(1, cfg.val_tokens // cfg.block_size), corpus.n_windows), cfg.block_size
    totals = torch.zeros(2, dtype=torch.float64)                         # (2,)
    with evaluating(model):
        for start in range(world.rank * B, n, world.size * B):
            tokens = corpus.windows(range(start, min(start + B, n)))
            # A short last batch is filled up with -100, which counts as no target: for
            # a batch of another shape a compiled model would have to be compiled again.
            tokens = F.pad(tokens, (0, 0, 0, B - len(tokens)), value=-100)   # (B, T+1)
            x = tokens[:, :-1].clamp(min=0).to(world.device)             # (B, T)
            y = tokens[:, 1:].to(world.device)                           # (B, T)
            with world.autocast():
                _, loss = model(x, y)                                    # ()
            count = min(B, n - start) * T
            totals += torch.tensor([loss.item() * count, count], dtype=torch.float64)  # (2,)
    loss, count = world.sum(totals).tolist()
    return loss / count, int(count)


def continue_text(model, tokenizer, text, rows, new_tokens, seed, temperature=1.0, top_k=50):
    """`rows` continuations of a text, as texts; an empty text starts a new document."""
    prompt = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]
    device = model.transformer.wte.weight.device
    idx = torch.tensor([prompt] * rows, device=device)                   # (rows, T)
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(model):
        idx = model.generate(idx, new_tokens, temperature, top_k, generator, stop=tokenizer.eot_token)
    return [decode(tokenizer, row) for row in idx.tolist()]


def decode(tokenizer, row):
    """Ids -> the text of the first document in them: an <|endoftext|>
    in front is dropped, the next one ends it."""
    row = row[1:] if row[0] == tokenizer.eot_token else row
    end = row.index(tokenizer.eot_token) if tokenizer.eot_token in row else len(row)
    return tokenizer.decode(row[:end])


# ------------------------------------------------------------------ 9. plumbing (to be skipped at first reading)

# ---- processes and the device
# A process that trains alone and eight that train together run the same lines above; what differs is in here.

class World:
    """One process or many, on whatever device there is. It answers the same calls in
    every case, so that nobody else has to ask "is this DDP?". torchrun starts the
    processes, and tells each in the environment that it is number RANK of WORLD_SIZE,
    and number LOCAL_RANK on its machine; without torchrun there is process 0 of 1.
    """

    def __init__(self, cfg):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.distributed = "RANK" in os.environ  # also when torchrun starts one process: it takes the same path
        self.device = pick_device(cfg.device)
        self.dtype, why = pick_dtype(cfg.dtype, self.device)
        # float16 loses what is smaller than 6e-8, as many gradients are. The
        # scaler multiplies the loss, and with it the gradients, and divides
        # them again before the update. For other types it lets everything pass.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        cuda = self.device.type == "cuda"
        # What compiles for GPUs, Triton, is at home on Linux. On a CPU compiling has to be asked for.
        self.compile = cfg.compile == "1" or (cfg.compile == "auto" and cuda and sys.platform == "linux")
        self.gpu = torch.cuda.get_device_name(self.device) if cuda else ""
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32: what stays float32 is multiplied 10 bits deep
        if self.distributed:
            # torchrun keeps one store of addresses for all its restarts. The prefix keeps the addresses of the dead
            # from us; several machines count restarts each for itself, and have to do without.
            store, rank, size = next(dist.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
            # Were DDP the last to let go of the group, it would keep Python's lock and wait for threads that want it.
            self.group = dist.group.WORLD
        self.print(f"device {f'{self.device} {self.gpu}'.strip()}, processes {self.size}, "
                   f"compile {int(self.compile)}, {str(self.dtype).removeprefix('torch.')} ({why})")

    def print(self, *words):
        """Print once, not once a process."""
        if self.rank == 0:
            print(*words, flush=True)

    def autocast(self):
        """Matrix products in self.dtype, norms and losses in float32.
        For float32 itself it changes nothing."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def wrap(self, model):
        """The same model, the same parameters, but backward() averages the gradients over processes.

        It sends all of them once a step, 498 MB at 124M. As views of DDP's buckets they are not stored twice.
        """
        return DDP(model, gradient_as_bucket_view=True) if self.distributed else model

    def no_sync(self, model):
        """Inside, backward() adds to the gradients of this process alone."""
        return model.no_sync() if self.distributed else contextlib.nullcontext()

    def sum(self, tensor):
        """A tensor, added up over all processes: the one reduction that every backend knows."""
        if self.distributed:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Is it so on any process? All get the same answer, and so all do the same next."""
        return bool(flag) if self.size == 1 else self.sum(torch.tensor(float(flag))).item() > 0

    def first(self, do):
        """Process 0 does something while the others wait. If it meets wrong input, all of them stop."""
        error = None
        if self.rank == 0:
            try:
                do()
            except UserError as found:
                error = found
        if self.any(error is not None):
            raise error or UserError("process 0 has said why")

    def close(self):
        if self.distributed:
            dist.destroy_process_group()


def pick_device(name):
    """What --device names, or with "auto" the best there is. Process i of a machine gets its GPU number i."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used here ({str(error).splitlines()[0]}): try cpu") from None


def pick_dtype(name, device):
    """The dtype of activations, and why: bfloat16 has float32's range,
    float16 has not and needs the scaler."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type != "cuda":
        return torch.float32, "the safe choice off CUDA"
    if torch.cuda.get_device_capability(device) >= (8, 0):  # is_bf16_supported() counts emulation
        return torch.bfloat16, "this GPU computes in it"
    return torch.float16, "this GPU is older than bfloat16"


def fit_micro_batch(model, cfg, world):
    """Rows per forward: as asked, or with "auto" the most that fit, among the divisors of a process's rows.

    On a GPU we try a forward and backward with 64 rows, then with fewer as long as memory runs out. We do so
    on the model without DDP: no process may wait for one that failed. A CPU is busy with 4,096 ids at a time.
    """
    if cfg.micro_batch_size != "auto":
        return cfg.micro_batch_size

    def fits(B):
        spare = loss = None
        try:  # Adam's two moments and DDP's buckets of gradients: three more numbers for each parameter
            spare = torch.empty(3, sum(p.numel() for p in model.parameters()), device=world.device)
            x = torch.zeros(B, cfg.block_size, dtype=torch.long, device=world.device)  # (B, T)
            with world.autocast():
                _, loss = model(x, x)                                    # ()
            loss.backward()
        except torch.OutOfMemoryError:
            return False
        finally:
            del spare, loss
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    rows, cuda = cfg.total_batch_size // cfg.block_size // world.size, world.device.type == "cuda"
    for B in range(64 if cuda else max(1, 4096 // cfg.block_size), 0, -1):
        if rows % B == 0 and not world.any(cuda and not fits(B)):
            return B
    raise UserError("not one row fits into the memory of this GPU: use a smaller --block_size or --preset")


@contextlib.contextmanager
def catch_signals():
    """Turn SIGTERM, which schedulers send, and Ctrl-C into a request.
    The loop looks for it between two steps."""
    # A handler can run between any two instructions, in the middle of an update too. To save from within it could
    # store a model that is half old and half new, so it does no more than leave a note.
    stop = SimpleNamespace(asked=False)

    def handler(signum, frame):
        if signum == signal.SIGINT and stop.asked:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        stop.asked = True

    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT) if in_main}
    try:
        yield stop
    finally:
        for s, old in before.items():
            signal.signal(s, old)


# ---- the log
# Three words a line are enough for every plot, can be read while they are written, and survive a
# crash: whoever reads them takes the last value of a step, and skips a last line that is not complete.

class Log:
    """log_dir/log.txt, a line `step stream value` for each number, and config.json beside it.

    The streams are train, val, hella, lr, norm and tok/s. A resumed run goes on in the same file, from
    which all that belongs to later steps is cut away; a new run moves aside what an earlier one left.
    `values` holds the same numbers as {stream: {step: value}}. UserError if log_dir can't be written.
    """

    def __init__(self, cfg, world, start):
        self.values, self.file, self.tracker = {}, None, None
        self.began = self.drawn = time.monotonic()
        world.first(lambda: self.open(cfg, start))

    def open(self, cfg, start):
        """For process 0: make the folder, keep of what is there what is to be kept, and open the file."""
        path = Path(cfg.log_dir, "log.txt")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.tracker = start_tracker(cfg) if cfg.wandb else None
            moved = None if cfg.resume else put_aside(path.parent)
            old = path.read_text().splitlines(keepends=True) if path.exists() else []
            old = [line for line in old if re.fullmatch(LOG_LINE, line) and int(line.split()[0]) < start]
            write_whole(path, "".join(old).encode())
            write_whole(path.with_name("config.json"), json.dumps({**asdict(cfg), "resume": False}, indent=2).encode())
            self.file = open(path, "a", buffering=1)  # hands every line over as soon as it is complete
        except OSError as error:
            raise UserError(f"can't write to --log_dir {cfg.log_dir}: {error}") from error
        if moved:
            print(moved)
        for step, stream, value in map(str.split, old):
            self.values.setdefault(stream, {})[int(step)] = float(value)

    def write(self, step, streams):
        """write(3, {"train": 4.2, "norm": 0.9}) writes two lines."""
        for stream, value in streams.items():
            self.values.setdefault(stream, {})[step] = value
        if self.file:
            try:
                self.file.write("".join(f"{step} {stream} {value:.8g}\n" for stream, value in streams.items()))
            except OSError as error:  # a full disk: the lines wait in memory, and go out with later ones
                print(f"WARNING: the log of step {step} can't be written yet: {error}")
        if self.tracker:
            self.tracker.log(streams, step=step)

    def show(self, step, texts):
        """Samples, for the tracker; the console has them already."""
        if self.tracker:
            import wandb
            self.tracker.log({"samples": wandb.Table(columns=["text"], data=[[text] for text in texts])}, step=step)

    def draw(self, step, cfg):
        """Refresh log_dir/log.png, on process 0 and at most twice a minute. A failure costs one warning."""
        since = self.began if step == cfg.max_steps else self.drawn  # all but runs of seconds draw their end
        if self.file and time.monotonic() > since + 30:
            self.drawn = time.monotonic()
            try:
                save_figure(draw_logs({cfg.log_dir: (self.values, asdict(cfg))}), Path(cfg.log_dir, "log.png"))
            except Exception as error:  # no matplotlib, no room, no fonts: a picture is not worth a run
                self.began = self.drawn = math.inf
                print(f"WARNING: no picture of the log ({type(error).__name__}: {error})")

    def close(self, checkpoint=None):
        """The end of a run; a tracker keeps its last checkpoint, if it came to its last step."""
        if self.file:
            self.file.close()
        if self.tracker:
            if checkpoint:
                self.tracker.log_artifact(checkpoint, name=f"checkpoint-{self.tracker.id}", type="model")
            self.tracker.finish()


# A line of log.txt: step, stream, value.
LOG_LINE = r"(\d+) (\S+) (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|-?inf)\n"


def start_tracker(cfg):
    """A run at Weights & Biases. Its files lie in log_dir, and what was resumed is one group there."""
    try:
        import wandb
        return wandb.init(project=cfg.wandb, group=Path(cfg.log_dir).name, dir=cfg.log_dir,
                          config=asdict(cfg))
    except ImportError:
        raise UserError("--wandb needs a package that is not here: pip install wandb") from None
    except wandb.Error as error:
        raise UserError(f"--wandb {cfg.wandb}: {' '.join(str(error).split())}") from error


def put_aside(folder):
    """Move an earlier run's files into folder/earlier-1 (or -2 ...), so that a new run overwrites nothing."""
    kinds = ("log.txt", "log.png", "config.json", "ckpt_*.pt", "tokenizer*.json")
    old = [file for kind in kinds for file in folder.glob(kind)]
    if old:
        number = 1
        while (aside := folder / f"earlier-{number}").exists():
            number += 1
        aside.mkdir()
        for file in old:
            file.rename(aside / file.name)
        return f"{folder} held a run, which is now in {aside} (--resume would have continued it)"


def write_whole(path, content):
    """Write bytes, or what torch.save makes of a dict, so that the file is there as a whole or not at all.

    Renaming is the trick: it happens at once or does not happen. Whenever we are killed, the name belongs to the
    old content or to the new one, never to half of it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # down to the disk, before the name says that it is there
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- a picture of the log

# GPT-2 (124M) on FineWeb-Edu's val shard and on HellaSwag (build-nanogpt's figures), and two public runs of
# the paper run's recipe on the same text, {step: value}. The first of them had twice our max_lr.
GPT2_124M = dict(loss=3.2924, hella=0.294463)
PUBLIC_RUNS = {
    "sukhvir-notra/gpt2": dict(
        loss={0: 10.952, 250: 5.934, 500: 5.039, 1000: 3.984, 2000: 3.580, 5000: 3.322, 10000: 3.174, 15000: 3.084,
              19072: 3.041},
        hella={0: 0.2495, 1000: 0.2627, 2000: 0.2682, 5000: 0.2767, 10000: 0.2900, 15000: 0.3007, 19072: 0.3073}),
    "logbob0401/build-nanogpt": dict(
        loss={0: 10.951, 250: 6.144, 500: 5.274, 1000: 4.137, 2000: 3.646, 5000: 3.335, 10000: 3.176, 15000: 3.086,
              19072: 3.053},
        hella={0: 0.2490, 1000: 0.2566, 2000: 0.2614, 5000: 0.2769, 10000: 0.2917, 15000: 0.2979, 19072: 0.3022}),
}
LOG_TITLES = {"loss": "loss: train (thin), val (dots)", "hella": "HellaSwag, acc_norm", "lr": "learning rate",
              "norm": "norm of the gradient", "tok/s": "tokens a second"}


def read_log(source):
    """A log folder or a log file, ours or build-nanogpt's -> ({stream: {step: value}}, its config.json or {})."""
    path, values = Path(source), {}
    files = [path] if path.is_file() else sorted(path.glob("*log.txt"), key=lambda file: len(file.name))
    for line in files[0].read_text(errors="replace").splitlines(keepends=True) if files else []:
        if found := re.fullmatch(LOG_LINE, line):  # the last value of a step counts, half a line does not
            values.setdefault(found[2], {})[int(found[1])] = float(found[3])
    if not values:
        raise UserError(f"--log_dir {source}: there is no log.txt with lines `step stream value`")
    config = files[0].with_name("config.json")
    return values, read_json(config) if config.exists() else {}


def draw_logs(logs):
    """{name: what read_log returned} -> a figure: losses and HellaSwag, below them lr, norm and tok/s.

    GPT-2's loss and the public runs are drawn only beside runs on their text in their vocabulary, since other
    losses do not compare. A log without a config.json is taken to be build-nanogpt's, which is one of them.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and may look for a screen
    streams = {stream for values, _ in logs.values() for stream in values}
    rows = [name for name in ("lr", "norm", "tok/s") if name in streams]
    rows = [["loss"] + ["hella"] * ("hella" in streams)] + [rows] * bool(rows)
    figure = Figure(figsize=(10, 1.5 + 2.5 * len(rows)), layout="constrained")
    panels = figure.subplot_mosaic([[name for name in row for _ in range(6 // len(row))] for row in rows],
                                   height_ratios=[2, 1][:len(rows)])
    for number, (name, (values, c)) in enumerate(logs.items()):
        text = f" on {Path(c['data_dir']).name}" if "data_dir" in c else ""
        for stream in sorted(values.keys() & {*panels, "train", "val"}):  # val lies on top of train
            steps, points = zip(*sorted(values[stream].items()))
            look = dict(linewidth=0.7, alpha=0.7)
            if stream in ("val", "hella"):
                look = dict(marker=".", label=f"{name}: {points[-1]:.4f}" + text * (stream == "val"))
            panels["loss" if stream in ("train", "val") else stream].plot(steps, points, color=f"C{number}", **look)
    # Which text it is, is told by the name of its folder: data/edu_fineweb10B, as fineweb.py calls it.
    comparable = [c for _, c in logs.values() if "edu" in Path(c.get("data_dir", "edu")).name and
                  c.get("vocab_size", 50304) in (50257, 50304)]
    end = max(step for values, _ in logs.values() for points in values.values() for step in points)
    for name in panels.keys() & GPT2_124M.keys() if comparable else ():
        panels[name].axhline(GPT2_124M[name], color="red", label=f"GPT-2 (124M): {GPT2_124M[name]:.4f}")
        for marker, (run, points) in zip("xd", PUBLIC_RUNS.items()):
            steps = [step for step in points[name] if step <= end]
            panels[name].scatter(steps, [points[name][step] for step in steps], marker=marker, c="gray", label=run,
                                 zorder=3)  # above the curves
    if comparable and "hella" in panels:
        panels["hella"].axhline(0.337, color="green", label="GPT-3 (125M): 0.337")
    for name, panel in panels.items():
        panel.set(title=LOG_TITLES[name], xlabel="step")
        panel.grid(alpha=0.3)
        if name in ("loss", "hella") and panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    panels["loss"].set_yscale("log")  # the end of a run, where little moves, deserves room too
    panels["loss"].yaxis.set_major_formatter("{x:g}")
    panels["loss"].yaxis.set_minor_formatter("{x:g}")
    return figure


def save_figure(figure, path):
    """Write a picture so that whoever looks at it never sees half of one."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=80)
    os.replace(temporary, path)


# ---- checkpoints
# The promise: killed at any moment and resumed, a run ends with the same weights and the same log, to the
# last bit on a CPU. It is easy to keep, since all that a step needs is the state before it and its number;
# it takes files that are never half written, and a log that forgets what came after the checkpoint.

# What a resumed run can't change: its weights would not fit, or its text would not be what comes next.
FIXED = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "optimizer", "shuffle", "seed",
         "total_batch_size")
# And what else decides how it comes out, for a model card.
SCHEDULE = ("max_steps", "max_lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip")


def save_checkpoint(step, run, cfg, world):
    """Write log_dir/ckpt_STEP.pt: all that the rest of the run depends
    on, as tensors, numbers, strings, dicts.

    Random states are not among it. First weights, order of the text and
    samples are drawn from (seed, step) anew, as dropout would be in a fork
    that has it. If the disk is full we warn and go on: older checkpoints stay.
    """
    if world.rank == 0:
        try:
            file = Path(cfg.log_dir, f"ckpt_{step:08d}.pt")
            write_whole(file, dict(
                step=step, config=asdict(cfg), data=run.data, model=run.raw_model.state_dict(),
                optimizers=[o.state_dict() for o in run.optimizers], scaler=world.scaler.state_dict()))
            files = checkpoint_files(cfg.log_dir)
            for old in files[files.index(file) + cfg.keep_checkpoints:]:  # damaged newer ones do not count
                old.unlink()
        except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
            world.print(f"WARNING: the checkpoint of step {step} can't be written, older ones stay: {error}")


def checkpoint_files(folder):
    """The checkpoints of a log folder, newest first."""
    return sorted(Path(folder).glob("ckpt_*.pt"), reverse=True)


def load_checkpoint(file):
    """What save_checkpoint wrote, or UserError.

    weights_only: a pickle is a program that builds objects, and could do anything else as well; this way it may
    only build tensors, numbers, strings, lists and dicts. mmap: what nobody asks for is never read from the disk.
    """
    try:
        checkpoint = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        model_config(checkpoint["config"])
        return {k: checkpoint[k] for k in ("step", "config", "data", "model", "optimizers", "scaler")}
    except Exception as error:  # damaged files fail in a dozen ways
        raise UserError(f"{file} is no good checkpoint ({type(error).__name__})") from error


def find_checkpoint(source, tell=print):
    """The checkpoint in a file, or the newest good one in a log folder; None where there is none at all."""
    files = [source] if os.path.isfile(source) else checkpoint_files(source)
    for file in files:
        try:
            return load_checkpoint(file)
        except UserError as error:
            if file == files[-1]:
                raise
            tell(f"{error}: trying the one before")


def restore(checkpoint, run, cfg, world):
    """Put a run into a checkpoint's state -> its step. UserError with the differences if model or data changed.

    The number of processes, the micro-batch, the device and all that is measured or saved may be others: none of
    them decides what a step reads or does. So may the schedule, for those who want a longer run or a lower rate.
    """
    now = {**{name: getattr(cfg, name) for name in FIXED}, **run.data}
    then = {**checkpoint["config"], **checkpoint["data"]}
    differences = [f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
    if differences:
        raise UserError(f"--resume: the run in {cfg.log_dir} has other settings ({', '.join(differences)}): give it "
                        "its own, or start a new one in another --log_dir")
    try:
        run.raw_model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(run.optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--resume: the model in {cfg.log_dir} has other parameters than this code's") from error
    world.scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"]


# ---- models and tokenizers from anywhere

def read_model(source):
    """The GPT of a name, a Hugging Face folder, a checkpoint file, or a log folder (its newest good one)."""
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return GPT.from_pretrained(source)
    model = GPT(model_config(checkpoint["config"]))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{source}: its weights do not have the shapes that its configuration gives") from error
    model.n_vocab = checkpoint["data"]["n_vocab"]
    return model


def read_tokenizer(source):
    """The tokenizer that goes with read_model(source): the one that lies beside the weights, else GPT-2's."""
    folder = os.path.dirname(source) or "." if os.path.isfile(source) else fetch_pretrained(source)
    return load_tokenizer(folder if Path(folder, "tokenizer.json").exists() else "gpt2")


def load_model(source):
    """(model, tokenizer) of a name, a Hugging Face folder, a checkpoint file, or a log folder."""
    return read_model(source), read_tokenizer(source)


def model_config(values):
    """The GPTConfig within a dict that has its fields and perhaps others."""
    return GPTConfig(**{field.name: values[field.name] for field in fields(GPTConfig)})


def first_model(cfg):
    """The model that a run begins with: fresh weights, or those that --init names.

    A shorter --block_size than theirs is fine, the positions beyond it are dropped. Anything else that differs
    would leave weights without a place, and is a UserError.
    """
    torch.manual_seed(cfg.seed)  # the same weights on every process
    wanted = model_config(asdict(cfg))
    if cfg.init == "scratch":
        return GPT(wanted)
    model = read_model(cfg.init)
    wrong = [f"{name} {has}" for name, has in asdict(model.config).items() if has != getattr(cfg, name)
             and not (name == "block_size" and has > cfg.block_size)]
    if wrong:
        raise UserError(f"--init {cfg.init} has {', '.join(wrong)}: leave these flags out")
    model.transformer.wpe = nn.Embedding.from_pretrained(model.transformer.wpe.weight[:cfg.block_size], freeze=False)
    model.config = wanted
    return model


# ---- the command line
# There is one list of settings, the fields of TrainConfig, and one parser
# made from it. Presets, files and what a checkpoint remembers are turned into
# words of a command line, and are then checked as if someone had typed them.

def parse_config(action, argv):
    """Words -> (TrainConfig, {what the action takes besides}). The fields of TrainConfig are the flags.

    Where a value is given twice the later wins: defaults, what --init or --resume found, --preset, --config,
    the words themselves. All of them pass through one parser, so one place checks every name and every value.
    """
    def words(values):
        return [f"--{name}={value}" for name, value in values.items()]

    # Twice through the parser: first to see what the words name, then with what was found there in front of them.
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun starts anew after a death
        argv = ["--resume", *argv]
    parser = make_parser(action)
    given = vars(parser.parse_args(argv))
    log_dir = given.get("log_dir", TrainConfig.log_dir)
    init = given.get("init", "scratch" if action in ("train", "plot") else log_dir)
    front = words(PRESETS[given["preset"]]) if "preset" in given else []
    if "config" in given:
        front += words(read_json(given["config"]))
    if init != "scratch":
        # To evaluate a checkpoint or sample from it, take all settings of its run; to start another run from it,
        # only the shape of its model.
        checkpoint = find_checkpoint(init)
        found = checkpoint["config"] if checkpoint else asdict(read_hf_config(fetch_pretrained(init)))
        found = asdict(model_config(found)) if action == "train" else found
        front = words({**found, "init": init}) + front
    if given.get("resume") and Path(log_dir, "config.json").exists():  # so no flag has to be repeated
        front = words(read_json(Path(log_dir, "config.json"))) + front
    values = vars(parser.parse_args(front + argv))
    cfg = TrainConfig(**{field.name: values.pop(field.name) for field in fields(TrainConfig) if field.name in values})
    check_config(cfg)
    return cfg, {name: value for name, value in values.items() if name not in ("preset", "config")}


def make_parser(action):
    """A parser whose flags are the fields of TrainConfig, and whose help is the comments behind them."""
    def yes_or_no(text):  # type=bool would take any word for a yes, "0" and "False" too
        return ("0", "1", "False", "True").index(text) % 2 == 1

    def rows(text):
        return text if text == "auto" else int(text)

    # Without abbreviations, or --max would be max_steps until a second field begins so. And with SUPPRESS what
    # nobody gave is absent, so that it can be told from what was given its default.
    parser = Parser(prog=f"train_gpt2.py {action}", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    source = inspect.getsource(GPTConfig) + inspect.getsource(TrainConfig)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    special = {bool: dict(type=yes_or_no, nargs="?", const=True), int | str: dict(type=rows)}
    for field in fields(TrainConfig):
        choices = typing.get_args(field.type)  # what Literal[...] lists
        options = special.get(field.type) or (dict(choices=choices) if choices else dict(type=field.type))
        parser.add_argument(f"--{field.name}", help=comments[field.name].replace("%", "%%"), **options)
    parser.add_argument("--preset", choices=PRESETS, help="a set of values for the flags above")
    parser.add_argument("--config", metavar="FILE.json", help="a file of flags, such as the config.json of a run")
    for name, options in ACTIONS[action][1].items():
        parser.add_argument(name, **options)
    return parser


def read_json(file):
    """A JSON file that holds one object -> dict; UserError if it is anything else."""
    try:
        return dict(json.loads(Path(file).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} can't be read as JSON: {error}") from error


def check_config(cfg):
    """UserError, in one line, for values that can't work: before anything is loaded or written."""
    zero_is_fine = ("resume", "shuffle", "seed", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "val_every",
                    "hellaswag_every", "sample_every", "checkpoint_every")
    for name, value in asdict(cfg).items():
        if not (isinstance(value, str) or value > 0 or (value == 0 and name in zero_is_fine)):
            raise UserError(f"--{name} {value}: must {'not be negative' if name in zero_is_fine else 'be above 0'}")
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"--n_embd {cfg.n_embd} can't be shared out to --n_head {cfg.n_head}: make it a multiple")
    if cfg.min_lr > cfg.max_lr:
        raise UserError(f"--min_lr {cfg.min_lr} is above --max_lr {cfg.max_lr}")


def check_sizes(cfg, meta, train, val, world):
    """UserError where a step can't be cut into equal parts, or the data does not go with the model."""
    n_vocab, part = meta["vocab_size"], cfg.block_size * world.size
    part *= 1 if cfg.micro_batch_size == "auto" else cfg.micro_batch_size
    most = train.n_windows * cfg.block_size // part * part
    if cfg.total_batch_size % part:
        nearest = max(1, round(cfg.total_batch_size / part)) * part
        raise UserError(f"--total_batch_size {cfg.total_batch_size} is no multiple of {part}, the product of "
                        f"micro_batch_size, block_size and processes: use {nearest}")
    # A few rows too many pad the matrix to a size that is fast; many too many mean that these do not belong together.
    if not n_vocab <= cfg.vocab_size < n_vocab + 128:
        raise UserError(f"{cfg.data_dir} has a vocabulary of {n_vocab} ids ({meta['tokenizer']}), the model one of "
                        f"{cfg.vocab_size}: use --vocab_size {-(-n_vocab // 128) * 128}, or other data")
    if cfg.total_batch_size > most:
        raise UserError(f"{cfg.data_dir} has {train.n_tokens} train tokens, less than a step of "
                        f"{cfg.total_batch_size}: use more text, or " +
                        (f"--total_batch_size {most}" if most else "a smaller --block_size"))
    if val.n_windows == 0:
        raise UserError(f"the val split of {cfg.data_dir} is shorter than --block_size {cfg.block_size}: "
                        "use more text")


# ---- what a run says of itself

def read_meta(data_dir):
    """What fineweb.py noted of its shards: tokenizer, vocabulary, and of each shard the ids and bytes of text.

    Shards from elsewhere, which have no meta.json, are taken to be GPT-2's ids. UserError for unfinished ones.
    """
    path = Path(data_dir, "meta.json")
    if path.with_name("progress.json").exists() and not path.exists():
        raise UserError(f"{data_dir} is not finished: give the same fineweb.py command again, it goes on")
    return dict(tokenizer="gpt2", vocab_size=50257, shards=[]) | (read_json(path) if path.exists() else {})


def describe_loss(loss, tokens, cfg, meta):
    """A val loss with the name of its text, without which it says nothing. Where the bytes of that text are
    known it is given in bits per byte as well, the one loss that compares between vocabularies."""
    val = [shard for shard in meta["shards"] if shard["split"] == "val" and shard.get("bytes")]
    bits = ""
    if val:
        bytes_per_token = sum(shard["bytes"] for shard in val) / sum(shard["tokens"] for shard in val)
        bits = f", {loss / math.log(2) / bytes_per_token:.4f} bits per byte"
    return f"val loss {loss:.4f}{bits} (on {tokens:,} tokens of {cfg.data_dir})"


def describe_run(run, train, cfg, world):
    """What is about to happen."""
    T, rows = cfg.block_size, cfg.total_batch_size // cfg.block_size
    steps_per_epoch = train.n_windows // rows
    scored = min(max(1, cfg.val_tokens // T), run.val.n_windows) * T
    world.print(f"model: {run.raw_model.num_params():,} parameters\n"
                f"data: {cfg.data_dir} ({run.meta['tokenizer']}), {train.n_tokens:,} train tokens, of which an epoch "
                f"reads {steps_per_epoch * rows * T:,} in {steps_per_epoch:,} steps\n"
                f"val: {scored:,} of {run.val.n_tokens:,} tokens\n"
                f"batch: {cfg.total_batch_size:,} tokens = {run.B} rows x {T} tokens x "
                f"{rows // run.B // world.size} accumulated x {world.size} processes\n"
                f"steps: {run.start} to {cfg.max_steps}, {cfg.max_steps / steps_per_epoch:.2f} epochs; "
                f"log and checkpoints go to {cfg.log_dir}")
    if cfg.warmup_steps >= cfg.max_steps:
        world.print(f"note: the run ends within its {cfg.warmup_steps} steps of warm-up and never reaches max_lr")
    if cfg.resume and run.start == 0:
        world.print(f"--resume: {cfg.log_dir} has no checkpoint yet, so this is the start")


# Dense 16-bit matrix products a second, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}


def describe_step(step, loss, lr, norm, run, cfg, world):
    """The console's line for a step: losses, pace, the time left, and
    the share of the GPU's arithmetic in use.

    That share, "model FLOPs utilisation", counts 6N + 12LHQT
    operations a token (PaLM, appendix B; our C is HQ).
    """
    # The median of the last steps: the first one, in which the model is compiled, would spoil any mean.
    seconds, recent = run.seconds[-1], sorted(run.seconds[-21:])
    left = int((cfg.max_steps - step - 1) * recent[len(recent) // 2])
    tok_s = cfg.total_batch_size / seconds
    peak, mfu = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in world.gpu), None), ""
    if peak:
        n = run.raw_model.num_params() - run.raw_model.transformer.wpe.weight.numel()  # looking up is no product
        mfu = f" | MFU {(6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size) * tok_s / world.size / peak:.1%}"
    return (f"step {step:5d} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | {seconds * 1000:.1f} ms | "
            f"{tok_s:,.0f} tok/s{mfu} | ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")


def describe_end(cfg, world):
    """Where everything is, and what to try next."""
    if world.device.type == "cuda":
        world.print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    world.print(f"done: log, configuration and checkpoints are in {cfg.log_dir}. Try next:\n"
                f"  python train_gpt2.py sample --init {cfg.log_dir} {json.dumps(cfg.prompt)}\n"
                f"  python train_gpt2.py eval --init {cfg.log_dir}\n"
                f"  python train_gpt2.py plot --log_dir {cfg.log_dir}\n"
                f"  python train_gpt2.py export --init {cfg.log_dir} --out my-gpt2")


# --------------------------------------------------------------------------------------------------- 10. main
# `train` builds a run and gives it to `loop`. At each turn the loop saves
# and measures what is due, and takes one step. Evaluations come before the
# first step and after the last, so the log begins and ends with a val loss.

def loop(run, cfg, world, stop):
    """Save, measure, train, again and again. `step` is the number of updates that the weights have had."""
    for step in range(run.start, cfg.max_steps + 1):
        stopping = world.any(stop.asked)  # a signal to one process stops all, and all at the same step
        # Save before measuring: an evaluation takes a while, and machines die at the worst of times.
        if step > run.start and (stopping or due(step, cfg.checkpoint_every, cfg)):
            save_checkpoint(step, run, cfg, world)
        if stopping:
            world.print(f"stopped after {step} steps, as asked; to continue: python train_gpt2.py --resume "
                        f"--log_dir {cfg.log_dir}")
            return
        measure(step, run, cfg, world)
        if due(step, cfg.val_every, cfg) or due(step, cfg.hellaswag_every, cfg):
            run.log.draw(step, cfg)
        if step == cfg.max_steps:
            break

        started = time.perf_counter()
        torch.manual_seed(cfg.seed + step * world.size + world.rank)  # for forks that draw in a step
        lr = get_lr(step, cfg)
        x, y = run.loader.batch(step)                                    # (A, B, T)
        loss, norm = train_step(run.model, run.optimizers, x, y, lr, cfg, world)
        loss, norm = loss.item(), norm.item()  # waits for the device: only now is the step over
        run.seconds.append(time.perf_counter() - started)

        # Infinite gradients are nothing strange in float16: the scaler leaves out such a step and scales by less.
        if not math.isfinite(loss) or not (math.isfinite(norm) or world.scaler.is_enabled()):
            raise UserError(f"step {step}: loss {loss}, norm of the gradient {norm}, learning rate {lr:.3g}. The "
                            f"checkpoints in {cfg.log_dir} are from before: --resume with a lower --max_lr, or with "
                            "--dtype float32")
        run.log.write(step, {"train": loss, "lr": lr, "norm": norm, "tok/s": cfg.total_batch_size / run.seconds[-1]})
        world.print(describe_step(step, loss, lr, norm, run, cfg, world))
    describe_end(cfg, world)


def due(step, every, cfg):
    """Is it time for what is done every so many steps (0: never) and after the last one?"""
    return every > 0 and (step % every == 0 or step == cfg.max_steps)


def measure(step, run, cfg, world):
    """Val loss, HellaSwag and samples, each when it is due."""
    if due(step, cfg.val_every, cfg):
        loss, tokens = evaluate_loss(run.model, run.val, run.B, cfg, world)
        run.log.write(step, {"val": loss})
        world.print(f"step {step:5d} | {describe_loss(loss, tokens, cfg, run.meta)}")
    if run.hellaswag and due(step, cfg.hellaswag_every, cfg):
        score = score_hellaswag(run.raw_model, run.hellaswag, run.tokenizer, world)
        run.log.write(step, {"hella": score["acc_norm"]})
    if run.tokenizer and due(step, cfg.sample_every, cfg) and world.rank == 0:
        texts = continue_text(run.raw_model, run.tokenizer, cfg.prompt, 2, 64, cfg.seed + step)
        for text in texts:
            world.print("sample | " + text.replace("\n", "\n       | "))
        run.log.show(step, texts)


def build_run(cfg, world):
    """All that the loop needs. What is wrong with the input comes out here, before it has cost anything."""
    prepare_builtin(cfg, world)
    run = SimpleNamespace(meta=read_meta(cfg.data_dir), seconds=[])
    train = Corpus(cfg.data_dir, "train", cfg.block_size, cfg.vocab_size)
    run.val = Corpus(cfg.data_dir, "val", cfg.block_size, cfg.vocab_size)
    check_sizes(cfg, run.meta, train, run.val, world)
    run.data = dict(tokenizer=run.meta["tokenizer"], n_vocab=run.meta["vocab_size"], train_tokens=train.n_tokens)
    run.tokenizer = find_tokenizer(cfg, run.meta, world)
    # If the run is long enough to come to HellaSwag, ask for its questions now rather than fail in an hour.
    run.hellaswag = find_hellaswag(world) if 0 < cfg.hellaswag_every <= cfg.max_steps else None

    cfg.resume = world.any(cfg.resume)  # torchrun tells of a restart only where a process died
    checkpoint = find_checkpoint(cfg.log_dir, world.print) if cfg.resume else None
    run.raw_model = GPT(model_config(asdict(cfg))) if checkpoint else first_model(cfg)
    run.raw_model.n_vocab = run.meta["vocab_size"]
    run.raw_model.to(world.device)
    run.optimizers = configure_optimizers(run.raw_model, cfg, world.device)
    run.start = restore(checkpoint, run, cfg, world) if checkpoint else 0
    if world.any(world.sum(torch.tensor(float(run.start))).item() != run.start * world.size):
        raise UserError(f"--log_dir {cfg.log_dir} holds other checkpoints on other machines: use a folder they share")
    # Three names for one set of parameters. Training and val loss have fixed
    # shapes and go through `model`, which is compiled and averages; HellaSwag,
    # samples and checkpoints use `raw_model`, which takes any shape.
    compiled = torch.compile(run.raw_model, dynamic=False) if world.compile else run.raw_model
    run.B = fit_micro_batch(compiled, cfg, world)
    run.model = world.wrap(compiled)
    run.loader = DataLoaderLite(train, run.B, cfg, world)
    run.log = Log(cfg, world, run.start)
    if world.rank == 0 and run.tokenizer and run.meta["tokenizer"] != "gpt2":
        save_tokenizer(run.tokenizer, cfg.log_dir)  # so that the log folder alone is enough to sample from
    describe_run(run, train, cfg, world)
    return run


def prepare_builtin(cfg, world):
    """The laptop preset's text comes with Python itself: make its shards if nobody has.

    This is the only data that a run makes for itself. Anything else takes hours or a network, and a night that
    begins with a surprise is worse than a line that names the command.
    """
    def make():  # process 0 alone looks whether they are there: a late one would find them and not wait for the rest
        if not Path(cfg.data_dir, "meta.json").exists():
            import fineweb
            fineweb.main(["--source", "builtin", "--tokenizer", f"bpe:{cfg.vocab_size}", "--out", cfg.data_dir])

    if cfg.data_dir == PRESETS["laptop"]["data_dir"]:
        world.first(make)


def find_tokenizer(cfg, meta, world):
    """The tokenizer of the data, for samples and HellaSwag; training reads ids and can do without."""
    try:
        return load_tokenizer("gpt2" if meta["tokenizer"] == "gpt2" else cfg.data_dir)
    except UserError as error:
        world.print(f"no samples: {error}")


def find_hellaswag(world):
    """HellaSwag's questions, fetched by one process for all. UserError if they are neither here nor to be had."""
    import hellaswag
    world.first(hellaswag.find_data)
    return list(hellaswag.iterate_examples("val"))


def score_hellaswag(model, examples, tokenizer, world):
    """Print and return HellaSwag's scores; each process takes its share of the questions.

    acc_norm, the mean per token, is the one that goes into the log: build-nanogpt's plots show it. It is
    uncertain by 0.0046 on all 10,042 questions, so two runs that differ by less may be equally good.
    """
    import hellaswag
    score = hellaswag.evaluate(model, examples, tokenizer, rank=world.rank, world_size=world.size,
                               all_reduce=world.sum, dtype=None if world.dtype == torch.float32 else world.dtype)
    world.print("HellaSwag: " + ", ".join(f"{rule} {score[rule]:.4f} +- {score[rule + '_stderr']:.4f}"
                                          for rule in ("acc", "acc_norm", "acc_norm_chars")))
    return score


# ---- the actions: the first word of the command line

def train(cfg):
    """train: what cfg says -> the log, {stream: {step: value}}."""
    world = World(cfg)
    try:
        run = build_run(cfg, world)
        with catch_signals() as stop:
            loop(run, cfg, world, stop)
        run.log.close(None if stop.asked else next(iter(checkpoint_files(cfg.log_dir)), None))
        return run.log.values
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for --micro_batch_size {cfg.micro_batch_size}: use half, or "
                        "auto") from error
    finally:
        world.close()


def evaluate(cfg):
    """eval: the val loss on data_dir, and HellaSwag, of what --init names -> {"val": loss, ...}."""
    world = World(cfg)
    try:
        prepare_builtin(cfg, world)
        meta, model = read_meta(cfg.data_dir), read_model(cfg.init).to(world.device)
        val = Corpus(cfg.data_dir, "val", cfg.block_size, cfg.vocab_size)
        loss, tokens = evaluate_loss(model, val, fit_micro_batch(model, cfg, world), cfg, world)
        world.print(describe_loss(loss, tokens, cfg, meta))
        score = {}
        if cfg.hellaswag_every:
            try:
                score = score_hellaswag(model, find_hellaswag(world), read_tokenizer(cfg.init), world)
            except UserError as error:
                world.print(f"HellaSwag was not scored: {error}")
        return dict(val=loss, tokens=tokens, **score)
    finally:
        world.close()


def sample(cfg, text=None, temperature=0.8, top_k=50, max_new_tokens=200, num_samples=1):
    """sample: what --init names continues a text -> the texts."""
    world = World(cfg)
    model, tokenizer = load_model(cfg.init)
    text = cfg.prompt if text is None else text
    texts = continue_text(model.to(world.device), tokenizer, text, num_samples, max_new_tokens, cfg.seed,
                          temperature, top_k)
    world.print("\n\n".join(texts))
    return texts


def export(cfg, out):
    """export: what --init names as a Hugging Face folder, with its tokenizer where that is at hand."""
    model = read_model(cfg.init)
    model.save_pretrained(out)
    card = Path(out, "README.md")
    if not card.exists() or card.read_text().startswith(CARD_HEAD):  # never write over a text of yours
        card.write_text(model_card(cfg.init, model))
    try:
        save_tokenizer(read_tokenizer(cfg.init), out)
    except UserError as error:
        print(f"{out} has no tokenizer in it: {error}")
    print(f"wrote {out}; try: python -c \"from transformers import pipeline; "
          f"print(pipeline('text-generation', model='{out}')('Hello'))\"")


def plot(cfg, others=(), out=None):
    """plot: the logs of --log_dir and of other folders as one picture -> its file."""
    logs = {str(source): read_log(source) for source in (cfg.log_dir, *others)}
    path = Path(cfg.log_dir)
    path = Path(out or (path.parent if path.is_file() else path) / "log.png")
    try:
        save_figure(draw_logs(logs), path)
    except ImportError:
        raise UserError("plot needs a package that is not here: pip install matplotlib") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be written: {error}") from error
    print(f"wrote {path}")
    return path


CARD_HEAD = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2]\n---\n"


def model_card(source, model):
    """The README.md of an exported folder: what its checkpoint and the log beside that know of themselves."""
    padding = (model.config.vocab_size - model.n_vocab) * model.config.n_embd  # stays behind
    lines = [CARD_HEAD, f"# GPT-2 with {model.num_params() - padding:,} parameters", "",
             "A plain language model with GPT-2's architecture: it continues texts like those it has read, and has not",
             "been taught to follow instructions or to be right.", ""]
    checkpoint = find_checkpoint(source)
    if checkpoint:
        c, data, step = checkpoint["config"], checkpoint["data"], checkpoint["step"]
        lines += [f"- data: {Path(c['data_dir']).name}, {data['train_tokens']:,} train tokens (tokenizer "
                  f"{data['tokenizer']})",
                  f"- training: {step:,} steps of {c['total_batch_size']:,} tokens, begun from "
                  + ("random weights" if c["init"] == "scratch" else Path(c["init"]).name)]
        values = {}
        with contextlib.suppress(UserError):  # a checkpoint that was copied may have left its log behind
            values, _ = read_log(Path(source).parent if os.path.isfile(source) else source)
        for stream, name in (("val", "val loss, nats a token"), ("hella", "HellaSwag, acc_norm (mean per token)")):
            if known := {at: value for at, value in values.get(stream, {}).items() if at <= step}:
                lines += [f"- {name}: {known[max(known)]:.4f} at step {max(known):,}"]
        lines += ["", "```json", json.dumps({name: c[name] for name in (*FIXED, *SCHEDULE)}, indent=2), "```"]
    else:
        lines += [f"The weights are those of {Path(source).name}."]
    return "\n".join([*lines, "", "```python", "from transformers import pipeline",
                      'print(pipeline("text-generation", model="THIS FOLDER OR ITS NAME")("Hello"))', "```", ""])


# The first word of a command line -> the function that does it, and
# the arguments that it takes besides the flags.
ACTIONS = {
    "train": (train, {}),
    "eval": (evaluate, {}),
    "sample": (sample, {"text": dict(nargs="?", help="what the model shall continue"),
                        "--temperature": dict(type=float, help="0: the likeliest id; 1: as the model says"),
                        "--top_k": dict(type=int, help="draw among the k likeliest ids"),
                        "--max_new_tokens": dict(type=int, help="ids to write at most"),
                        "--num_samples": dict(type=int, help="how many texts")}),
    "export": (export, {"--out": dict(required=True, help="the folder to write")}),
    "plot": (plot, {"others": dict(nargs="*", metavar="LOG", help="more log folders, for the same picture"),
                    "--out": dict(help="the picture, .png or .svg; log.png in --log_dir if not said")}),
}


def main(argv=None):
    """Run a command line, given as a list of words or else the program's own. UserError on wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    action = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if action not in ACTIONS:
        raise UserError(f"there is no action {action!r}: choose from {', '.join(ACTIONS)}")
    cfg, extra = parse_config(action, argv)
    return ACTIONS[action][0](cfg, **extra)


if __name__ == "__main__":
    status = 0
    try:
        main()
    except UserError as error:  # wrong input gets one line, no traceback that would hide it
        status = 2
        # All processes meet it, and one line is enough. torchrun ends them all when the first one leaves, which must
        # not be before process 0 has spoken; only what it does not know outlives the wait, and is said by the finder.
        time.sleep(20 if os.environ.get("RANK", "0") != "0" else 0)
        print(f"train_gpt2.py: {error}", file=sys.stderr)
    if "RANK" in os.environ:
        # The threads of a group of processes outlive it. One that wants Python's lock while Python shuts down
        # aborts the process, which has done its work: leave without the shutting down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
