"""Val loss counts tokens: one number for one text, whatever reads it. And the texts that a model writes."""
import numpy as np
import pytest
import torch
import torch.nn as nn

from helpers import FakeWorld, run_worlds, tiny_config, tiny_model, write_shards
from train_gpt2 import Corpus, continue_text, decode, evaluate_loss, evaluating

T = 11


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards, 13 + 7 windows, of ids that get rarer as they get larger: no batch is like another."""
    ids = np.random.default_rng(0).geometric(0.15, 225).clip(max=37) - 1
    folder = write_shards(tmp_path_factory.mktemp("val"), [ids[:13 * T + 3], ids[13 * T + 3:]], split="val")
    corpus = Corpus(folder, "val", T, 37)
    assert corpus.n_windows == 20
    return corpus


def by_hand(model, corpus, n):
    """Mean surprise of the first n windows, token by token, in float64."""
    surprise = []
    for window in corpus.windows(range(n)):
        logits = model(window[None, :-1])[0][0].double()
        surprise += [-logits[t].log_softmax(-1)[window[t + 1]].item() for t in range(T)]
    assert len(surprise) == n * T
    return sum(surprise) / len(surprise)


@pytest.mark.parametrize("B", [1, 2, 3, 7, 17, 64])
def test_val_loss_is_the_mean_over_tokens(corpus, B):
    """17 windows: most of these B leave a short last batch, which must weigh what it holds and no more."""
    model = tiny_model().double()
    loss, tokens = evaluate_loss(model, corpus, B, tiny_config(val_tokens=17 * T), FakeWorld())
    assert tokens == 17 * T and type(tokens) is int
    assert loss == pytest.approx(by_hand(model, corpus, 17), abs=1e-6)


@pytest.mark.parametrize("size, B", [(2, 1), (2, 3), (3, 2), (4, 4), (4, 64), (8, 1)])
def test_any_number_of_processes_scores_the_same_text(corpus, size, B):
    """Also where some of them have nothing to score; and every one of them knows the result."""
    model, cfg = tiny_model().double(), tiny_config(val_tokens=17 * T)
    want = by_hand(model, corpus, 17)
    results = run_worlds(size, lambda world, mine: evaluate_loss(mine, corpus, B, cfg, world), model)
    assert len(results) == size
    for loss, tokens in results:
        assert loss == pytest.approx(want, abs=1e-6) and tokens == 17 * T


@pytest.mark.parametrize("val_tokens, windows", [(1, 1), (T, 1), (2 * T - 1, 1), (2 * T, 2), (20 * T, 20),
                                                 (10 ** 9, 20)])
def test_val_tokens_are_whole_windows_and_not_more_than_there_are(corpus, val_tokens, windows):
    model = tiny_model().double()
    loss, tokens = evaluate_loss(model, corpus, 3, tiny_config(val_tokens=val_tokens), FakeWorld())
    assert tokens == windows * T and loss == pytest.approx(by_hand(model, corpus, windows), abs=1e-6)


class Spy(nn.Module):
    """Has the interface of GPT, a dropout that would spoil the loss, and notes how it was called."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout, self.calls = tiny_model(), nn.Dropout(0.5), []

    def forward(self, idx, targets):
        self.calls.append((self.training, torch.is_grad_enabled(), tuple(idx.shape), idx.min().item() >= 0))
        logits, _ = self.inner(idx)
        logits = self.dropout(logits)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_switches_dropout_and_gradients_off_and_the_mode_back(corpus, training):
    spy = Spy().train(training)
    loss, _ = evaluate_loss(spy, corpus, 3, tiny_config(), FakeWorld())
    assert spy.training is spy.dropout.training is training and torch.is_grad_enabled()
    # Seven batches, all of one shape: a new one would make a compiled model compile again.
    assert spy.calls == [(False, False, (3, T), True)] * 7
    assert loss == pytest.approx(by_hand(spy.inner, corpus, 20), abs=1e-5)
    assert all(p.grad is None for p in spy.parameters())


