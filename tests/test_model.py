"""The network is GPT-2: equal to Hugging Face's on the same weights, drawn as the papers say, able to write.

Shapes prove little, and small weights hide what is wrong with biases, gains and the bend of the GELU. So most
comparisons shake every parameter first; those on plain weights are there for the epsilon of the norms, which
noise would drown.
"""
import copy
import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F

import train_gpt2
from helpers import TINY, random_ids, shake, tiny_model
from train_gpt2 import GPT, PRESETS, Block, CausalSelfAttention, GPTConfig


def hf_config(config):
    """The same shape in Hugging Face's words."""
    from transformers import GPT2Config
    return GPT2Config(vocab_size=config.vocab_size, n_positions=config.block_size, n_layer=config.n_layer,
                      n_head=config.n_head, n_embd=config.n_embd, bos_token_id=None, eos_token_id=None)


def hf_twin(model):
    """GPT2LMHeadModel with our weights. What to transpose is asked of its layers, not of our names."""
    from transformers import GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D
    twin = GPT2LMHeadModel(hf_config(model.config)).eval()
    conv1d = {f"{name}.weight" for name, layer in twin.named_modules() if isinstance(layer, Conv1D)}
    state = {name: w.t() if name in conv1d else w for name, w in model.state_dict().items()}
    twin.to(model.lm_head.weight.dtype).load_state_dict(state, strict=True)
    return twin


def gap(a, b):
    return (a - b).abs().max().item()


# ---- the same function as Hugging Face's

@pytest.mark.parametrize("noise, tolerance", [(0.2, 1e-4), (0.0, 1e-5)], ids=["shaken", "plain"])
@pytest.mark.parametrize("T", [1, 5, 11])
def test_logits_equal_hugging_faces(noise, tolerance, T):
    model = tiny_model(noise=noise)
    idx = random_ids(3, T)
    with torch.no_grad():
        logits, loss = model(idx)
        assert logits.shape == (3, T, 37) and loss is None
        assert gap(logits, hf_twin(model)(idx).logits) < tolerance


def test_a_wrong_gelu_and_a_wrong_epsilon_would_be_seen():
    """The two smallest mistakes: both tolerances of the test above lie well below what they change."""
    idx = random_ids(3, 11)
    for noise, tolerance in ((0.2, 1e-4), (0.0, 1e-5)):
        model = tiny_model(noise=noise)
        right = model(idx)[0]
        if noise:
            for block in model.transformer.h:
                block.mlp.gelu = torch.nn.GELU()
        else:
            for layer in model.modules():
                if isinstance(layer, torch.nn.LayerNorm):
                    layer.eps = 1e-6
        assert gap(model(idx)[0], right) > 5 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("noise, dtype", [(0.2, torch.float64), (0.0, torch.float32)],
                         ids=["shaken", "plain"])
def test_logits_of_the_full_124m(noise, dtype):
    """Shaken, twelve blocks amplify what float32 rounds to 1e-3, in their program as in ours."""
    torch.manual_seed(0)
    model = shake(GPT(GPTConfig()), noise).to(dtype)
    idx = random_ids(1, 16, n=50257)
    with torch.no_grad():
        assert gap(model(idx)[0], hf_twin(model)(idx).logits) < (1e-9 if noise else 1e-5)


def test_attention_written_a_second_time():
    """Head by head and token by token, as the paper has it, without a single reshape."""
    torch.manual_seed(0)
    attention = shake(CausalSelfAttention(GPTConfig(**TINY)).double())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    mixed = torch.zeros_like(x)
    qkv = x @ attention.c_attn.weight.T + attention.c_attn.bias
    for b in range(2):
        for head in range(4):
            at = slice(6 * head, 6 * head + 6)
            q, k, v = qkv[b, :, :24][:, at], qkv[b, :, 24:48][:, at], qkv[b, :, 48:][:, at]
            for t in range(5):
                scores = torch.stack([q[t] @ k[s] / math.sqrt(6) for s in range(t + 1)])
                weights = scores.exp() / scores.exp().sum()
                mixed[b, t, at] = sum(w * v[s] for s, w in enumerate(weights))
    want = mixed @ attention.c_proj.weight.T + attention.c_proj.bias
    assert gap(attention(x), want) < 1e-12


