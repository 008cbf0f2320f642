"""The network is GPT-2: equal to Hugging Face's on the same weights, drawn as the papers say, able to write.

Shapes prove little, and small weights hide what is wrong with biases, gains and the GELU. So most
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

from helpers import TINY, gap, hf_twin, random_ids, shake, tiny_model
from train_gpt2 import GPT, PRESETS, CausalSelfAttention, GPTConfig


# ---- the same function as Hugging Face's

@pytest.mark.parametrize("noise, tolerance", [(0.2, 1e-4), (0.0, 1e-5)], ids=["shaken", "plain"])
def test_logits_equal_hugging_faces(noise, tolerance):
    """And the two smallest mistakes change them by more: another GELU, another epsilon."""
    model = tiny_model(noise=noise)
    twin = hf_twin(model)
    with torch.no_grad():
        for T in (1, 11):
            idx = random_ids(3, T)
            logits, loss = model(idx)
            assert logits.shape == (3, T, 37) and loss is None and gap(logits, twin(idx).logits) < tolerance
        for layer in model.modules():
            if isinstance(layer, torch.nn.LayerNorm) and noise == 0:
                layer.eps = 1e-6
            if isinstance(layer, torch.nn.GELU) and noise > 0:
                layer.approximate = "none"
        assert gap(model(idx)[0], logits) > 5 * tolerance


def test_attention_is_what_its_comment_writes_out():
    """The four commented lines beside the fused kernel are run, on the q, k and v of a layer."""
    lines = re.findall(r"^        #     (.*)$", inspect.getsource(CausalSelfAttention.forward), re.MULTILINE)
    assert len(lines) == 4
    torch.manual_seed(0)
    attention, x = shake(CausalSelfAttention(GPTConfig(**TINY))).double(), torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = (t.view(2, 7, 4, 6).transpose(1, 2) for t in attention.c_attn(x).split(24, dim=2))
    names = dict(q=q, k=k, v=v, T=7, torch=torch, math=math, F=F)
    exec("\n".join(lines), names)
    assert gap(attention(x), attention.c_proj(names["y"].transpose(1, 2).flatten(2))) < 1e-12


def test_a_logit_depends_on_its_rows_past_and_present_and_on_nothing_else():
    model, embedded = tiny_model(), []
    model.transformer.wte.register_forward_hook(lambda layer, inputs, output: embedded.append(output))
    logits, _ = model(random_ids(2, 11))
    for t in range(11):
        gradient, = torch.autograd.grad(logits[0, t].square().sum(), embedded[0], retain_graph=True)
        norms = gradient.norm(dim=-1)
        assert norms[0, :t + 1].min() > 1e-6 and norms[0, t + 1:].eq(0).all() and norms[1].eq(0).all()


def test_the_loss_is_the_mean_surprise_of_the_targets_that_count():
    """-100 does not. Inputs and targets may be slices of one buffer, which `.view(-1)` would refuse."""
    model, buffer = tiny_model(), random_ids(3, 6)
    targets, left_out = buffer[:, 1:], buffer.clone()
    targets[1, 3] = 0  # an id like any other
    left_out[0, 3:], left_out[2] = -100, -100
    for idx, targets, places in ((buffer[:, :-1], targets, [(b, t) for b in range(3) for t in range(5)]),
                                 (random_ids(3, 5), left_out[:, 1:], [(0, 0), (0, 1), *((1, t) for t in range(5))])):
        logits, loss = model(idx, targets)
        want = sum(-logits[b, t].log_softmax(-1)[targets[b, t]] for b, t in places) / len(places)
        assert loss.shape == () and gap(loss, want) < 1e-5
        # A compiled backward pass would get a (B, T, V) tensor of zeros for logits that could have a gradient.
        assert loss.requires_grad and not logits.requires_grad and torch.equal(logits, model(idx)[0])


def test_no_more_tokens_than_positions():
    with pytest.raises(AssertionError, match="12 tokens .* block_size is 11"):
        tiny_model()(random_ids(1, 12))
    with pytest.raises(AssertionError, match="multiple of n_head"):
        GPT(GPTConfig(**{**TINY, "n_head": 5}))


def test_the_four_sizes_have_their_number_of_parameters():
    for name, count, padded in [("gpt2", 124_439_808, 124_475_904), ("gpt2-medium", 354_823_168, 354_871_296),
                                ("gpt2-large", 774_030_080, 774_090_240), ("gpt2-xl", 1_557_611_200, 1_557_686_400)]:
        shape = {key: value for key, value in PRESETS[name].items() if key.startswith("n_")}
        with torch.device("meta"):  # shapes without memory
            model = GPT(GPTConfig(**shape))
            assert (model.num_params(), GPT(GPTConfig(vocab_size=50304, **shape)).num_params()) == (count, padded)
        assert model.config.n_embd // model.config.n_head == 64
        assert (model.n_vocab, model.eot) == (50257, 50256)


# ---- initialization

def test_every_tensor_is_drawn_as_the_table_says():
    """Wide enough that a measured spread is true to 2 %: the smallest tensor that is drawn has 32,768 numbers."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=1000, n_layer=3, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert p.eq(0 if name.endswith("bias") else 1).all(), name
        else:
            want = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02  # 2 * n_layer = 6 of them add up
            assert p.std().item() == pytest.approx(want, rel=0.02), name
            assert abs(p.mean().item()) < 5 * want / math.sqrt(p.numel()), name
            # A normal distribution and not a uniform one: 4.6 % lie beyond two standard deviations.
            assert (p.abs() > 2 * want).float().mean().item() == pytest.approx(0.0455, abs=0.01), name


