"""The speed ladder: a rung may change how fast a step is, and nothing else."""
import copy
import json
import sys

import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT / "lessons"))
import measure_speed  # noqa: E402

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


def test_attention_written_out_is_attention():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    ours = measure_speed.attention_written_out(q, k, v)
    assert (ours - torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)).abs().max() < 1e-5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_rung_stands_on_those_below_it(device):
    size = next(iter(measure_speed.SIZES[device].values()))
    rungs = dict((rung.name, (rung, why)) for rung, why in measure_speed.ladder_of(torch.device(device), size))
    assert list(rungs)[:9] == ["float32", *measure_speed.CHANGES]
    top = rungs["twice the rows"][0]
    assert top.sdpa and top.padded and top.fused and top.times == 2
    if device == "cuda":
        assert top.chunked and top.tf32 and top.compile and top.dtype == torch.bfloat16 and not any(why for _, why in rungs.values())
    else:
        assert not top.compile and not top.chunked and rungs["TF32"][1]


def test_the_script_prints_and_keeps_a_ladder(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(measure_speed.SIZES, "cpu", {"tiny": TINY})
    monkeypatch.setattr(measure_speed.shutil, "which", lambda name: None)  # nothing is compiled here
    measure_speed.main(["ladder", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "speed_cpu.json").read_text())
    assert {"device", "machine", "torch", "commit", "date", "command"} <= kept.keys()
    rows = {row["rung"]: row for row in kept["ladders"][0]["rows"]}
    assert rows["float32"]["times_faster"] == 1 and rows["torch.compile"]["note"].startswith("torch.compile needs")
    assert rows["transformers"]["tok_s"] > 0 and abs(rows["transformers"]["loss_difference"]) < 1e-5
    assert "fused AdamW" in capsys.readouterr().out


def test_recipes_are_runs_in_our_flags():
    for name, tokenizer, flags in measure_speed.RECIPES:
        preset = [] if flags is measure_speed.NANOGPT else ["--preset=laptop"]
        cfg, _ = measure_speed.train_gpt2.parse_config("train", [*preset, *flags, *measure_speed.QUIET])
        assert cfg.n_embd % cfg.n_head == 0 and cfg.total_batch_size % cfg.block_size == 0, name
        assert cfg.optimizer == ("adamw" if "AdamW at" in name or "nanoGPT" in name else "muon"), name
        assert tokenizer == f"bpe:{cfg.vocab_size}" or "--preset laptop" not in name


def test_the_table_of_rows_is_for_gpus():
    assert "rows --device cuda" in measure_speed.bench_rows("cpu")["note"]


@pytest.mark.slow
def test_two_processes_are_measured_and_are_one():
    result = measure_speed.bench_processes("cpu", rounds=1, steps=4)
    assert set(result["tok_s"]) == {"one process", "2 under torchrun"} and min(result["tok_s"].values()) > 0
    assert result["largest_relative_difference_of_losses"] < 1e-5