def test_attention_written_out_in_a_comment_is_the_fused_call():
    """The four commented lines beside the fused kernel are run, on numbers of their own."""
    source = inspect.getsource(CausalSelfAttention.forward)
    lines = re.findall(r"^        #     (.*)$", source, re.MULTILINE)
    assert len(lines) == 4
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 6, dtype=torch.float64)
    names = dict(q=q, k=k, v=v, T=7, torch=torch, math=math, F=F)
    exec("\n".join(lines), names)
    assert gap(names["y"], F.scaled_dot_product_attention(q, k, v, is_causal=True)) < 1e-12


def test_logits_beside_a_loss_carry_no_gradient():
    """A compiled backward pass would get a (B, T, V) tensor of zeros for them."""
    model, idx = tiny_model(), random_ids(2, 5)
    logits, loss = model(idx, idx)
    assert not logits.requires_grad and loss.requires_grad and torch.equal(logits, model(idx)[0])


def test_a_block_normalises_before_each_part_and_only_adds():
    torch.manual_seed(0)
    block = shake(Block(GPTConfig(**TINY)))
    x = torch.randn(2, 5, 24)

    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * layer.weight + layer.bias

    after = x + block.attn(norm(x, block.ln_1))
    want = after + block.mlp(norm(after, block.ln_2))
    assert gap(block(x), want) < 1e-5


def test_loss_is_the_mean_surprise_of_the_targets():
    model = tiny_model()
    idx, targets = random_ids(3, 5), random_ids(3, 5, seed=3)
    logits, loss = model(idx, targets)
    surprise = [-logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(5)]
    assert loss.shape == () and gap(loss, sum(surprise) / 15) < 1e-5


def test_targets_of_minus_100_do_not_count():
    model = tiny_model()
    idx, targets = random_ids(3, 5), random_ids(3, 5, seed=3)
    targets[0, 2:], targets[2] = -100, -100
    logits, loss = model(idx, targets)
    places = [(0, 0), (0, 1)] + [(1, t) for t in range(5)]
    kept = [-logits[b, t].log_softmax(-1)[targets[b, t]] for b, t in places]
    assert gap(loss, sum(kept) / 7) < 1e-5


def test_inputs_and_targets_may_be_slices_of_one_buffer():
    """The natural way to cut them, and one that `.view(-1)` would refuse."""
    buffer, model = random_ids(3, 6), tiny_model()
    sliced = model(buffer[:, :-1], buffer[:, 1:])
    copied = model(buffer[:, :-1].contiguous(), buffer[:, 1:].contiguous())
    assert torch.equal(sliced[1], copied[1])


def test_no_more_tokens_than_positions():
    with pytest.raises(AssertionError, match="12 tokens .* block_size is 11"):
        tiny_model()(random_ids(1, 12))
    with pytest.raises(AssertionError, match="multiple of n_head"):
        GPT(GPTConfig(**{**TINY, "n_head": 5}))


@pytest.mark.parametrize("name, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                         ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_the_four_sizes_have_their_number_of_parameters(name, count):
    shape = {k: v for k, v in PRESETS[name].items() if k.startswith("n_")}
    with torch.device("meta"):  # shapes without memory
        model, padded = GPT(GPTConfig(**shape)), GPT(GPTConfig(vocab_size=50304, **shape))
    assert model.num_params() == count
    assert padded.num_params() == count + 47 * model.config.n_embd
    assert model.config.n_embd // model.config.n_head == 64


def test_124m_with_padded_vocabulary():
    with torch.device("meta"):
        assert GPT(GPTConfig(vocab_size=50304)).num_params() == 124_475_904


def test_names_are_those_of_the_checkpoint():
    from transformers import GPT2LMHeadModel
    with torch.device("meta"):
        model = GPT(GPTConfig(**TINY))
        twin = GPT2LMHeadModel(hf_config(model.config))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in twin.named_parameters()}
    assert model.state_dict().keys() == twin.state_dict().keys()


# ---- initialisation

# Wide enough that a measured standard deviation is true to 2 %: the smallest tensor drawn has 32,768 numbers.
WIDE = dict(block_size=128, vocab_size=1000, n_layer=3, n_head=4, n_embd=256)


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return GPT(GPTConfig(**WIDE))


