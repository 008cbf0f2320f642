"""Val loss counts tokens: one number for one text, whatever reads it. And the texts that a model writes."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from helpers import FakeWorld, Letters, run_worlds, tiny_config, tiny_model, write_shards
from train_gpt2 import Corpus, continue_text, evaluate_loss

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
    """Mean surprise of all targets of the first n windows, in float64."""
    windows = corpus.windows(range(n))
    return F.cross_entropy(model(windows[:, :-1])[0].double().flatten(0, 1), windows[:, 1:].flatten()).item()


@pytest.mark.parametrize("size, B, val_tokens, windows", [
    (1, 1, 1, 1), (1, 7, 2 * T - 1, 1), (1, 3, 17 * T, 17), (1, 64, 20 * T, 20),
    (2, 3, 17 * T, 17), (3, 2, 2 * T, 2), (4, 4, 10 ** 9, 20), (8, 1, 17 * T + 5, 17)])
def test_any_number_of_processes_and_rows_scores_the_same_tokens(corpus, size, B, val_tokens, windows):
    """Whole windows, and not more than there are. A short last batch weighs what it holds; some processes have nothing
    to score, and all of them know the result."""
    model, cfg = tiny_model().double(), tiny_config(val_tokens=val_tokens)
    want = by_hand(model, corpus, windows)
    for loss, tokens in run_worlds(size, lambda world, mine: evaluate_loss(mine, corpus, B, cfg, world), model):
        assert loss == pytest.approx(want, abs=1e-6) and tokens == windows * T and type(tokens) is int


class Spy(nn.Module):
    """Has the interface of GPT, a dropout that would spoil the loss, and notes how it was called."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout, self.calls = tiny_model(), nn.Dropout(0.5), []

    def forward(self, idx, targets):
        self.calls.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), idx.shape))
        assert idx.min() >= 0
        with torch.autocast("cpu", enabled=False):
            logits = self.dropout(self.inner(idx)[0])
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_switches_dropout_and_gradients_off_and_the_mode_back(corpus, training):
    spy, world = Spy().train(training), FakeWorld()
    world.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    loss, _ = evaluate_loss(spy, corpus, 3, tiny_config(), world)
    assert spy.training is spy.dropout.training is training and torch.is_grad_enabled()
    # Seven batches, all of one shape: a new one would make a compiled model compile again.
    assert spy.calls == [(False, False, True, (3, T))] * 7
    assert loss == pytest.approx(by_hand(spy.inner, corpus, 20), abs=1e-5)


# ---- writing

@pytest.fixture
def model():
    model = tiny_model()
    model.n_vocab = 28
    return model


def shown(row):
    """The text that continue_text makes of what a model wrote."""
    model = tiny_model()
    model.generate = lambda *arguments, **options: torch.tensor([row])
    return continue_text(model, Letters(), "", 1, 1, seed=0)[0]


def test_the_first_document_is_shown():
    """One mark in front opens the document, the next one ends it."""
    end, abc = Letters.eot_token, [1, 2, 3]
    for row, text in ((abc, "abc"), ([end, *abc], "abc"), ([*abc, end], "abc"), ([*abc, end, end], "abc"),
                      ([end, *abc, end, 4, end], "abc"), ([end], ""), ([end, end, *abc], "")):
        assert shown(row) == text


@pytest.mark.parametrize("text", ["abc", ""])
@pytest.mark.parametrize("temperature, top_k", [(1.0, 50), (0.7, 5), (0, None)])
def test_continuations_are_what_generate_draws(model, text, temperature, top_k):
    """With its temperature, its top_k and its seed; after <|endoftext|>, which is not shown, if there is no text."""
    state = torch.get_rng_state()
    for seed in (3, 9):
        prompt = torch.tensor([[1, 2, 3] if text else [27]] * 4)
        rows = model.generate(prompt, 6, temperature, top_k, torch.Generator().manual_seed(seed), stop=27)
        want = [shown(row) for row in rows.tolist()]
        assert continue_text(model, Letters(), text, 4, 6, seed, temperature, top_k) == want
        assert len(set(want)) == (4 if temperature else 1) and all(new.startswith(text) for new in want)
    assert torch.equal(torch.get_rng_state(), state)  # writing on the way does not change what is trained


@pytest.mark.parametrize("training", [True, False])
def test_continuations_end_with_the_document_and_are_written_in_evaluation_mode(model, training):
    """A model that always says <|endoftext|> adds nothing to the text, and is not asked a second time."""
    modes = []
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(100 * model.transformer.wte.weight[27])
    model.train(training).transformer.ln_f.register_forward_hook(lambda layer, *_: modes.append(layer.training))
    assert continue_text(model, Letters(), "abc", 2, 6, seed=0) == ["abc"] * 2
    assert modes == [False] and model.training is training
