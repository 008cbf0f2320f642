"""The recipe of training: who decays, how the learning rate moves, and that a step is what the formulas say.

The formulas are written here a second time, with torch's plain AdamW, and compared in float64, where what is right
agrees to ten digits and more, and what is nearly right does not.
"""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from helpers import TINY, FakeWorld, gap, random_ids, tiny_config, tiny_model
from train_gpt2 import PRESETS, Muon, TrainConfig, configure_optimizers, get_lr, orthogonal, train_step

CPU = torch.device("cpu")


# ---- groups

def test_adamw_has_gpt3s_settings_and_decays_matrices_only():
    model = tiny_model()
    [adamw] = configure_optimizers(model, tiny_config(weight_decay=0.3, max_lr=1e-3), CPU)
    assert isinstance(adamw, torch.optim.AdamW)
    for g, dim, decay in zip(adamw.param_groups, (2, 1), (0.3, 0.0), strict=True):
        assert set(g["params"]) == {p for p in model.parameters() if p.dim() == dim}
        assert (g["betas"], g["eps"], g["lr"], g["weight_decay"]) == ((0.9, 0.95), 1e-8, 1e-3, decay)
        assert g["fused"] is True and not g["amsgrad"] and not g["maximize"]


def test_muon_gets_the_matrices_inside_the_blocks():
    """In float32, which PyTorch's would round, by our own class."""
    model, cfg = tiny_model(), tiny_config(optimizer="muon", weight_decay=0.3)
    for dtype, kind in ((torch.bfloat16, torch.optim.Muon), (torch.float32, Muon), (torch.float16, Muon)):
        muon, adamw = configure_optimizers(model, cfg, CPU, dtype)
        assert type(muon) is kind and muon.defaults["adjust_lr_fn"] == "match_rms_adamw"
        [group] = muon.param_groups
        assert set(group["params"]) == {p for p in model.transformer.h.parameters() if p.dim() == 2}
        assert group["weight_decay"] == 0.3
        vectors = 3 * (4 + 4) + 2  # biases, gains and shifts: in three blocks and in ln_f
        assert [(len(g["params"]), g["weight_decay"], g["betas"], g["eps"]) for g in adamw.param_groups] == [
            (2, 0.3, (0.9, 0.95), 1e-8), (vectors, 0.0, (0.9, 0.95), 1e-8)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_parameter_in_no_optimizer_is_noticed(optimizer):
    """Whatever a fork adds, a matrix or a vector, anywhere, is trained; what is frozen is in none."""
    model = tiny_model()
    model.extra = torch.nn.Linear(5, 7)
    frozen = model.transformer.wpe.weight, model.transformer.h[1].mlp.c_fc.weight
    for p in frozen:
        p.requires_grad_(False)
    optimizers = configure_optimizers(model, tiny_config(optimizer=optimizer), CPU)
    owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted({id(p) for p in model.parameters()} - {id(p) for p in frozen})


def test_orthogonal_keeps_the_directions_and_evens_their_strengths():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 48, dtype=torch.float64))[0] for n in (48, 144))
    S = torch.logspace(-1.5, 0, 48, dtype=torch.float64)
    assert S.min() / S.norm() > 0.01  # what its docstring asks for
    x = U * S @ V.T
    evened = U.T @ orthogonal(x) @ V
    P = evened.diagonal()
    assert gap(evened, P.diag()) < 1e-9 and 0.68 < P.min() < 0.75 and 1.1 < P.max() < 1.14
    assert torch.equal(orthogonal(x.T), orthogonal(x).T)
    assert not orthogonal(torch.zeros(3, 5)).any()  # no gradient, no update: not 0 / 0


def test_muon_is_pytorchs_without_its_rounding(monkeypatch):
    """torch.optim.Muon, made to compute in float32, gives the same weights to the last digits."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    ours, theirs = tiny_model(), tiny_model()
    cfg = tiny_config(optimizer="muon", max_lr=0.02, weight_decay=0.3)
    mine, _ = configure_optimizers(ours, cfg, CPU)
    its = torch.optim.Muon([p for p in theirs.transformer.h.parameters() if p.dim() == 2], lr=0.02, weight_decay=0.3,
                           adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for model, optimizer in (ours, mine), (theirs, its):
            model.zero_grad()
            model(random_ids(8, 11, seed=step), random_ids(8, 11, seed=step + 1))[1].backward()
            model.transformer.h[1].mlp.c_fc.weight.grad = None  # frozen by somebody: it stays as it is
            optimizer.step()
    assert all(gap(p, q) < 2e-6 for p, q in zip(ours.parameters(), theirs.parameters()))
    state, other = (o.state_dict()["state"][0]["momentum_buffer"] for o in (mine, its))  # one kind of checkpoint
    assert gap(state, other) < 2e-6


# ---- the learning rate

SCHEDULES = [TrainConfig(), *(TrainConfig(max_lr=1.0, min_lr=0.07, warmup_steps=warmup, max_steps=steps)
                              for warmup, steps in [(0, 50), (10, 50), (1, 2), (49, 50), (0, 1), (100, 10)])]


@pytest.mark.parametrize("cfg", SCHEDULES, ids=lambda cfg: f"{cfg.warmup_steps}-{cfg.max_steps}")
def test_the_learning_rate_is_a_line_and_then_torchs_cosine(cfg):
    """The paper run's and shorter ones, down to a single step, and one that ends before its warm-up does."""
    warmup, steps = cfg.warmup_steps, cfg.max_steps
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.max_lr)
    cosine = CosineAnnealingLR(sgd, T_max=max(1, steps - 1 - warmup), eta_min=cfg.min_lr)
    want = [cfg.max_lr * (step + 1) / warmup for step in range(min(warmup, steps))]
    while len(want) < steps:
        want.append(cosine.get_last_lr()[0] if len(want) < steps - 1 else cfg.min_lr)
        sgd.step()
        cosine.step()
    assert [get_lr(step, cfg) for step in range(steps)] == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert get_lr(steps + warmup, cfg) == cfg.min_lr  # a step past the end is the last one's


