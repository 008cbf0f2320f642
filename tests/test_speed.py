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
        first = stepper.first_loss()
        loss = stepper.step()
        weights = stepper.model.state_dict()
        return first, loss, weights["transformer.wte.weight"][:50], weights["transformer.h.1.ln_1.bias"]

    first, loss, wte, bias = after_a_step(rung)
    want_first, want_loss, want_wte, want_bias = after_a_step(measure_speed.Rung())
    tolerance = measure_speed.TOLERANCE.get(rung.name, 1e-5)
    if rung.padded:  # 14 ids of 64 that nobody says, not 47 of 50304
        want_first, want_loss = want_first + 0.247, want_loss + 0.247  # ln(64 / 50)
        tolerance = 0.02
    assert abs(first - want_first) < tolerance and abs(loss - want_loss) < tolerance
    if not rung.padded and rung.dtype == torch.float32:
        assert (wte - want_wte).abs().max() < 1e-4 and (bias - want_bias).abs().max() < 1e-4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_rung_stands_on_those_below_it(device, monkeypatch):
    monkeypatch.setattr(train_gpt2, "pick_dtype", lambda name, device: torch.bfloat16)
    size = next(iter(measure_speed.SIZES[device].values()))
    rungs = dict((rung.name, (rung, why)) for rung, why in measure_speed.ladder_of(torch.device(device), size))
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
    kept = json.loads((tmp_path / "speed_cpu.json").read_text())
    assert {"device", "machine", "torch", "commit", "date", "command"} <= kept.keys()
    rows = {row["rung"]: row for row in kept["ladders"][0]["rows"]}
    assert rows["float32"]["times_faster"] == 1 and "g++" in rows["torch.compile"]["note"]
    assert rows["transformers, float32"]["tok_s"] > 0 and rows["ours, by default"]["tok_s"] > 0
    assert abs(rows["transformers, float32"]["loss_difference"]) < 1e-5
    out = capsys.readouterr().out
    assert "fused AdamW" in out and "times than the best of the others" in out and kept["machine"] in out
    assert (tmp_path / "ladder.png").read_bytes()[16:20] > (700).to_bytes(4, "big")  # its width


def test_recipes_are_runs_in_our_flags():
    for name, tokenizer, flags in measure_speed.RECIPES:
        preset = [] if flags is measure_speed.NANOGPT else ["--preset=laptop"]
        cfg, _ = train_gpt2.parse_config("train", [*preset, *flags, *measure_speed.QUIET])
        assert cfg.n_embd % cfg.n_head == 0 and cfg.total_batch_size % cfg.block_size == 0, name
        assert cfg.optimizer == ("adamw" if "AdamW at" in name or "nanoGPT" in name else "muon"), name


def test_all_graphs_of_a_process_stay_compiled():
    """Five models with two row counts each are ten graphs of one function: more than PyTorch's limit of 8."""
    graphs = []
    torch._dynamo.reset()
    for width in (8, 16, 24, 32, 40):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(8, 16, 1, 1, width))
        fast = measure_speed.compiled(model, backend=lambda graph, inputs: graphs.append(1) or graph.forward)
        for rows in (1, 2):
            fast(torch.zeros(rows, 8, dtype=torch.long))
    assert len(graphs) == 10
    torch._dynamo.reset()


# ---- memory, foretold

SMALL = train_gpt2.GPTConfig(block_size=64, vocab_size=256, n_layer=3, n_head=2, n_embd=32)


def test_foretold_memory_is_what_the_whole_model_would_say():
    """The straight lines through two layers and two rows, held against a trace of the real size; compiled is less."""
    n, gb = train_gpt2.GPT(SMALL).num_params(), {}
    for compile, each_logit in ((True, 2), (False, 8)):
        gb[compile] = measure_speed.foretell(SMALL, (1, 5), compile)
        kept = measure_speed.kept_by_forward(SMALL, 5, compile)
        assert gb[compile][5] * 1e9 == pytest.approx(16 * n + kept + each_logit * 5 * 64 * 256, rel=0.01)
        assert 16 * n < gb[compile][1] * 1e9 < gb[compile][5] * 1e9
    assert gb[True][5] < gb[False][5]


def test_what_an_eager_forward_keeps_by_a_count_of_hand():
    """Per token and layer, for the backward pass, in bytes: see the sum."""
    C, V, T = 32, 256, 64
    one, two = (measure_speed.kept_by_forward(measure_speed.replace(SMALL, n_layer=n), 4, False) for n in (1, 2))
    layer = (2 * (4 * C + 2 * 4 + 2 * C)  # each LayerNorm: float32 input, mean, 1/std; bfloat16 copy of its output
             + 2 * 3 * C + 4 * SMALL.n_head + 2 * C  # q, k and v; attention's logsumexp and its output
             + 2 * 4 * C + 2 * 4 * C)  # GELU's input and output
    weights = 2 * 12 * C * C  # bfloat16 copies of the matrices
    assert two - one == pytest.approx(4 * T * layer + weights, rel=0.05)
    assert one - (two - one) >= 4 * T * V * 4  # log p of every id, float32
