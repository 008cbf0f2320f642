"""The exercises of the lessons: what checks an answer, then the answer. Reading on spoils the fun.

`check(your_answer, "ex03_1")` in a notebook calls check_ex03_1 here; a test calls it with this file's own ex03_1,
so that no solution can rot. A check compares with something independent wherever there is one.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- 01 tensors and autograd

def check_ex01_1(answer):
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1)) * 50
    for dim in (-1, 1, 0):
        torch.testing.assert_close(answer(x, dim), F.log_softmax(x, dim), msg=f"differs from F.log_softmax along {dim}")
    for row in ([0.0, -200.0], [1000.0, 1001.0], [-1000.0, -1001.0], [2.0, -math.inf, 3.0]):
        row = torch.tensor(row)
        torch.testing.assert_close(answer(row), F.log_softmax(row, -1), msg=f"{row.tolist()} gave {answer(row)}")


def ex01_1(x, dim=-1):
    x = x - x.amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


def check_ex01_2(answer):
    class Value:
        def __init__(self, data, parents=(), slopes=(), name=""):
            self.data, self.parents, self.slopes, self.grad = data, parents, slopes, 0.0

    for number in (-2.0, 0.0, 0.3, 1000.0):
        x, leaf = Value(number), torch.tensor(number, dtype=torch.float64, requires_grad=True)
        out, want = answer(x, Value), torch.tanh(leaf)
        want.backward()
        assert abs(out.data - want.item()) < 1e-12, f"tanh({number:g}) is {want.item()}, not {out.data}"
        assert list(out.parents) == [x] and len(out.slopes) == 1, "it has one parent, x, and one slope"
        assert abs(out.slopes[0] - leaf.grad.item()) < 1e-12, f"the slope at {number:g} is {leaf.grad.item()}"


def ex01_2(x, Value):
    t = math.tanh(x.data)
    return Value(t, (x,), (1 - t * t,))


def check_ex01_3(answer):
    generator = torch.Generator().manual_seed(3)
    for N in (1, 8):
        x, W = torch.randn(N, 3, generator=generator), torch.randn(1, 3, generator=generator)
        b, y = torch.randn(1, generator=generator), torch.randn(N, generator=generator)
        slow = sum((sum(x[n, i] * W[0, i] for i in range(3)) + b[0] - y[n]) ** 2 for n in range(N)) / N
        torch.testing.assert_close(answer(x, W, b, y).squeeze(), slow, msg=f"the mean squared error of {N} points is not that")


def ex01_3(x, W, b, y):
    pred = (x @ W.T + b).squeeze(1)  # (N,), not (N, 1): minus y of shape (N,) that would be a table of (N, N)
    return ((pred - y) ** 2).mean()


# ---- 02 bigram

def check_ex02_1(answer):
    generator, V = torch.Generator().manual_seed(4), 5
    train, val = (torch.randint(V, (n,), generator=generator) for n in (300, 80))
    val[3:7] = torch.tensor([0, 0, 1, 4])
    counts = {}
    for triple in zip(train.tolist(), train.tolist()[1:], train.tolist()[2:]):
        counts[triple] = counts.get(triple, 0) + 1

    def loss(ids):
        total = 0.0
        for i, j, k in zip(ids, ids[1:], ids[2:]):
            row = [counts.get((i, j, n), 0) + 1 for n in range(V)]
            total -= math.log(row[k] / sum(row))
        return total / (len(ids) - 2)

    for name, ours, ids in zip(("train", "val"), answer(train, val, V), (train, val), strict=True):
        want = loss(ids.tolist())
        assert abs(float(ours) - want) < 1e-4, f"the {name} loss is {float(ours):.4f}, counted one by one {want:.4f}"


def ex02_1(train, val, V):
    cells = (train[:-2] * V + train[1:-1]) * V + train[2:]
    P = torch.bincount(cells, minlength=V ** 3).view(V, V, V) + 1.0
    log_p = (P / P.sum(2, keepdim=True)).log()
    return tuple(-log_p[ids[:-2], ids[1:-1], ids[2:]].mean() for ids in (train, val))


def check_ex02_2(answer):
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2
    logits[0, 1, 2] = -math.inf
    p = F.softmax(logits, dim=-1)
    for temperature in (0.5, 0.8, 1.0, 3.0):
        want = F.softmax(logits / temperature, dim=-1)
        for ours, ref in ((answer(p, temperature), want), (answer(p[0, 1], temperature), want[0, 1])):
            torch.testing.assert_close(ours, ref, msg=lambda m: f"at temperature {temperature}: {m}")


def ex02_2(p, temperature):
    powered = p ** (1 / temperature)
    return powered / powered.sum(-1, keepdim=True)


def check_ex02_3(answer):
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(6)) * 3
    targets = torch.arange(40) % 7
    targets[5:15] = -100
    kept = [n for n in range(40) if targets[n] != -100]
    nats = -sum(math.log(F.softmax(logits[n].double(), 0)[targets[n]]) for n in kept) / len(kept)
    for bytes_per_token in (1.0, 4.5):
        perplexity, bits = answer(logits, targets, bytes_per_token)
        assert abs(float(perplexity) / math.exp(nats) - 1) < 1e-4, f"a perplexity of {float(perplexity):.3f}, it " \
                                                                   f"should be {math.exp(nats):.3f}"
        want = nats / math.log(2) / bytes_per_token
        assert abs(float(bits) - want) < 1e-4, f"{float(bits):.4f} bits per byte, it should be {want:.4f}"


def ex02_3(logits, targets, bytes_per_token):
    loss = F.cross_entropy(logits, targets, ignore_index=-100)  # -100 is the default; written out to be seen
    return loss.exp(), loss / math.log(2) / bytes_per_token


# ---- 03_attention_from_averaging

def check_ex03_1(answer):
    def sick(dim, scale, late_mask):
        def head(q, k, v):
            s = q @ k.transpose(-2, -1) * scale(q.size(-1))
            future = torch.ones_like(s).triu(1).bool()
            if late_mask:
                return F.softmax(s, dim).masked_fill(future, 0) @ v
            return F.softmax(s.masked_fill(future, -math.inf), dim) @ v
        return head

    def root(hs):
        return hs ** -0.5

    heads = [("right", sick(-1, root, False)), ("axis", sick(-2, root, False)), ("mask", sick(-1, root, True)),
             ("right", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
             ("scale", sick(-1, lambda hs: 768 ** -0.5, False)), ("scale", sick(-1, lambda hs: 1.0, False)),
             ("scale", sick(-1, lambda hs: 1 / hs, False))]
    for illness, head in heads:
        said = answer(head)
        assert said == illness, f"a head whose illness is {illness!r} was found to be {said!r}"


def ex03_1(head):
    q, k, v = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    if torch.allclose(head(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5):
        return "right"
    ones = head(q, k, torch.ones_like(v))[:, 0]  # the sum of each row's weights
    if torch.allclose(ones, torch.ones(8), atol=1e-5):
        return "scale"
    # Masked late, a row has lost what lay in its future. The last row has no future.
    return "mask" if torch.isclose(ones[-1], torch.tensor(1.0), atol=1e-5) else "axis"


def check_ex03_2(answer):
    for T, window in ((6, 1), (6, 3), (5, 9)):
        mask = answer(T, window)
        assert mask.dtype == torch.bool and mask.shape == (T, T), "a (T, T) tensor of booleans is wanted"
        for t in range(T):
            for s in range(T):
                may = t - window < s <= t
                assert mask[t, s].item() == may, f"T {T}, window {window}: may {t} look at {s}? {may}"
    q, k, v = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=answer(6, 1))
    assert torch.allclose(y, v), "with a window of 1 each token hears itself alone"


def ex03_2(T, window):
    back = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    return (back >= 0) & (back < window)


def check_ex03_3(answer):
    g = torch.Generator().manual_seed(0)
    x, memory = torch.randn(2, 5, 12, generator=g), torch.randn(2, 7, 12, generator=g)
    Wq, Wk, Wv = torch.randn(3, 12, 8, generator=g)
    ref = F.scaled_dot_product_attention(x @ Wq, memory @ Wk, memory @ Wv)
    y = answer(x, memory, Wq, Wk, Wv)
    assert y.shape == ref.shape, f"shape {tuple(y.shape)}, wanted {tuple(ref.shape)}"
    gap = (y - ref).abs().max().item()
    assert gap < 1e-4, f"off by {gap:.2g}"


def ex03_3(x, memory, Wq, Wk, Wv):
    q, k, v = x @ Wq, memory @ Wk, memory @ Wv
    weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), dim=-1)
    return weights @ v


# ---- 04_transformer_block

def check_ex04_1(answer):
    from helpers import shake
    from train_gpt2 import Block, GPTConfig
    torch.manual_seed(0)
    C, x = 16, torch.randn(2, 5, 16)
    block = shake(Block(GPTConfig(n_embd=C, n_head=2)))
    ref = nn.TransformerEncoderLayer(C, 2, 4 * C, dropout=0, activation=block.mlp.gelu, batch_first=True)
    names = dict(zip(ref.state_dict(), ("attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
                                        "attn.c_proj.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
                                        "mlp.c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")))
    ref.load_state_dict({theirs: block.state_dict()[ours] for theirs, ours in names.items()})
    with torch.no_grad():
        gap = (answer(block, x) - ref(x, src_mask=torch.ones(5, 5).triu(1).bool())).abs().max().item()
    assert gap < 1e-4, f"off from nn.TransformerEncoderLayer(norm_first=False) by {gap:.2g}"


def ex04_1(block, x):
    x = block.ln_1(x + block.attn(x))
    return block.ln_2(x + block.mlp(x))


def check_ex04_2(answer):
    from train_gpt2 import GPT, GPTConfig
    for V, T, L, C in ((7, 5, 1, 4), (11, 6, 3, 8)):
        counted = GPT(GPTConfig(T, V, L, 2, C)).num_params()
        assert answer(V, T, L, C) == counted, f"V {V}, T {T}, L {L}, C {C}: {answer(V, T, L, C)}, counted {counted}"
    assert answer(50257, 1024, 12, 768) == 124_439_808, "GPT-2's smallest has 124,439,808"


def ex04_2(V, T, L, C):
    block = 12 * C * C + 9 * C + 4 * C  # matrices, their biases, two norms
    return V * C + T * C + L * block + 2 * C


def check_ex04_3(answer):
    from train_gpt2 import CausalSelfAttention, GPTConfig
    torch.manual_seed(0)
    nh, hs, C = 3, 4, 12
    Wq, Wk, Wv = ([torch.randn(hs, C) for _ in range(nh)] for _ in range(3))
    x = torch.randn(2, 5, C)
    slow = torch.cat([F.scaled_dot_product_attention(x @ a.T, x @ b.T, x @ c.T, is_causal=True)
                      for a, b, c in zip(Wq, Wk, Wv)], dim=-1)
    attn = CausalSelfAttention(GPTConfig(n_embd=C, n_head=nh))
    packed = answer(Wq, Wk, Wv)
    assert packed.shape == (3 * C, C), f"shape {tuple(packed.shape)}, wanted {(3 * C, C)}"
    with torch.no_grad():
        attn.c_attn.weight.copy_(packed), attn.c_attn.bias.zero_()
        attn.c_proj.weight.copy_(torch.eye(C)), attn.c_proj.bias.zero_()
        gap = (attn(x) - slow).abs().max().item()
    assert gap < 1e-4, f"the packed heads are off by {gap:.2g}"


def ex04_3(Wq, Wk, Wv):
    return torch.cat([*Wq, *Wk, *Wv])


def check_ex04_4(answer):
    generator = torch.Generator().manual_seed(2)
    B, T, C = 3, 4, 10
    x, dout = (3 * torch.randn(B, T, C, dtype=torch.float64, generator=generator) + 1 for _ in range(2))
    weight, bias = (torch.randn(C, dtype=torch.float64, generator=generator) for _ in range(2))
    x[0, 0] *= 1e-3  # a vector this small is where eps counts
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    F.layer_norm(x, (C,), weight, bias, eps=1e-5).backward(dout)
    got = answer(dout.detach(), x.detach(), weight.detach())
    for name, ours, leaf in zip(("dx", "dweight", "dbias"), got, leaves, strict=True):
        assert ours.shape == leaf.shape, f"{name} has the shape {tuple(ours.shape)}, not {tuple(leaf.shape)}"
        torch.testing.assert_close(ours, leaf.grad, atol=1e-9, rtol=1e-9, msg=lambda m: f"{name}: {m}")


def ex04_4(dout, x, weight):
    root = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    n = (x - x.mean(-1, keepdim=True)) / root
    dn = dout * weight
    dx = (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True)) / root
    return dx, (dout * n).sum((0, 1)), dout.sum((0, 1))


# ---- 05 tokenizer

def check_ex05_1(answer):
    import random
    import regex
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc", b"cab", b"  ", b"abcab", b"\xe4\xbd"]
    chance = random.Random(0)
    for data in [b"", b"a", b"abc", b"abcabc", "你好 abc".encode(), *(bytes(chance.choices(b"abc ", k=30)) for _ in range(200))]:
        # A pattern that lists the tokens, the longest first, takes the longest that fits.
        longest_first = sorted(tokens, key=len, reverse=True)
        found = regex.findall(b"|".join(map(regex.escape, longest_first)), data, regex.DOTALL)
        ids = answer(data, tokens)
        assert list(ids) == [tokens.index(token) for token in found], f"{data}: {ids}"


def ex05_1(data, tokens):
    place, ids, at = {token: i for i, token in enumerate(tokens)}, [], 0
    while at < len(data):
        end = next(end for end in range(len(data), at, -1) if data[at:end] in place)
        ids.append(place[data[at:end]])
        at = end
    return ids


def check_ex05_2(answer):
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    marks = {"<|endoftext|>": 256, "<|user|>": 257, "<|assistant|>": 258}
    merges = {b"pl": 400, b"ai": 401, b"plai": 402, b" t": 403, b"xx": 404}  # who cuts letter by letter is found out
    for special in marks, {"[x]": 300, "a+": 301}, {}:
        reference = tiktoken.Encoding("check", pat_str=r50k_pat_str, special_tokens=special,
                                      mergeable_ranks={bytes([byte]): byte for byte in range(256)} | merges)
        for text in ["", "plain text", "<|user|>Hi!<|assistant|> Hello.<|endoftext|>", "<|user|><|user|>", "<|user",
                     "user endoftext | <| |>", "x [x] xx a+ aa+ é", "<|endoftext|>\n"]:
            ids = answer(text, reference.encode_ordinary, special)
            right = reference.encode(text, allowed_special="all")
            assert list(ids) == right, f"{text!r} with {special}: {ids}, not {right}"


def ex05_2(text, encode, special):
    import re
    parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text) if special else [text]
    return [i for part in parts for i in ([special[part]] if part in special else encode(part))]


def check_ex05_3(answer):
    import re
    import unicodedata

    def encode(text):
        return list(text.encode())

    def decode(ids):
        return bytes(ids).decode()

    good = {
        "bytes": (encode, decode),
        "characters": (lambda text: list(map(ord, text)), lambda ids: "".join(map(chr, ids))),
        "bytes backwards": (lambda text: encode(text)[::-1], lambda ids: decode(ids[::-1])),
    }
    harm = {
        "strips white space at the ends": lambda text: text.strip(),
        "makes one blank of several": lambda text: re.sub(" +", " ", text),
        "lowers the case": lambda text: text.lower(),
        "composes accents": lambda text: unicodedata.normalize("NFC", text),
        "drops what is not ASCII": lambda text: text.encode("ascii", "ignore").decode(),
        "drops <|endoftext|>": lambda text: text.replace("<|endoftext|>", ""),
    }
    for name, pair in good.items():
        assert answer(*pair) is True, f"refused a good one: {name}"
    for name, change in harm.items():
        assert answer(lambda text, change=change: encode(change(text)), decode) is False, f"one got through: {name}"


def ex05_3(encode, decode):
    texts = ["", " a ", "a  b\t\r\n\n", "Case", "e\u0301 é", "你好 🙂", "<|endoftext|>", "long " * 1000]
    try:
        return all(decode(encode(text)) == text for text in texts)
    except Exception:
        return False


# ---- 06 GPT-2 and pretrained weights

def tiny_gpt2(seed=0):
    """transformers' GPT-2 with a tiny shape and every parameter shaken, and the same shape for train_gpt2.GPT."""
    from helpers import shake
    from train_gpt2 import GPTConfig
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=16, vocab_size=37, n_layer=2, n_head=3, n_embd=12,
                                        bos_token_id=36, eos_token_id=36)).eval()
    return shake(theirs, seed=seed), GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=3, n_embd=12)