def test_learning_rates_are_gpt3s_smaller_for_bigger_models():
    """Brown et al. (2020), table 2.1; the warm-up is 375M tokens."""
    rates = [TrainConfig(**PRESETS[name]) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")]
    assert [c.max_lr for c in rates] == [6e-4, 3e-4, 2.5e-4, 2e-4]
    assert all(c.min_lr == pytest.approx(c.max_lr / 10) and c.warmup_steps == 375_000_000 // 2 ** 19 for c in rates)


# ---- one step

B, T = 12, TINY["block_size"]


def batch(step=0, A=1):
    """The same 12 rows cut into A micro-batches: inputs and targets (A, 12/A, T)."""
    ids = random_ids(B, T + 1, seed=100 + step)
    return ids[:, :-1].reshape(A, B // A, T), ids[:, 1:].reshape(A, B // A, T)


def steps_by_hand(model, n, cfg):
    """n steps of the recipe on undivided batches, with torch's plain AdamW -> (loss, norm) of each."""
    adamw = torch.optim.AdamW([
        dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0)],
        betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(n):
        x, y = batch(step)
        adamw.zero_grad()
        loss = F.cross_entropy(model(x[0])[0].flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in adamw.param_groups:
            group["lr"] = get_lr(step, cfg)
        adamw.step()
        yield loss.item(), norm.item()


@pytest.mark.parametrize("A", [1, 12])
def test_six_steps_equal_the_recipe_written_a_second_time(A):
    """Losses, norms and weights; in float64 even twelve micro-batches are one big batch. Three steps are
    clipped and three are not; from the second one on a wrong beta or a late zero_grad would show.

    The loss is added up in float32. Weights would agree to 1e-12 but for the biases of the keys: softmax
    cancels them, their gradient is rounding noise, and AdamW divides it by its eps of 1e-8.
    """
    cfg = tiny_config(max_lr=1e-2, min_lr=1e-3, warmup_steps=2, max_steps=6, grad_clip=1.0)
    model, world = tiny_model().double(), FakeWorld(size=4)
    world.sum = lambda loss: loss + 30.0  # those of three other processes
    other, optimizers = copy.deepcopy(model), configure_optimizers(model, cfg, CPU)
    found = [train_step(model, optimizers, *batch(step, A), get_lr(step, cfg), cfg, world) for step in range(6)]
    losses, norms = zip(*steps_by_hand(other, 6, cfg))
    assert [loss.item() for loss, _ in found] == pytest.approx([(loss + 30) / 4 for loss in losses], abs=2e-6)
    assert [norm.item() for _, norm in found] == pytest.approx(norms, abs=1e-12)
    assert [norm > cfg.grad_clip for norm in norms] == [True] * 3 + [False] * 3
    assert all(gap(p, q) < 1e-10 for p, q in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("clip", [0.5, 0.0, 1000.0])
def test_clipping_shortens_the_gradient_and_keeps_its_direction(clip):
    """0 means no clipping. The norm returned is the one before, also for a loss that was scaled up for float16. Seen in
    a step of plain descent at a rate of 1, whose update is the gradient."""
    model, world = tiny_model().double(), FakeWorld(scaler=torch.amp.GradScaler("cpu", init_scale=2.0 ** 12))
    before = copy.deepcopy(model)
    before(*(t[0] for t in batch()))[1].backward()
    length = math.sqrt(sum(p.grad.square().sum().item() for p in before.parameters()))
    sgd = torch.optim.SGD(model.parameters(), lr=123.0)
    loss, norm = train_step(model, [sgd], *batch(A=3), 1.0, tiny_config(grad_clip=clip), world)
    assert loss.shape == () and not loss.requires_grad
    assert norm.item() == pytest.approx(length, abs=1e-12) and length > 1
    factor = 0.5 / length if clip == 0.5 else 1
    for p, q in zip(model.parameters(), before.parameters()):
        assert torch.allclose(q - p, factor * q.grad, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_sets_the_learning_rate_of_all_groups_and_clears_all_gradients(optimizer):
    model, cfg = tiny_model(), tiny_config(optimizer=optimizer)
    optimizers, before = configure_optimizers(model, cfg, CPU), copy.deepcopy(model)
    train_step(model, optimizers, *batch(A=2), 0.0123, cfg, FakeWorld())
    assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.0123}
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


def test_forward_runs_under_autocast_and_backward_does_not():
    model, world, seen = tiny_model(), FakeWorld(), []
    world.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    model.register_forward_hook(lambda *a: seen.append(("forward", torch.is_autocast_enabled("cpu"))))
    model.transformer.ln_f.bias.register_hook(lambda g: seen.append(("backward", torch.is_autocast_enabled("cpu"))))
    train_step(model, [torch.optim.SGD(model.parameters(), lr=0.1)], *batch(A=2), 0.1, tiny_config(), world)
    assert seen == [("forward", True), ("backward", False)] * 2
