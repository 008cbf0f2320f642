"""What a user does, from the first command to an exported folder: train, eval, sample, export."""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fineweb
import train_gpt2
from conftest import ROOT
from train_gpt2 import UserError, main

SMALL = ("--preset laptop --vocab_size 300 --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --total_batch_size 512 "
         "--max_lr 1e-2 --max_steps 12 --warmup_steps 2 --val_every 6 --val_tokens 2048 --sample_every 12 "
         "--checkpoint_every 6").split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the laptop preset has been run with a smaller model -> (folder, what it printed, its log)."""
    folder = tmp_path_factory.mktemp("laptop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        values = main(SMALL)
    return folder, "\n".join(printed), values


@pytest.fixture
def run(made, monkeypatch):
    monkeypatch.chdir(made[0])
    return made


def test_the_laptop_run_makes_its_data_learns_and_can_be_resumed_with_the_same_words(run):
    folder, printed, values = run
    meta = json.loads((folder / "data/builtin/meta.json").read_text())
    assert meta["tokenizer"] == "bpe:300" and meta["vocab_size"] == 300
    assert sorted(values["val"]) == [0, 6, 12]                        # before the first step and after the last
    assert abs(values["val"][0] - math.log(300)) < 0.1 and values["val"][12] < values["val"][0] - 0.5
    assert sorted(values["train"]) == list(range(12))
    assert printed.count("sample |") >= 4                             # two at step 0, two after the last
    assert re.search(r"step +3 \| loss \d\.\d{6} \| lr \d.* \| norm \d.* \| [\d.]+ ms \| [\d,]+ tok/s \| ETA 0:00:0\d",
                     printed)
    assert "python train_gpt2.py sample --init log" in printed        # what to try next
    shutil.copytree("log", "again")
    Path("again/ckpt_00000012.pt").unlink()
    again = main([*SMALL, "--log_dir", "again", "--resume"])
    assert all(again[stream] == pytest.approx(values[stream], rel=1e-7) for stream in ("train", "val", "norm"))


def test_the_log_has_every_number_to_eight_digits(run):
    read = {}
    for step, stream, value in map(str.split, Path("log/log.txt").read_text().splitlines()):
        read[int(step), stream] = float(value)
    want = {(step, stream): value for stream, steps in run[2].items() for step, value in steps.items()}
    assert read == pytest.approx(want, rel=1e-7)
    assert {stream for _, stream in read} == {"train", "val", "lr", "norm", "tok/s"}


def test_bits_per_byte_by_hand(run):
    """Nats per id, times ids per byte of the val text, over ln 2."""
    _, printed, values = run
    shards = json.loads(Path("data/builtin/meta.json").read_text())["shards"]
    ids = np.load(Path("data/builtin", next(shard["file"] for shard in shards if shard["split"] == "val")))
    encoding = fineweb.load_tokenizer("data/builtin")
    documents = np.split(ids, np.flatnonzero(ids == encoding.eot_token))
    n_bytes = sum(len(encoding.decode(document[1:].tolist()).encode()) for document in documents if len(document))
    expected = values["val"][12] / math.log(2) * len(ids) / n_bytes
    told = float(re.search(r"step +12 \| val loss [\d.]+, ([\d.]+) bits per byte", printed)[1])
    assert told == pytest.approx(expected, abs=1e-4)


def test_eval_gives_the_loss_that_training_gave(run):
    values = main(["eval", "--init", "log"])
    assert values["val"] == pytest.approx(run[2]["val"][12], abs=1e-6) and values["tokens"] == 2048


def test_sample_continues_the_prompt_and_is_repeatable(run, capsys):
    words = ["sample", "--init", "log", "def f", "--max_new_tokens", "12", "--num_samples", "2"]
    first = main(words)
    assert len(first) == 2 and all(text.startswith("def f") for text in first)
    assert first[0] in capsys.readouterr().out
    assert main(words) == first != main([*words, "--seed", "2"])
    cold = main([*words, "--temperature", "0"])
    assert cold[0] == cold[1] and main([*words, "--top_k", "1"]) == cold
    new = main(["sample", "--init", "log", "", "--max_new_tokens", "3"])  # an empty prompt: a new document
    assert new and not new[0].startswith("Return the")


def test_a_checkpoint_that_was_copied_elsewhere_samples_the_same(run, tmp_path):
    """It carries its tokenizer; and it stops where the text ends."""
    copy = str(shutil.copy("log/ckpt_00000012.pt", tmp_path / "copy.pt"))
    words = ["def f", "--max_new_tokens", "8", "--temperature", "0"]
    assert main(["sample", "--init", copy, *words]) == main(["sample", "--init", "log", *words])
    model, tokenizer = train_gpt2.load_model(copy)
    assert tokenizer.n_vocab == model.n_vocab == model.config.vocab_size == 300 and model.eot == tokenizer.eot_token


def test_transformers_reads_the_export(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    main(["export", "--init", "log", "--out", "exported"])
    model, _ = train_gpt2.load_model("log")
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    ids = AutoTokenizer.from_pretrained("exported")("Return the", return_tensors="pt").input_ids
    assert ids.tolist()[0] == fineweb.load_tokenizer("data/builtin").encode_ordinary("Return the")
    torch.testing.assert_close(theirs(ids).logits, model(ids)[0][..., :300], atol=1e-5, rtol=0)
    text = pipeline("text-generation", model="exported")("Return the", max_new_tokens=5, do_sample=False)
    ours = main(["sample", "--init", "exported", "Return the", "--max_new_tokens", "5", "--temperature", "0"])
    assert text[0]["generated_text"] == ours[0]                       # and we read our own export


def test_the_export_has_a_model_card(run):
    """Nothing about this machine in it, and never over somebody's own text."""
    main(["export", "--init", "log", "--out", "card"])
    card = Path("card/README.md")
    _, head, body = card.read_text().split("---\n", 2)
    assert yaml.safe_load(head) == dict(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"])
    assert "2 layers and 32 channels" in body and "Exported from log." in body and str(run[0]) not in body
    card.write_text("# mine\n")
    main(["export", "--init", "log", "--out", "card"])
    assert card.read_text() == "# mine\n"


def test_shards_without_notes_are_taken_for_gpt2s(tmp_path, monkeypatch):
    """The shards that build-nanogpt makes have no meta.json beside them. Where GPT-2's vocabulary is not at hand, a
    model is trained, measured and exported all the same."""
    asked = []

    def not_here(source):
        asked.append(source)
        raise UserError("it is not here")

    monkeypatch.setattr(train_gpt2, "load_tokenizer", not_here)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("edu").mkdir()
    for split, index in (("val", 0), ("train", 1)):
        np.save(f"edu/edufineweb_{split}_{index:06d}.npy", rng.integers(0, 50257, 1500).astype(np.uint16))
    values = main("--data_dir edu --n_layer 1 --n_head 1 --n_embd 8 --block_size 64 --total_batch_size 256 "
                  "--max_steps 1 --sample_every 0".split())
    assert abs(values["val"][0] - math.log(50304)) < 0.05
    assert main(["eval", "--init", "log"])["val"] == pytest.approx(values["val"][1], rel=1e-6)
    main(["export", "--init", "log", "--out", "hf"])
    config = json.loads(Path("hf/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (50257, 50256)
    with pytest.raises(UserError, match="it is not here"):
        main(["sample", "--init", "hf"])
    assert asked == ["gpt2"] * 5


SCORE = dict(acc=0.1, acc_norm=0.2, acc_norm_chars=0.3, acc_stderr=0.4, acc_norm_stderr=0.5, acc_norm_chars_stderr=0.6)


def test_training_logs_hellaswags_mean_per_token(run, monkeypatch):
    """Real questions are scored when due and at the end; and it is the second of three scores that is logged."""
    Path("questions").mkdir()
    shutil.copy(ROOT / "tests" / "hellaswag_fixture.jsonl", "questions/hellaswag_val.jsonl")
    monkeypatch.setenv("HELLASWAG_DIR", "questions")
    values = main([*SMALL, "--hellaswag_every", "6", "--log_dir", "hella", "--block_size", "128"])
    assert sorted(values["hella"]) == [0, 6, 12] and "\n12 hella " in Path("hella/log.txt").read_text()
    monkeypatch.setattr("hellaswag.evaluate", lambda *_, dtype, **__: SCORE if dtype == torch.bfloat16 else {})
    words = [*SMALL, "--dtype", "bfloat16", "--log_dir", "hella", "--hellaswag_every"]
    scored = main([*words, "12"])
    assert scored["hella"] == {0: 0.2, 12: 0.2}
    torch.manual_seed(5)  # what was drawn before does not matter
    short = main([*words, "13"])  # a run of fewer steps
    assert "hella" not in short and short["val"][0] == scored["val"][0]
    assert main(["eval", "--init", "hella"])["acc_norm"] == 0.2


def test_training_goes_on_without_hellaswag_and_says_so(run, monkeypatch, capsys):
    def find_data(*_):
        raise UserError("put the file there")

    monkeypatch.setattr("hellaswag.find_data", find_data)
    values = main([*SMALL, "--hellaswag_every", "12", "--log_dir", "none"])
    assert "hella" not in values and len(values["train"]) == 12
    assert capsys.readouterr().out.count("no HellaSwag score: put the file there") == 1


# ---- whole runs, as the README and a user have them

def program(folder, name, *words):
    done = subprocess.run([sys.executable, str(ROOT / name), *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    """--preset laptop, to its end: the val loss falls below 60 % of what it began with."""
    out = program(tmp_path, "train_gpt2.py", "--preset", "laptop")
    losses = [float(x) for x in re.findall(r"val loss ([\d.]+), [\d.]+ bits per byte", out)]
    assert losses[-1] < 0.6 * losses[0]
    assert "sample |" in out and "Try next" in out and list((tmp_path / "log").glob("ckpt_*.pt"))


@pytest.mark.slow
def test_the_full_model_on_web_text(tmp_path, real_data, gpt2_tokenizer):
    """124M on the first million characters of FineWeb-Edu: trains, saves, samples, exports."""
    texts = map(str, sorted((real_data / "fineweb-edu").glob("*.txt")))
    program(tmp_path, "fineweb.py", "--source", *texts, "--tokenizer", "gpt2", "--out", "edu")
    out = program(tmp_path, "train_gpt2.py", "--data_dir", "edu", "--max_steps", "3", "--total_batch_size", "4096",
                  "--micro_batch_size", "2", "--val_tokens", "8192")
    assert "124,475,904 parameters" in out and out.count("val loss") == 2
    assert 10.90 < float(re.search(r"step +0 \| loss ([\d.]+)", out)[1]) < 11.05
    text = program(tmp_path, "train_gpt2.py", "sample", "--init", "log", "--max_new_tokens", "4")
    assert "Hello, I'm a language model," in text
    program(tmp_path, "train_gpt2.py", "export", "--init", "log", "--out", "exported")
    from transformers import pipeline
    pipe = pipeline("text-generation", model=str(tmp_path / "exported"))
    text = pipe("Hello, I'm", max_new_tokens=3, do_sample=False)
    assert text[0]["generated_text"].startswith("Hello, I'm")