@torch.no_grad()
def check_ex06_1(answer):
    from helpers import shake
    from train_gpt2 import GPT
    theirs, config = tiny_gpt2()
    model, idx = shake(GPT(config), seed=2), torch.randint(37, (2, 11))
    before = model(idx)[0]
    theirs.load_state_dict(answer(model))
    gap = (theirs(idx).logits - before).abs().max().item()
    assert gap < 1e-4, f"the logits differ by {gap:.2g}"
    assert torch.equal(model(idx)[0], before), "the model itself has changed"


def ex06_1(model):
    endings = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: w.t() if name.endswith(endings) else w for name, w in model.state_dict().items()}


@torch.no_grad()
def check_ex06_2(answer):
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from safetensors.torch import save_file
    from train_gpt2 import GPT
    theirs, config = tiny_gpt2()
    stored = {name.removeprefix("transformer."): w.contiguous() for name, w in theirs.state_dict().items()
              if name != "lm_head.weight"}
    for i in range(config.n_layer):
        stored[f"h.{i}.attn.bias"] = torch.ones(16, 16).tril()[None, None].contiguous()
    with TemporaryDirectory() as folder:
        save_file(stored, Path(folder, "model.safetensors"))
        state = answer(Path(folder, "model.safetensors"))
    model, idx = GPT(config), torch.randint(37, (2, 11))
    model.load_state_dict(state)
    gap = (theirs(idx).logits - model(idx)[0]).abs().max().item()
    assert gap < 1e-4, f"the logits differ by {gap:.2g}"