def test_every_tensor_is_drawn_as_the_table_says(wide):
    kinds = set()
    for name, p in wide.named_parameters():
        kind = name.split(".")[-2] + "." + name.split(".")[-1]
        kinds.add(kind)
        if kind.endswith("bias"):
            assert p.eq(0).all(), name
        elif kind in ("ln_1.weight", "ln_2.weight", "ln_f.weight"):
            assert p.eq(1).all(), name
        else:
            want = 0.02 / math.sqrt(6) if kind == "c_proj.weight" else 0.02  # 2 * n_layer = 6 of them add up
            assert p.std().item() == pytest.approx(want, rel=0.02), name
            assert abs(p.mean().item()) < 5 * want / math.sqrt(p.numel()), name
            # A normal distribution and not a uniform one: 4.6 % lie beyond two standard deviations.
            assert (p.abs() > 2 * want).float().mean().item() == pytest.approx(0.0455, abs=0.01), name
    layers = ("c_attn", "c_fc", "c_proj", "ln_1", "ln_2", "ln_f")
    assert kinds == {"wte.weight", "wpe.weight", *(f"{a}.{b}" for a in layers for b in ("weight", "bias"))}


def test_each_tensor_is_drawn_once(monkeypatch):
    """Drawing the tied matrix under both of its names would do no harm but to the reader's idea of it."""
    drawn = []

    def spy(name):
        original = getattr(torch.nn.init, name)

        def record(tensor, *args, **kwargs):
            drawn.append((tensor.data_ptr(), kwargs))
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.nn.init, name, record)

    for name in ("normal_", "zeros_", "ones_"):
        spy(name)
    model = GPT(GPTConfig(**TINY))
    # PyTorch's own Embedding has drawn N(0, 1) before us; ours are those with a standard deviation given.
    ours = [at for at, kwargs in drawn if "std" in kwargs]
    assert sorted(ours) == sorted(p.data_ptr() for p in model.parameters() if p.dim() == 2)
    drawn.clear()
    model.init_weights()
    assert sorted(at for at, _ in drawn) == sorted(p.data_ptr() for p in model.parameters())


def test_the_residual_stream_is_as_large_at_any_depth():
    """What the smaller projections are for: 4 and 16 blocks add about the same to the embedding."""
    added = []
    for n_layer in (4, 16):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**WIDE, "n_layer": n_layer}))
        idx = random_ids(2, 32, n=1000)
        x = start = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(32))
        for block in model.transformer.h:
            x = block(x)
        added.append((x - start).std().item())
    assert added[1] == pytest.approx(added[0], rel=0.15)