def test_loss_of_an_untrained_model_is_above_ln_v():
    """ln V is what a uniform guess costs; logits of spread s = 0.02 sqrt(C) cost s^2/2 more: 10.98."""
    torch.manual_seed(0)
    model, s = GPT(GPTConfig(block_size=64, n_layer=2)), 0.02 * math.sqrt(768)
    with torch.no_grad():
        logits, loss = model(random_ids(4, 64, n=50257), random_ids(4, 64, n=50257, seed=3))
    assert logits.std().item() == pytest.approx(s, rel=0.02)
    assert loss.item() == pytest.approx(math.log(50257) + s * s / 2, abs=0.06)


def test_one_matrix_reads_and_writes():
    """Also after weights were loaded, after a step, and in a copy."""
    model, fresh = tiny_model(seed=5), tiny_model()
    model.load_state_dict(fresh.state_dict())
    model(random_ids(2, 5), random_ids(2, 5, seed=3))[1].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for m in (fresh, model, copy.deepcopy(model).double()):
        assert m.lm_head.weight is m.transformer.wte.weight and "lm_head.weight" not in dict(m.named_parameters())


# ---- writing

def test_greedy_writing_equals_hugging_faces():
    model, prompt, built = tiny_model(block_size=64), random_ids(2, 6), []
    model.transformer.ln_f.register_forward_hook(lambda layer, inputs, output: built.append(output.requires_grad))
    want = hf_twin(model).generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                   max_new_tokens=50, pad_token_id=0)
    got = model.generate(prompt, 50, temperature=0, top_k=3)
    assert torch.equal(got, want) and got.shape == (2, 56) and set(built) == {False}
    assert len(set(got[:, 6:].flatten().tolist())) > 3  # not one id over and over, as many mistakes write too


def test_a_prompt_longer_than_the_context_is_read_from_its_end():
    """And each new id again follows from the last 11 alone."""
    model, prompt = tiny_model(), random_ids(2, 30)
    got = model.generate(prompt, 6, temperature=0)
    assert got.shape == (2, 36) and torch.equal(got[:, :30], prompt)
    for t in range(30, 36):
        assert torch.equal(got[:, t], model(got[:, t - 11:t])[0][:, -1].argmax(-1))


def mild():
    """A tiny model whose probabilities are spread out, so that frequencies say something about many ids."""
    model = tiny_model()
    with torch.no_grad():
        model.transformer.ln_f.weight *= 0.3
        model.transformer.ln_f.bias *= 0.3
    return model


@pytest.mark.parametrize("temperature, top_k", [(0.5, None), (2.0, 5), (1.0, 33)])
def test_draws_follow_the_tempered_softmax_of_the_k_likeliest(temperature, top_k):
    """After two prompts at once, with other favorites. Ids 31 to 36 only pad the matrix: forward finds one of them the
    likeliest, generate never draws it."""
    model, prompts, N = mild(), torch.tensor([[3, 5], [8, 2]]), 20_000
    model.n_vocab = 31
    with torch.no_grad():
        model.transformer.wte.weight[31:] = 100 * model.hidden(prompts)[:, -1].mean(0)
    state = torch.get_rng_state()
    new, again = (model.generate(prompts.repeat(N, 1), 1, temperature, top_k, torch.Generator().manual_seed(0))[:, -1]
                  for _ in range(2))
    assert torch.equal(new, again) and torch.equal(torch.get_rng_state(), state)  # the generator's draws alone
    logits = model(prompts)[0][:, -1].detach()
    assert logits.shape == (2, 37) and logits.argmax(-1).min() >= 31
    for row, drawn in zip(logits[:, :31].double(), new.view(N, 2).T):
        best = row.argsort(descending=True)[:top_k]
        want = torch.zeros(37).double().index_copy(0, best, (row[best] / temperature).softmax(0))
        got = drawn.bincount(minlength=37) / N
        # Half the summed difference: 20,000 draws of 31 ids are expected to be 0.4 * sqrt(31 / 20,000) = 0.016 off.
        assert (got - want).abs().sum() / 2 < 0.03 and not got[want == 0].any()


def test_stop_ends_each_row_where_it_comes():
    """The stop id has a probability of about 1 in 37: every row goes on to its own first one, and no further."""
    model, stop = mild(), 3
    free, got = (model.generate(torch.full((200, 1), 5), 10, generator=torch.Generator().manual_seed(4), stop=s)
                 for s in (None, stop))
    assert got.shape == free.shape
    ends = [row.index(stop) if stop in row else 11 for row in free.tolist()]
    assert 20 < sum(end < 11 for end in ends) < 180
    for row, other, end in zip(got.tolist(), free.tolist(), ends):
        assert row[:end] == other[:end] and set(row[end:]) <= {stop}


def test_writing_ends_when_all_rows_have_ended_and_a_stop_in_the_prompt_ends_none():
    model, prompt, calls = tiny_model(), torch.tensor([[3, 5]]), []
    likeliest = model(prompt)[0][0, -1].argmax().item()
    model.transformer.wte.register_forward_hook(lambda *a: calls.append(1))
    assert model.generate(prompt, 10, temperature=0, stop=likeliest).tolist() == [[3, 5, likeliest]] and len(calls) == 1
    assert model.generate(prompt, 1, temperature=0, stop=3).tolist() == [[3, 5, likeliest]]