def ex06_2(file):
    from safetensors.torch import load_file
    turned, state = ("c_attn.weight", "c_proj.weight", "c_fc.weight"), {}
    for name, w in load_file(file).items():
        if not name.endswith(".attn.bias"):
            state["transformer." + name] = w.t() if name.endswith(turned) else w
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


@torch.no_grad()
def check_ex06_3(answer):
    from helpers import shake
    from train_gpt2 import GPT
    _, config = tiny_gpt2()
    model, idx = shake(GPT(config)), torch.randint(37, (2, 11))
    before = model(idx)[0]
    model = answer(model, 128)
    after, wte = model(idx)[0], model.transformer.wte.weight
    assert tuple(after.shape) == (2, 11, 128), f"the logits have the shape {tuple(after.shape)}"
    torch.testing.assert_close(after[..., :37], before, msg="the old logits have changed")
    assert not after[..., 37:].any(), "the new logits are not 0"
    assert wte.shape == (128, 12) and model.lm_head.weight is wte, "wte and lm_head no longer share one tensor"


def ex06_3(model, vocab_size):
    old = model.transformer.wte.weight.detach()
    new = nn.Parameter(torch.cat([old, old.new_zeros(vocab_size - len(old), old.size(1))]))
    model.transformer.wte.weight = model.lm_head.weight = new
    return model