def test_loss_of_an_untrained_model_is_above_ln_v():
    """ln V is what a uniform guess costs; logits of spread s = 0.02 sqrt(C) cost s^2/2 more."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2))
    with torch.no_grad():
        logits, loss = model(random_ids(8, 64, n=50257), random_ids(8, 64, n=50257, seed=3))
    s = 0.02 * math.sqrt(768)
    assert logits.std().item() == pytest.approx(s, rel=0.02)
    assert math.log(50257) + s * s / 2 == pytest.approx(10.98, abs=0.005)
    assert loss.item() == pytest.approx(10.98, abs=0.06)


@pytest.mark.slow
def test_loss_of_the_untrained_124m():
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size=50304))
    assert model.num_params() == 124_475_904
    with torch.no_grad():
        _, loss = model(random_ids(2, 128, n=50257), random_ids(2, 128, n=50257, seed=3))
    assert 10.90 < loss.item() < 11.05


def test_one_matrix_reads_and_writes():
    model = tiny_model()

    def tied(model):
        return model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr() \
            and model.lm_head.weight is model.transformer.wte.weight

    assert tied(model) and tied(copy.deepcopy(model)) and tied(copy.deepcopy(model).to(torch.float64))
    other = tiny_model(seed=5)
    other.load_state_dict(model.state_dict())
    assert tied(other) and torch.equal(other.lm_head.weight, model.transformer.wte.weight)
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(random_ids(2, 5), random_ids(2, 5, seed=3))[1].backward()
    optimizer.step()
    assert tied(model) and not torch.equal(before, model.lm_head.weight)
    assert "lm_head.weight" not in dict(model.named_parameters())


# ---- who sees whom

def seen(x, y, t):
    """Norm of the gradient of what stands at place t of y with respect to each place of x."""
    return torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)[0][0].norm(dim=-1)


def test_attention_looks_at_itself_and_the_past_only():
    """Alone, without the residual path, which would hide that a token does not attend to itself."""
    torch.manual_seed(0)
    attention = shake(CausalSelfAttention(GPTConfig(**TINY)))
    x = torch.randn(1, 7, 24, requires_grad=True)
    y = attention(x)
    for t in range(7):
        norms = seen(x, y, t)
        assert norms[:t + 1].min() > 1e-6 and norms[t + 1:].eq(0).all()


def test_no_logit_depends_on_a_later_token():
    model, idx, embedded = tiny_model(), random_ids(1, 11), []
    model.transformer.wte.register_forward_hook(lambda layer, inputs, output: embedded.append(output))
    logits, _ = model(idx)
    for t in range(11):
        norms = seen(embedded[0], logits, t)
        assert norms[:t + 1].min() > 1e-6 and norms[t + 1:].eq(0).all()


def test_rows_do_not_see_each_other():
    model, idx = tiny_model(), random_ids(3, 7)
    together = model(idx)[0]
    for b in range(3):
        assert gap(model(idx[b:b + 1])[0][0], together[b]) < 1e-5


def test_the_order_of_tokens_matters():
    """Without positions, the last token would see its past as a bag of words."""
    model, idx = tiny_model(), torch.tensor([[3, 5, 7, 9]])
    swapped = torch.tensor([[5, 3, 7, 9]])
    assert gap(model(idx)[0][:, -1], model(swapped)[0][:, -1]) > 0.1


def test_hidden_is_what_lm_head_reads():
    model, idx = tiny_model(), random_ids(2, 5)
    assert gap(model.hidden(idx) @ model.transformer.wte.weight.T, model(idx)[0]) < 1e-5


# ---- writing

def test_greedy_writing_equals_hugging_faces():
    model = tiny_model(block_size=64)
    prompt = random_ids(2, 6)
    want = hf_twin(model).generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                   max_new_tokens=50, pad_token_id=0)
    got = model.generate(prompt, 50, temperature=0)
    assert torch.equal(got, want) and got.shape == (2, 56)
    assert len(set(got[:, 6:].flatten().tolist())) > 3  # not one id over and over, as many mistakes write too


def test_temperature_0_takes_the_likeliest_id():
    model, idx = tiny_model(), random_ids(5, 4)
    for _ in range(7):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(random_ids(5, 4), 7, temperature=0, top_k=3), idx)


N = 20_000


def draw(model, prompt, seed=0, **how):
    """N draws of the one id that follows the prompt -> their frequencies, (V,)."""
    generator = torch.Generator().manual_seed(seed)
    new = model.generate(torch.tensor([prompt]).repeat(N, 1), 1, generator=generator, **how)[:, -1]
    return new.bincount(minlength=model.config.vocab_size) / N


def mild(**changes):
    """A tiny model whose odds are spread out, so that frequencies say something about many ids."""
    model = tiny_model(**changes)
    with torch.no_grad():
        model.transformer.ln_f.weight *= 0.3
        model.transformer.ln_f.bias *= 0.3
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    model = mild()
    odds = model(torch.tensor([[3, 5]]))[0][0, -1].double()
    want = (odds / temperature).exp() / (odds / temperature).exp().sum()
    # Half the summed difference: with 20,000 draws of 37 ids it is below 0.02 by a wide margin.
    assert (draw(model, [3, 5], temperature=temperature) - want).abs().sum() / 2 < 0.02


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_draws_among_the_k_likeliest_as_the_model_says(k):
    model = mild()
    odds = model(torch.tensor([[3, 5]]))[0][0, -1].softmax(-1)
    best = odds.argsort(descending=True)[:k]
    want = torch.zeros(37).index_copy(0, best, odds[best] / odds[best].sum())
    got = draw(model, [3, 5], top_k=k)
    assert set(got.nonzero().flatten().tolist()) == set(best.tolist())
    assert (got - want).abs().sum() / 2 < 0.02


def test_top_k_beyond_the_vocabulary_is_no_limit():
    model = mild()
    assert torch.equal(draw(model, [3, 5], top_k=1000), draw(model, [3, 5]))


def test_a_generator_makes_draws_repeatable():
    model, prompt = mild(), random_ids(3, 2)
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def write(seed):
        return model.generate(prompt, 8, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(write(1), write(1)) and not torch.equal(write(1), write(2))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are changed


def test_stop_ends_each_row_where_it_comes():
    """The odds of the stop id are 1 in 37 or so: every row goes on to its own first one, and no further."""
    model, stop = mild(), 3
    idx = torch.full((200, 1), 5)
    free = model.generate(idx, 10, generator=torch.Generator().manual_seed(4))
    got = model.generate(idx, 10, generator=torch.Generator().manual_seed(4), stop=stop)
    assert got.shape == free.shape
    ended = 0
    for row, other in zip(got.tolist(), free.tolist()):
        end = other.index(stop) if stop in other else len(other)
        ended += end < len(other)
        assert row[:end] == other[:end] and set(row[end:]) <= {stop}
    assert 20 < ended < 180


def test_stop_in_the_prompt_does_not_end_a_row_and_all_ended_rows_end_the_writing():
    model, calls = tiny_model(), []
    model.transformer.wte.register_forward_hook(lambda *a: calls.append(1))
    likeliest = model(torch.tensor([[3, 5]]))[0][0, -1].argmax().item()
    calls.clear()
    out = model.generate(torch.tensor([[3, 5]]), 10, temperature=0, stop=likeliest)
    assert out.tolist() == [[3, 5, likeliest]] and len(calls) == 1
    assert model.generate(torch.tensor([[3, 5]]), 4, temperature=0, stop=3).shape[1] > 2


def with_loud_padding(n_vocab=31):
    """A model whose rows 31 to 36 only pad the matrix, and would win every draw behind the prompt [3, 5]."""
    model = mild()
    model.n_vocab = n_vocab
    with torch.no_grad():
        h = model.hidden(torch.tensor([[3, 5]]))[0, -1]
        model.transformer.wte.weight[n_vocab:] = 100 * h
    return model


def test_ids_that_pad_the_vocabulary_are_never_drawn():
    model = with_loud_padding()
    logits = model(torch.tensor([[3, 5]]))[0][0, -1]
    assert logits.shape == (37,) and logits.argmax() >= 31  # forward hides nothing; generate does
    want = torch.zeros(37)
    want[:31] = logits[:31].softmax(-1)
    assert (draw(model, [3, 5]) - want).abs().sum() / 2 < 0.02
    for how in (dict(), dict(top_k=5), dict(top_k=1000), dict(temperature=3.0)):
        assert draw(model, [3, 5], **how)[31:].sum() == 0
    assert model.generate(torch.tensor([[3, 5]]), 9, temperature=0).max() < 31


def test_how_many_ids_can_be_drawn():
    with torch.device("meta"):
        assert GPT(GPTConfig()).n_vocab == 50257 and GPT(GPTConfig()).eot == 50256
        assert GPT(GPTConfig(**TINY)).n_vocab == 37


def test_a_prompt_longer_than_the_context_is_read_from_its_end():
    model, prompt = tiny_model(), random_ids(2, 30)
    long = model.generate(prompt, 6, temperature=0)
    assert torch.equal(long[:, :30], prompt)
    assert torch.equal(long[:, 30:], model.generate(prompt[:, -11:], 6, temperature=0)[:, 11:])
    # Each new id again follows from the last 11 alone.
    for t in range(30, 36):
        assert torch.equal(long[:, t], model(long[:, t - 11:t])[0][:, -1].argmax(-1))


def test_writing_builds_no_graph():
    model, built = tiny_model(), []
    model.transformer.ln_f.register_forward_hook(lambda layer, inputs, output: built.append(output.requires_grad))
    model.generate(random_ids(1, 3), 2)
    assert built == [False, False]


def test_the_module_names_what_the_lessons_import():
    for name in ("GPTConfig", "TrainConfig", "GPT", "CausalSelfAttention", "MLP", "Block", "get_lr", "main"):
        assert callable(getattr(train_gpt2, name))
