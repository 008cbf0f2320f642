"""The speed ladder: a rung may change how fast a step is, and nothing else."""
import copy
import json
import sys

import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT / "lessons"))
import measure_speed  # noqa: E402
import train_gpt2  # noqa: E402

CPU = torch.device("cpu")
TINY = (16, 3, 2, 4, 32, 50, 64)  # T, rows, layers, heads, channels, vocabulary without and with padding
ALL = [measure_speed.Rung(), *(measure_speed.Rung(name, **change) for name, change in measure_speed.CHANGES.items()),
       measure_speed.Rung("transformers", theirs=True, sdpa=True)]


@pytest.fixture(scope="module")
def models():
    return measure_speed.same_models(TINY, CPU)


@pytest.mark.parametrize("rung", ALL, ids=lambda rung: rung.name)
def test_a_rung_leaves_loss_and_update_within_its_tolerance(models, rung):
    """One step from the same weights and rows, compared with the first rung's; padding rows aside."""
    def after_a_step(rung):
        mine = {key: copy.deepcopy(model) for key, model in models.items() if isinstance(key[0], bool)}
        stepper = measure_speed.Stepper(rung, TINY, mine, CPU)
        if rung.compile:  # what a compiler is asked to keep; compiling itself takes a minute and a C++ compiler
            stepper.compute = torch.compile(stepper.loss, backend="aot_eager", dynamic=False)
        losses = torch.tensor([stepper.first_loss(), stepper.step()])
        weights = stepper.model.state_dict()
        return losses, weights["transformer.wte.weight"][:50], weights["transformer.h.1.ln_1.bias"]

    losses, *moved = after_a_step(rung)
    expected, *want_moved = after_a_step(measure_speed.Rung())
    tolerance = measure_speed.TOLERANCE.get(rung.name, 1e-5)
    if rung.padded:  # by 14 ids of 64 that nobody says, not by 47 of 50304: ln(64 / 50) more
        expected, tolerance = expected + 0.247, 0.02
    torch.testing.assert_close(losses, expected, atol=tolerance, rtol=0)
    assert not torch.equal(moved[0], models[False, False].transformer.wte.weight[:50])
    if not rung.padded and rung.dtype == torch.float32:
        torch.testing.assert_close(moved, want_moved, atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_rung_stands_on_those_below_it(device, monkeypatch):
    monkeypatch.setattr(train_gpt2, "pick_dtype", lambda name, device: torch.bfloat16)
    size = next(iter(measure_speed.SIZES[device].values()))
    rungs = {rung.name: (rung, why) for rung, why in measure_speed.ladder_of(torch.device(device), size)}
    assert list(rungs)[:10] == ["float32", *measure_speed.CHANGES]
    top = rungs["twice the rows"][0]
    assert top.sdpa and top.padded and top.fused and top.times == 2
    if device == "cuda":
        assert top.chunked and top.tf32 and top.compile and top.dtype == torch.bfloat16
        assert {name for name, (_, why) in rungs.items() if why} == {"memory kept"}
    else:
        assert not top.compile and not top.chunked and rungs["TF32"][1]


def test_the_script_prints_and_keeps_a_ladder(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(measure_speed.SIZES, "cpu", {"tiny": TINY})
    monkeypatch.setattr(measure_speed.shutil, "which", lambda name: None)  # nothing is compiled here
    measure_speed.main(["ladder", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
    kept, out = json.loads((tmp_path / "speed_cpu.json").read_text()), capsys.readouterr().out
    assert {"device", "machine", "torch", "commit", "date", "command"} <= kept.keys()
    rows = {row["rung"]: row for row in kept["ladders"][0]["rows"]}
    assert rows["float32"]["times_faster"] == 1 and "g++" in rows["torch.compile"]["note"]
    assert rows["transformers, float32"]["tok_s"] > 0 and rows["ours, by default"]["tok_s"] > 0
    assert abs(rows["transformers, float32"]["loss_difference"]) < 1e-5
    assert "fused AdamW" in out and "times than the best of the others" in out and kept["machine"] in out
    assert (tmp_path / "ladder.png").read_bytes()[16:20] > (700).to_bytes(4, "big")  # its width


def test_recipes_are_runs_in_our_flags():
    for name, tokenizer, flags in measure_speed.RECIPES:
        preset = [] if flags is measure_speed.NANOGPT else ["--preset=laptop"]
        cfg, _ = train_gpt2.parse_config("train", [*preset, *flags, *measure_speed.QUIET])
        assert cfg.optimizer == ("adamw" if "AdamW at" in name or "nanoGPT" in name else "muon"), name


def test_all_graphs_of_a_process_stay_compiled():
    """Nine models are nine graphs of one function: more than PyTorch's limit of 8."""
    graphs = []
    for width in range(8, 80, 8):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(8, 16, 1, 1, width))
        fast = measure_speed.compiled(model, backend=lambda graph, inputs: graphs.append(1) or graph.forward)
        fast(torch.zeros(1, 8, dtype=torch.long))
    torch._dynamo.reset()
    assert len(graphs) == 9


def test_foretold_memory_is_that_of_the_whole_model_and_of_a_count_by_hand():
    """The straight lines through two layers and two rows, held against a trace of the real size."""
    shape, bytes_foretold = train_gpt2.GPTConfig(block_size=64, vocab_size=256, n_layer=3, n_head=2, n_embd=32), {}
    C, V, T, B, n = 32, 256, 64, 5, train_gpt2.GPT(shape).num_params()
    for compile, each_logit in ((True, 2), (False, 8)):
        kept = measure_speed.kept_by_forward(shape, B, compile)
        one, bytes_foretold[compile] = (gb * 1e9 for gb in measure_speed.foretell(shape, (1, B), compile).values())
        assert bytes_foretold[compile] == pytest.approx(16 * n + kept + each_logit * B * T * V, rel=0.01)
        assert 16 * n < one < bytes_foretold[compile]
    assert bytes_foretold[True] < bytes_foretold[False]
    # per token and layer, for the backward pass of an eager forward
    layer = (2 * (4 * C + 2 * 4 + 2 * C)  # each LayerNorm: float32 input, mean, 1/std; bfloat16 copy of its output
             + 2 * 3 * C + 4 * 2 + 2 * C  # q, k and v; attention's logsumexp, of two heads, and its output
             + 2 * 4 * C + 2 * 4 * C)     # GELU's input and output
    weights = 2 * 12 * C * C  # bfloat16 copies of the matrices
    one, two = (measure_speed.kept_by_forward(measure_speed.replace(shape, n_layer=n), B, False) for n in (1, 2))
    assert two - one == pytest.approx(B * T * layer + weights, rel=0.05)
    assert one - (two - one) >= B * T * V * 4  # log p of every id, float32