# ---- 07 initialization

def check_ex07_1(answer):
    for V, C, std in ((5000, 256, 0.02), (3000, 400, 0.05), (5000, 64, 0.1)):
        generator = torch.Generator().manual_seed(V)
        x = F.layer_norm(torch.randn(200, C, generator=generator), (C,))
        logits = x @ (std * torch.randn(V, C, generator=generator)).T
        measured = logits.logsumexp(-1).mean().item() - logits.mean().item()
        assert abs(answer(V, C, std) - measured) < 0.03, \
            f"V = {V}, C = {C}, std = {std}: measured {measured:.3f}, your answer is {answer(V, C, std):.3f}"
    padding = answer(50304, 768, 0.02) - answer(50257, 768, 0.02)
    assert abs(padding - 0.000935) < 1e-5, f"47 more rows cost 0.00093, you say {padding:.5f}"


def ex07_1(vocab_size, n_embd, std):
    return math.log(vocab_size) + std ** 2 * n_embd / 2


def check_ex07_2(answer):
    import train_gpt2
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=64, vocab_size=300, n_layer=5, n_head=2, n_embd=64))
    params = dict(model.named_parameters())
    assert list(answer(model)) == [], f"nothing is wrong with this model, but you name {list(answer(model))}"
    for name, std in (("transformer.h.3.attn.c_proj.weight", 0.02), ("transformer.h.0.mlp.c_proj.weight", 0.02),
                      ("transformer.wte.weight", 1), ("transformer.wpe.weight", 0.01),
                      ("transformer.h.1.attn.c_attn.weight", 0.0063), ("transformer.h.4.mlp.c_fc.bias", 0.001),
                      ("transformer.ln_f.weight", 0.02), ("transformer.h.2.ln_1.bias", 1)):
        kept = params[name].detach().clone()
        with torch.no_grad():
            params[name].normal_(0, std, generator=torch.Generator().manual_seed(1))
            found = list(answer(model))
            params[name].copy_(kept)
        assert found == [name], f"only {name} was spoiled (drawn with std {std}), but you name {found}"
    with torch.no_grad():
        params["transformer.h.0.ln_2.weight"].zero_()
        params["transformer.h.0.attn.c_attn.bias"].fill_(0.02)
    both = ["transformer.h.0.attn.c_attn.bias", "transformer.h.0.ln_2.weight"]
    assert list(answer(model)) == both, "a gain that is constant at 0 or a bias at 0.02 has no std, and is still wrong"


def ex07_2(model):
    wrong = []
    for name, p in model.named_parameters():
        if p.dim() == 2:
            want = 0.02 / math.sqrt(2 * model.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            fine = abs(p.std().item() / want - 1) < 0.1
        else:
            fine = bool((p == (0 if name.endswith(".bias") else 1)).all())
        if not fine:
            wrong.append(name)
    return sorted(wrong)


def check_ex07_3(answer):
    import train_gpt2
    for C, L in ((128, 12), (256, 6)):
        torch.manual_seed(0)
        model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=64, vocab_size=300, n_layer=L, n_head=4, n_embd=C))
        seen = []
        model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].std()))
        model(torch.randint(300, (4, 64)))
        measured = seen[0].item()
        assert abs(answer(C) / measured - 1) < 0.1, f"n_embd = {C}: measured {measured:.4f}, you say {answer(C):.4f}"