def test_evaluation_runs_under_autocast(corpus):
    world, asked = FakeWorld(), []
    original = world.autocast
    world.autocast = lambda: asked.append(1) or original()
    evaluate_loss(tiny_model(), corpus, 10, tiny_config(), world)
    assert len(asked) == 2


def test_evaluating_restores_the_mode_even_after_an_error():
    for training in (True, False):
        model = nn.Dropout().train(training)
        with pytest.raises(ZeroDivisionError), evaluating(model):
            assert not model.training and not torch.is_grad_enabled()
            1 / 0
        assert model.training is training and torch.is_grad_enabled()


# ---- writing

class Letters:
    """A tokenizer of 26 letters, a space and the end of text; the ids above only pad the vocabulary."""

    eot_token = 27

    def encode_ordinary(self, text):
        return [" abcdefghijklmnopqrstuvwxyz".index(c) for c in text]

    def decode(self, ids):
        return "".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in ids)


def test_decode_gives_the_first_document():
    """One mark in front opens the document, the next one ends it."""
    end, abc = Letters.eot_token, [1, 2, 3]
    for row, text in ((abc, "abc"), ([end, *abc], "abc"), ([*abc, end], "abc"), ([*abc, end, end], "abc"),
                      ([end, *abc, end, 4, end], "abc"), ([end], ""), ([end, end, *abc], "")):
        assert decode(Letters(), row) == text


def samples(text="abc", model=None, rows=2, new_tokens=6, seed=0, **how):
    if model is None:
        model = tiny_model()
        model.n_vocab = 28
    return continue_text(model, Letters(), text, rows, new_tokens, seed, **how)


def test_continuations_begin_with_the_text_and_are_as_long_as_asked():
    texts = samples(rows=5)
    assert len(texts) == 5 and len(set(texts)) == 5
    assert all(text.startswith("abc") and len(text) <= 3 + 6 for text in texts)


def test_continuations_are_the_seeds_alone():
    model = tiny_model()
    model.n_vocab = 28
    once, state = samples(seed=3, model=model), torch.get_rng_state()
    torch.rand(5)
    assert samples(seed=3, model=model) == once != samples(seed=4, model=model)
    torch.set_rng_state(state)
    samples(model=model)
    assert torch.equal(torch.get_rng_state(), state)  # writing on the way does not change what is trained


def test_continuations_are_what_generate_draws():
    """With its temperature, its top_k and its generator."""
    model, prompt = tiny_model(), torch.tensor([[1, 2, 3]] * 4)
    model.n_vocab = 28
    for temperature, top_k in ((1.0, 50), (0.7, 5), (0, None)):
        rows = model.generate(prompt, 6, temperature, top_k, torch.Generator().manual_seed(9), stop=27)
        want = [decode(Letters(), row) for row in rows.tolist()]
        assert samples(model=model, rows=4, seed=9, temperature=temperature, top_k=top_k) == want


def test_no_text_to_continue_begins_a_document():
    """After <|endoftext|>, which is not shown."""
    model = tiny_model()
    model.n_vocab = 28
    rows = model.generate(torch.tensor([[27]]), 6, temperature=0, stop=27)
    assert samples(text="", model=model, rows=1, temperature=0) == [decode(Letters(), rows[0].tolist())]


def test_continuations_end_with_the_document():
    """A model that always says <|endoftext|> adds nothing to the text."""
    model = tiny_model()
    model.n_vocab = 28
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(100 * model.transformer.wte.weight[27])
    calls = []
    model.transformer.ln_f.register_forward_hook(lambda *a: calls.append(1))
    assert samples(model=model) == ["abc"] * 2 and len(calls) == 1  # and is not asked a second time


@pytest.mark.parametrize("training", [True, False])
def test_continuations_are_written_in_evaluation_mode(training):
    model, modes = tiny_model().train(training), []
    model.n_vocab = 28
    model.transformer.ln_f.register_forward_hook(lambda layer, *a: modes.append(layer.training))
    samples(model=model, new_tokens=3)
    assert set(modes) == {False} and model.training is training