def ex07_3(n_embd):
    z = 0.02 * math.sqrt(n_embd) * torch.randn(1_000_000)
    q = F.gelu(z, approximate="tanh").square().mean().item()
    embedding, mlp = 2 * 0.02 ** 2, 4 * n_embd * q * 0.02 ** 2 / 2  # 1/(2L), L times
    return math.sqrt(embedding + mlp)


# ---- 08_make_it_fast

def check_ex08_1(answer):
    from train_gpt2 import GPTConfig
    for config, tok_s, peak, wanted in ((GPTConfig(vocab_size=50304), 182_044, 312e12, 0.49867),
                                        (GPTConfig(512, 1000, 6, 6, 192), 1e6, 65e12, 0.37162)):
        ours = float(answer(config, tok_s, peak))
        assert abs(ours - wanted) < 2e-4, f"{config} at {tok_s:,} tok/s: MFU {wanted:.4f}, you say {ours:.4f}"


def ex08_1(config, tok_s, peak):
    weights = 12 * config.n_layer * config.n_embd ** 2 + config.vocab_size * config.n_embd
    return (6 * weights + 12 * config.n_layer * config.n_embd * config.block_size) * tok_s / peak


def check_ex08_2(answer):
    from unittest import mock
    clock = {"now": 100.0, "free_at": 103.0}  # a device that is busy for 3 more seconds with what came before
    count = {"orders": 0}

    def order():
        count["orders"] += 1
        clock["now"] += 0.001  # an order takes a moment to write
        clock["free_at"] = max(clock["free_at"], clock["now"]) + 0.5

    def wait():
        clock["now"] = max(clock["now"], clock["free_at"])

    def now():
        return clock["now"]

    names = ("perf_counter", "time", "monotonic", "process_time")
    with mock.patch.multiple("time", **{name: now for name in names}):
        seconds = answer(order, wait, 10)
    assert count["orders"] == 10, f"{count['orders']} orders, wanted exactly 10"
    assert abs(seconds - 0.5) < 0.01, f"an order takes 0.5 s on this device, you measured {seconds:.3f} s"


def ex08_2(order, wait, repeats):
    import time
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        order()
    wait()
    return (time.perf_counter() - began) / repeats


def check_ex08_3(answer):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not func.is_view and isinstance(out, torch.Tensor) and out.dim() == 2 and out.size(1) == 97:
                self.rows = max(self.rows, out.size(0))
            return out

    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(50, 8, generator=g), torch.randn(97, 8, generator=g)
    t = torch.randint(97, (50,), generator=g)
    some = t.clone()
    some[3:20] = -100
    for targets in (t, some):
        for chunk in (7, 50, 64):
            with Largest() as largest:
                ours = torch.as_tensor(answer(h, W, targets, chunk))
            wanted = F.cross_entropy(h @ W.T, targets)
            assert abs(ours.item() - wanted.item()) < 1e-5, f"chunks of {chunk}: {ours.item():.5f}, wanted {wanted:.5f}"
            assert largest.rows <= chunk, f"{largest.rows} rows of logits at once, where {chunk} are allowed"


def ex08_3(h, W, t, chunk):
    total = sum(F.cross_entropy(part @ W.T, targets, reduction="sum")
                for part, targets in zip(h.split(chunk), t.split(chunk)))
    return total / (t != -100).sum()


def check_ex08_4(answer):
    for r, n, m, wall, wanted in ((1, 768, 3072, "memory", 2.36314e-6), (16384, 768, 3072, "compute", 2.47787e-4),
                                  (128, 4096, 4096, "memory", 1.78258e-5)):
        seconds, said = answer(r, n, m, 312e12, 2e12)
        assert said == wall, f"({r}, {n}) @ ({n}, {m}): it is {wall} that decides, not {said!r}"
        assert abs(seconds / wanted - 1) < 1e-3, f"({r}, {n}) @ ({n}, {m}): at least {wanted:.4g} s, not {seconds:.4g}"


def ex08_4(r, n, m, flops, bandwidth):
    compute, memory = 2 * r * n * m / flops, 2 * (r * n + n * m + r * m) / bandwidth
    return max(compute, memory), "compute" if compute > memory else "memory"


# ---- 09 optimisation

def check_ex09_1(answer):
    import train_gpt2
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=10, vocab_size=30, n_layer=2, n_head=2, n_embd=16)).double()
    for targets in ((2, 40, 17), (40, 40, 40), (0, 1, 40)):  # of 40 in each micro-batch
        x, y = torch.randint(30, (3, 4, 10)), torch.randint(30, (3, 4, 10))
        for row, n in zip(y.view(3, 40), targets):
            row[torch.randperm(40)[n:]] = -100
        model.zero_grad()
        model(x.flatten(0, 1), y.flatten(0, 1))[1].backward()
        want = torch.cat([p.grad.flatten() for p in model.parameters()])
        sizes, original = [], model.forward
        model.forward = lambda idx, *args, **kwargs: sizes.append(len(idx)) or original(idx, *args, **kwargs)
        try:
            answer(model, x.clone(), y.clone())
        finally:
            model.forward = original
        assert max(sizes, default=0) == 4, "one micro-batch, 4 rows here, at a time: memory holds no more"
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
        gap = ((got - want).norm() / want.norm()).item()
        assert gap < 1e-12, f"targets per micro-batch {targets}: the gradient is off by {gap:.1%} of its length"


def ex09_1(model, x, y):
    model.zero_grad()
    total = (y != -100).sum()
    for xi, yi in zip(x, y):
        count = (yi != -100).sum()
        if count:
            (model(xi, yi)[1] * count / total).backward()


def check_ex09_2(answer):
    from train_gpt2 import TrainConfig
    for warmup, steps in ((10, 100), (0, 53), (40, 200)):
        cfg = TrainConfig(max_lr=1.0, min_lr=0.1, warmup_steps=warmup, max_steps=steps)
        top, end = steps - 1 - steps // 5, steps - 1
        knots = [0, top, end] if warmup == 0 else [-1, warmup - 1, top, end]
        want = np.interp(range(steps), knots, [1, 1, 0.1] if warmup == 0 else [0, 1, 1, 0.1])
        for step in range(steps):
            assert abs(answer(step, cfg) - want[step]) < 1e-9, \
                f"{warmup} of {steps} steps warm-up: step {step} is at {want[step]:.4f}, not {answer(step, cfg):.4f}"


def ex09_2(step, cfg):
    n, left = cfg.max_steps // 5, cfg.max_steps - 1 - step
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    return cfg.min_lr + (cfg.max_lr - cfg.min_lr) * min(1, left / n)


def check_ex10_1(answer):
    for W, n in ((2, 2), (3, 12), (4, 8), (5, 25)):
        generator = torch.Generator().manual_seed(W)
        vectors = [torch.randint(-99, 99, (n,), generator=generator).double() for _ in range(W)]
        before, sent = [v.clone() for v in vectors], [[] for _ in range(W)]

        def send(rank, chunk):
            sent[rank].append(chunk.numel())
            return chunk.clone()

        after = answer(vectors, send)
        assert len(after) == W, f"{len(after)} vectors come back from {W} processes"
        for rank, vector in enumerate(after):
            assert torch.equal(vector, sum(before)), f"{W} processes: process {rank} ends with {vector}, not the sum"
        for rank, sizes in enumerate(sent):
            assert sizes == [n // W] * (2 * (W - 1)), \
                f"{W} processes: process {rank} sent chunks of {sizes} numbers, not {2 * (W - 1)} times {n // W}"


def ex10_1(vectors, send):
    W = len(vectors)
    parts = [list(vector.clone().chunk(W)) for vector in vectors]
    for k in range(W - 1):  # pass on and add
        arrived = [send(r, parts[r][(r - k) % W]) for r in range(W)]
        for r in range(W):
            parts[(r + 1) % W][(r - k) % W] = parts[(r + 1) % W][(r - k) % W] + arrived[r]
    for k in range(W - 1):  # pass on what is finished
        arrived = [send(r, parts[r][(r + 1 - k) % W]) for r in range(W)]
        for r in range(W):
            parts[(r + 1) % W][(r + 1 - k) % W] = arrived[r]
    return [torch.cat(part) for part in parts]


def check_ex10_2(answer):
    nan = math.nan
    for reports, wanted in (([(2.0, 300), (4.0, 100), (nan, 0)], 2.5), ([(3.0, 16), (1.0, 16)], 2.0),
                            ([(nan, 0), (nan, 0), (1.5, 7)], 1.5)):
        got = float(answer(list(reports)))
        assert abs(got - wanted) < 1e-12, f"{reports} give {got}, not {wanted}"
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 9, generator=generator), torch.randint(9, (50,), generator=generator)
    reports = [(F.cross_entropy(a, b).item(), len(b)) for a, b in zip(logits.split([30, 13, 7]), targets.split([30, 13, 7]))]
    assert abs(float(answer(reports)) - F.cross_entropy(logits, targets).item()) < 1e-5, "not the loss of all tokens"


def ex10_2(reports):
    return sum(loss * count for loss, count in reports if count) / sum(count for _, count in reports)


def check_ex10_3(answer):
    def walk(length, B, T, W, rank):
        at, steps = rank * B * T, 0
        while True:
            steps, at = steps + 1, at + W * B * T
            if at + W * B * T + 1 > length:
                return steps

    for length, B, T, W in ((300, 2, 8, 4), (100_000_000, 64, 1024, 8), (257, 2, 8, 4), (256, 2, 8, 4), (50, 2, 8, 4),
                            (321, 2, 8, 4), (1000, 1, 7, 3), (130, 2, 8, 1)):
        wanted = [walk(length, B, T, W, rank) for rank in range(W)]
        got = [int(steps) for steps in answer(length, B, T, W)]
        assert got == wanted, f"{length} ids, B = {B}, T = {T}, W = {W}: {got}, not {wanted}"
    assert len(answer(10**18, 1, 1, 2)) == 2, "no loop over steps, please"


def ex10_3(length, B, T, W):
    step = W * B * T
    return [1 + max(0, (length - 1 - step - rank * B * T) // step) for rank in range(W)]


def check_ex11_1(answer):
    for n, T in ((8, 4), (9, 4), (10, 4), (2, 5), (6, 5), (47, 8)):
        ids = np.arange(1, n)[::-1].copy()
        x, y = answer(ids, T)
        pairs = list(zip(ids[:-1].tolist(), ids[1:].tolist()))  # what must come out, in this order
        rows = -(-len(pairs) // T)
        for name, z in (("x", x), ("y", y)):
            assert z.shape == (rows, T) and z.dtype == torch.int64, \
                f"{n - 1} ids, T = {T}: {name} is {z.dtype} {tuple(z.shape)}, not int64 {(rows, T)}"
        got = list(zip(x.flatten().tolist(), y.flatten().tolist()))
        assert got[:len(pairs)] == pairs, f"{n - 1} ids, T = {T}: the pairs are {got[:len(pairs)]}, not {pairs}"
        assert set(got[len(pairs):]) <= {(0, -100)}, f"{n - 1} ids, T = {T}: filled up with {got[len(pairs):]}"


def ex11_1(ids, T):
    n = len(ids) - 1
    size = -(-n // T) * T
    x, y = torch.zeros(size, dtype=torch.int64), torch.full((size,), -100)
    x[:n], y[:n] = torch.as_tensor(ids[:-1]), torch.as_tensor(ids[1:])
    return x.view(-1, T), y.view(-1, T)


def check_ex11_2(answer):
    for n, rows, seed in ((14, 4, 1337), (10, 5, 3), (7, 7, 1), (5, 12, 8)):
        endless = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in range(60)])
        steps = len(endless) // rows - 1
        for step in [*range(min(steps, 20)), 5, 0]:  # forwards, then back: no memory of earlier calls
            got, wanted = np.asarray(answer(step, n, rows, seed)), endless[step * rows:(step + 1) * rows]
            assert got.shape == (rows,), f"{n} windows, {rows} a step: step {step} has shape {got.shape}"
            assert (got == wanted).all(), f"{n} windows, {rows} a step: step {step} is {got}, not {wanted}"


def ex11_2(step, n_windows, rows, seed):
    start = step * rows
    first, last = start // n_windows, (start + rows - 1) // n_windows
    numbers = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n_windows)
                              for epoch in range(first, last + 1)])
    return numbers[start - first * n_windows:][:rows]


def check_ex11_3(answer):
    from train_gpt2 import GPT, GPTConfig
    torch.manual_seed(0)
    eot, model = 9, GPT(GPTConfig(block_size=12, vocab_size=10, n_layer=2, n_head=2, n_embd=8))
    ids = torch.tensor([[1, 2, 3, 9, 4, 5, 6, 7, 9, 9, 8, 1], [9, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]])
    before = ids.clone()
    pos = answer(ids, eot)
    assert torch.equal(ids, before), "ids were changed"
    assert pos.shape == ids.shape and pos.dtype == torch.int64, f"{pos.dtype} {tuple(pos.shape)}"
    wanted = [[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1, 2], list(range(12))]
    assert pos.tolist() == wanted, f"positions {pos.tolist()}, not {wanted}"
    document = (ids == eot).cumsum(1)
    mask = ((document[:, :, None] == document[:, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril())[:, None]
    with torch.no_grad():
        stream = model.transformer.wte(ids) + model.transformer.wpe(pos)
        for block in model.transformer.h:
            q, k, v = (z.view(2, 12, 2, 4).transpose(1, 2) for z in block.attn.c_attn(block.ln_1(stream)).split(8, 2))
            heard = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            stream = stream + block.attn.c_proj(heard.transpose(1, 2).reshape(2, 12, 8))
            stream = stream + block.mlp(block.ln_2(stream))
        together = model.transformer.ln_f(stream)[0, 3:8]
        alone = model.hidden(ids[:1, 3:8])[0]
    assert torch.allclose(together, alone, atol=1e-6), "a document in a window differs from the document alone"


def ex11_3(ids, eot):
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return place - torch.where(ids == eot, place, 0).cummax(1).values


# ---- 12_the_124M_run

def check_ex12_1(answer):
    import train_gpt2
    shards = [dict(split="val", tokens=1000, bytes=4800), dict(split="train", tokens=9000, bytes=9000),
              dict(split="val", tokens=50, bytes=110)]
    for meta in ({"shards": shards}, {"shards": shards[:2]}):
        said = train_gpt2.describe_loss(3.2924, 1024, train_gpt2.TrainConfig(), meta)
        theirs = float(said.split(" bits per byte")[0].split()[-1])
        ours = float(answer(3.2924, meta))
        assert abs(ours - theirs) < 1e-4, f"train_gpt2.py says {theirs} bits per byte, you say {ours:.4f}"


def ex12_1(loss, meta):
    val = [shard for shard in meta["shards"] if shard["split"] == "val"]
    return loss / math.log(2) * sum(shard["tokens"] for shard in val) / sum(shard["bytes"] for shard in val)


def check_ex12_2(answer):
    from train_gpt2 import GPTConfig
    hours, dollars = answer(GPTConfig(), 124_439_808, 9_999_745_024, 312e12, 8, 0.5, 14.0)
    assert abs(hours - 1.9139) < 0.002, f"the paper run takes about 1.914 hours, you say {hours:.4f}"
    assert abs(dollars - 14.0 * hours) < 1e-6, f"{hours:.4f} hours at 14 dollars are not {dollars:.2f}"
    half = GPTConfig(block_size=512, n_layer=6)
    hours, dollars = answer(half, 80_000_000, 1e9, 65e12, 1, 0.25, 0.5)
    assert abs(hours - 8.6891) < 0.002, f"half the layers, half the context, on one T4: 8.689 hours, not {hours:.4f}"


def ex12_2(config, n_params, tokens, peak, gpus, mfu, dollars_per_hour):
    a_token = 6 * n_params + 12 * config.n_layer * config.n_embd * config.block_size
    hours = a_token * tokens / (peak * gpus * mfu) / 3600
    return hours, hours * dollars_per_hour


def check_ex12_3(answer):
    from transformers.generation.logits_process import MinPLogitsWarper
    logits = 3 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    for min_p in (0.05, 0.3, 1.0):
        ours, ref = answer(logits.clone(), min_p), MinPLogitsWarper(min_p)(None, logits)
        assert ours.shape == ref.shape, f"shape {tuple(ours.shape)}, wanted {tuple(ref.shape)}"
        assert (ours.isinf() == ref.isinf()).all(), f"min_p {min_p}: other ids are kept than by transformers"
        assert torch.equal(ours[~ref.isinf()], ref[~ref.isinf()]), "the logits that stay are not to be changed"


def ex12_3(logits, min_p):
    probs = F.softmax(logits, dim=-1)
    return logits.masked_fill(probs < min_p * probs.max(dim=-1, keepdim=True).values, -math.inf)


def check_ex12_4(answer):
    import statistics
    rng = np.random.default_rng(0)
    for n in (20, 500):
        a = rng.integers(0, 2, n)
        b = np.where(rng.random(n) < 0.8, a, 1 - a)  # the two agree on most questions
        difference, error = map(float, answer(a.tolist(), b.tolist()))
        assert abs(difference - (a.mean() - b.mean())) < 1e-6, f"the difference is {a.mean() - b.mean():.4f}"
        wanted = statistics.stdev((a - b).tolist()) / math.sqrt(n)
        assert abs(error - wanted) < 1e-6, f"the error of the difference is {wanted:.4f}, you say {error:.4f}"


def ex12_4(a, b):
    d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    return d.mean().item(), (d.std() / math.sqrt(len(d))).item()


# ---- 13_muon

def check_ex13_1(answer):
    from unittest import mock
    for m, n in ((40, 12), (12, 40), (20, 20)):
        G = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        U, _, Vt = torch.linalg.svd(G, full_matrices=False)
        want = U @ Vt
        banned = mock.Mock(side_effect=AssertionError("without a decomposition: products are enough"))
        with mock.patch.multiple(torch.linalg, svd=banned, eigh=banned, qr=banned), \
                mock.patch.multiple(torch, svd=banned):
            got = answer(G.clone())
        assert got.shape == G.shape, f"({m}, {n}) in, {tuple(got.shape)} out"
        gap = (got - want).abs().max().item()
        assert gap < 1e-6, f"({m}, {n}): differs from U V^T by {gap:.1e}"


def ex13_1(G):
    X = G / G.norm()
    for _ in range(60):
        X = 1.5 * X - 0.5 * X @ X.T @ X
    return X


def check_ex13_2(answer):
    def polar(X):
        U, _, Vt = torch.linalg.svd(X, full_matrices=False)
        return U @ Vt

    loudness = torch.tensor([[1.0], [5.0], [0.1]]).repeat_interleave(12, 0)
    G = loudness * torch.randn(36, 12, generator=torch.Generator().manual_seed(2))
    got = answer(G.clone(), polar)
    assert got.shape == (36, 12), f"shape {tuple(got.shape)}, wanted (36, 12)"
    for name, ours, third in zip("qkv", got.split(12), G.split(12)):
        gap = (ours.T @ ours - torch.eye(12)).abs().max()
        assert gap < 1e-4, f"the part of {name} is not orthogonal by itself: off by {gap:.2g}"
        torch.testing.assert_close(ours, polar(third), atol=1e-4, rtol=0, msg=f"the part of {name} has lost its directions")


def ex13_2(G, polar):
    return torch.cat([polar(third) for third in G.chunk(3)])


def check_ex13_3(answer):
    from torch.utils.flop_counter import FlopCounterMode
    from train_gpt2 import orthogonal
    for m, n, tokens in ((24, 96, 50), (96, 24, 7), (32, 32, 1000)):
        with FlopCounterMode(display=False) as rounds:
            orthogonal(torch.randn(m, n))
        W, x = torch.randn(m, n, requires_grad=True), torch.randn(tokens, n, requires_grad=True)
        with FlopCounterMode(display=False) as training:
            (x @ W.T).sum().backward()
        want = rounds.get_total_flops() / training.get_total_flops()
        got = float(answer(m, n, tokens))
        assert abs(got / want - 1) < 1e-6, f"({m}, {n}), {tokens} tokens: {got:.4f}, PyTorch counts {want:.4f}"


def ex13_3(m, n, tokens):
    r, k = min(m, n), max(m, n)
    return 5 * (2 * r * k * r + 2 * r ** 3 + 2 * r * r * k) / (6 * m * n * tokens)


# ---- 14_looking_inside

def check_ex14_1(answer):
    generator = torch.Generator().manual_seed(0)
    for T, V in ((12, 4), (30, 9), (6, 100)):
        idx = torch.randperm(V, generator=generator)[:T] if V > T else torch.randint(V, (T,), generator=generator)
        scores = torch.randn(3, T, T, generator=generator)
        weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        found = []
        for t in range(T):
            earlier = [s for s in range(t) if idx[s] == idx[t]]
            if earlier:
                found.append(weights[:, t, earlier[-1] + 1])
        want = torch.stack(found).mean(0) if found else torch.zeros(3)
        got = answer(weights.clone(), idx.clone())
        assert got.shape == (3,), f"one number for each of 3 heads is wanted, not {tuple(got.shape)}"
        torch.testing.assert_close(got, want, msg=f"ids {idx.tolist()}: {got.tolist()}, one by one {want.tolist()}")


def ex14_1(weights, idx):
    same = (idx[:, None] == idx[None, :]).tril(-1)                       # (T, T)
    t = same.any(1).nonzero()[:, 0]
    if len(t) == 0:
        return torch.zeros(len(weights))
    last = (same * torch.arange(len(idx))).amax(1)[t]
    return weights[:, t, last + 1].mean(1)


def check_ex14_2(answer):
    said = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    for head in range(3):
        before = said.clone()
        got = answer(said, head, 3)
        assert torch.equal(said, before), "the tensor that came in was changed"
        for c in range(12):
            mine = 4 * head <= c < 4 * head + 4
            want = torch.full((3, 5), sum(said[..., c].flatten().tolist()) / 15) if mine else said[..., c]
            torch.testing.assert_close(got[..., c], want, msg=f"head {head}: channel {c} should be " +
                                                              ("its mean" if mine else "as it was"))


def ex14_2(said, head, n_head):
    said, hs = said.clone(), said.size(-1) // n_head
    own = said[..., head * hs:(head + 1) * hs]
    own[:] = own.mean((0, 1))
    return said


def check_ex14_3(answer):
    generator = torch.Generator().manual_seed(0)
    for depths in (1, 3, 6):
        logits = torch.randn(depths, 4, 7, 3, generator=generator)
        got = answer(logits)
        for b in range(4):
            for t in range(7):
                guesses = logits[:, b, t].argmax(-1).tolist()
                want = min(d for d in range(depths) if len(set(guesses[d:])) == 1)
                assert int(got[b, t]) == want, f"guesses {guesses}: decided at {want}, not at {int(got[b, t])}"


def ex14_3(logits):
    guess = logits.argmax(-1)                                            # (L + 1, B, T)
    return len(guess) - (guess == guess[-1]).flip(0).cumprod(0).sum(0)
