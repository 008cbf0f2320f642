"""What a user does, from the first command to an exported folder: train, eval, sample, export, and the README's lines."""
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import fineweb
import train_gpt2
from conftest import ROOT
from train_gpt2 import GPT, TrainConfig, main

SMALL = ("--preset laptop --vocab_size 300 --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --total_batch_size 512 --max_lr 1e-2 "
         "--max_steps 12 --warmup_steps 2 --val_every 6 --val_tokens 2048 --sample_every 12 --checkpoint_every 6").split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which the laptop preset has been run, with a smaller model: (folder, what it printed, what it returned)."""
    folder = tmp_path_factory.mktemp("laptop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        values = main(SMALL)
    return folder, "\n".join(printed), values


def in_folder(run, monkeypatch, *words):
    monkeypatch.chdir(run[0])
    return main(list(words))


def test_the_laptop_run_makes_its_data_and_learns(run):
    folder, printed, values = run
    meta = json.loads((folder / "data/builtin/meta.json").read_text())
    assert meta["tokenizer"] == "bpe:300" and meta["vocab_size"] == 300
    assert sorted(values["val"]) == [0, 6, 12]                        # before the first step and after the last
    assert abs(values["val"][0] - math.log(300)) < 0.1 and values["val"][12] < values["val"][0] - 0.5
    assert sorted(values["train"]) == list(range(12))
    assert printed.count("sample |") >= 4                             # two at step 0, two after the last
    assert re.search(r"step +3 \| loss \d\.\d{6} \| lr \d.* \| norm \d.* \| [\d.]+ ms \| [\d,]+ tok/s \| ETA 0:00:0\d", printed)
    assert "python train_gpt2.py sample --init log" in printed        # what to try next


def test_the_log_and_the_configuration(run):
    folder, _, values = run
    lines = (folder / "log/log.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\d+ (train|val|lr|norm|tok/s) \S+", line) for line in lines)
    assert {line.split()[1] for line in lines} == {"train", "val", "lr", "norm", "tok/s"}
    read = {(int(step), stream): float(value) for step, stream, value in map(str.split, lines)}
    assert read[12, "val"] == pytest.approx(values["val"][12], rel=1e-7)
    cfg = json.loads((folder / "log/config.json").read_text())
    assert cfg.keys() == {f for f in TrainConfig.__dataclass_fields__} and cfg["n_embd"] == 32


def test_bits_per_byte_by_hand(run):
    """Nats per id, times ids per byte of the val text, over ln 2."""
    folder, printed, values = run
    text = (shard for shard in json.loads((folder / "data/builtin/meta.json").read_text())["shards"] if shard["split"] == "val")
    shard = next(text)
    ids = np.load(folder / "data/builtin" / shard["file"])
    encoding = fineweb.load_tokenizer(str(folder / "data/builtin"))
    documents = np.split(ids, np.flatnonzero(ids == encoding.eot_token))
    n_bytes = sum(len(encoding.decode(document[1:].tolist()).encode()) for document in documents if len(document))
    expected = values["val"][12] / math.log(2) * len(ids) / n_bytes
    told = float(re.findall(r"step +12 \| val loss [\d.]+, ([\d.]+) bits per byte", printed)[0])
    assert told == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_is_data(run):
    folder, _, _ = run
    file = max((folder / "log").glob("ckpt_*.pt"))
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["step"] == 12 and checkpoint["config"]["n_embd"] == 32
    names = set(GPT(train_gpt2.model_config(checkpoint["config"])).state_dict())
    assert checkpoint["model"].keys() == names                        # and so no _orig_mod. and no module.


def test_eval_gives_the_loss_that_training_gave(run, monkeypatch):
    values = in_folder(run, monkeypatch, "eval", "--init", "log")
    assert values["val"] == pytest.approx(run[2]["val"][12], abs=1e-6) and values["tokens"] == 2048


def test_sample_continues_the_prompt_and_is_repeatable(run, monkeypatch, capsys):
    words = ["sample", "--init", "log", "def f", "--max_new_tokens", "12", "--num_samples", "2"]
    first = in_folder(run, monkeypatch, *words)
    assert len(first) == 2 and all(text.startswith("def f") for text in first)
    assert in_folder(run, monkeypatch, *words) == first
    assert in_folder(run, monkeypatch, *words, "--seed", "2") != first
    cold = in_folder(run, monkeypatch, *words, "--temperature", "0")
    assert cold[0] == cold[1]
    assert first[0] in capsys.readouterr().out
    assert in_folder(run, monkeypatch, "sample", "--init", "log", "", "--max_new_tokens", "3")  # an empty prompt: a new document


def test_a_checkpoint_file_serves_as_well_as_its_folder(run, monkeypatch):
    file = str(max((run[0] / "log").glob("ckpt_*.pt")))
    words = ["--max_new_tokens", "8", "--temperature", "0"]
    assert in_folder(run, monkeypatch, "sample", "--init", file, "def f", *words) == in_folder(
        run, monkeypatch, "sample", "--init", "log", "def f", *words)


def test_transformers_reads_the_export(run, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    folder = run[0]
    in_folder(run, monkeypatch, "export", "--init", "log", "--out", "exported")
    model, _ = train_gpt2.load_model(str(folder / "log"))
    theirs = AutoModelForCausalLM.from_pretrained(folder / "exported")
    ids = AutoTokenizer.from_pretrained(folder / "exported")("Return the", return_tensors="pt").input_ids
    assert ids.tolist()[0] == fineweb.load_tokenizer(str(folder / "data/builtin")).encode_ordinary("Return the")
    torch.testing.assert_close(theirs(ids).logits, model(ids)[0][..., :300], atol=1e-5, rtol=0)
    text = pipeline("text-generation", model=str(folder / "exported"))("Return the", max_new_tokens=5, do_sample=False)
    ours = in_folder(run, monkeypatch, "sample", "--init", "exported", "Return the", "--max_new_tokens", "5", "--temperature", "0")
    assert text[0]["generated_text"] == ours[0]                       # and we read our own export


def test_the_export_has_a_model_card(run, monkeypatch):
    """Nothing about this machine in it, and never over somebody's own text."""
    import yaml
    folder = run[0]
    in_folder(run, monkeypatch, "export", "--init", "log", "--out", "card")
    _, head, body = (folder / "card/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == dict(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"])
    assert "2 layers and 32 channels" in body and "Exported from log." in body and str(folder) not in body
    (folder / "card/README.md").write_text("# mine\n")
    in_folder(run, monkeypatch, "export", "--init", "log", "--out", "card")
    assert (folder / "card/README.md").read_text() == "# mine\n"


def test_a_checkpoint_that_was_copied_elsewhere_samples_the_same(run, monkeypatch, tmp_path):
    """It carries its tokenizer; and it stops where the text ends."""
    file = max((run[0] / "log").glob("ckpt_*.pt"))
    (tmp_path / "copy.pt").write_bytes(file.read_bytes())
    words = ["def f", "--max_new_tokens", "8", "--temperature", "0"]
    want = in_folder(run, monkeypatch, "sample", "--init", "log", *words)
    assert in_folder(run, monkeypatch, "sample", "--init", str(tmp_path / "copy.pt"), *words) == want
    model, tokenizer = train_gpt2.load_model(str(tmp_path / "copy.pt"))
    assert (tokenizer.n_vocab, model.n_vocab, model.eot, model.config.vocab_size) == (300, 300, tokenizer.eot_token, 300)


def test_shards_of_another_tokenizer_are_refused(run, monkeypatch):
    """In eval and in fine-tuning, though all ids fit: bytes, and a bpe:300 that was trained on another text."""
    monkeypatch.chdir(run[0])
    (run[0] / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    fineweb.main(["--source", "fox.txt", "--tokenizer", "bytes", "--out", "bytes"])
    (run[0] / "words.txt").write_text(" ".join(f"zx{n * n}qy{n}" for n in range(3000)))
    fineweb.main(["--source", "words.txt", "--tokenizer", "bpe:300", "--out", "words"])
    for data in ("bytes", "words"):
        for words in (["eval", "--init", "log"], ["--init", "log", "--log_dir", "tuned", "--total_batch_size", "512"]):
            with pytest.raises(train_gpt2.UserError, match=f"{data} was made with another tokenizer"):
                main([*words, "--data_dir", data])
    assert not (run[0] / "tuned").exists()


def test_a_run_may_start_from_a_checkpoint_or_an_export(run, monkeypatch):
    last = run[2]["val"][12]
    in_folder(run, monkeypatch, "export", "--init", "log", "--out", "exported2")
    for source in ("log", "exported2"):
        values = in_folder(run, monkeypatch, "--init", source, "--data_dir", "data/builtin", "--log_dir", f"from_{source}", "--max_steps", "2",
                           "--total_batch_size", "512", "--val_tokens", "2048", "--sample_every", "0", "--max_lr", "1e-3")
        assert values["val"][0] == pytest.approx(last, abs=1e-5)
    values = in_folder(run, monkeypatch, "--init", "log", "--data_dir", "data/builtin", "--log_dir", "shorter", "--max_steps", "1",
                       "--block_size", "16", "--total_batch_size", "512", "--val_tokens", "2048", "--sample_every", "0")
    assert abs(values["val"][0] - last) < 1                           # half the context is a cut of wpe, not a new model


def test_shards_without_notes_are_taken_for_gpt2s(tmp_path, monkeypatch):
    """The shards that build-nanogpt makes have no meta.json beside them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "edu").mkdir()
    for split, index in (("val", 0), ("train", 1)):
        np.save(f"edu/edufineweb_{split}_{index:06d}.npy", rng.integers(0, 50257, 3000).astype(np.uint16))
    words = "--data_dir edu --n_layer 1 --n_head 1 --n_embd 8 --block_size 64 --total_batch_size 512 --max_steps 1 --sample_every 0"
    values = main(words.split())
    assert abs(values["val"][0] - math.log(50304)) < 0.05


def test_the_muon_run_trains(run, monkeypatch):
    values = in_folder(run, monkeypatch, *SMALL, "--optimizer", "muon", "--log_dir", "muon", "--sample_every", "0")
    assert values["val"][12] < values["val"][0] - 0.5


def test_training_goes_on_without_hellaswag_and_says_so(run, monkeypatch, capsys):
    def find_data(*_):
        raise train_gpt2.UserError("put the file there")

    monkeypatch.setattr("hellaswag.find_data", find_data)
    values = in_folder(run, monkeypatch, *SMALL, "--hellaswag_every", "12", "--log_dir", "hella")
    assert "hella" not in values and len(values["train"]) == 12
    assert capsys.readouterr().out.count("no HellaSwag score: put the file there") == 1


def test_training_logs_hellaswag(run, monkeypatch):
    questions = (ROOT / "tests" / "hellaswag_fixture.jsonl").read_text()
    (run[0] / "questions").mkdir(exist_ok=True)
    (run[0] / "questions" / "hellaswag_val.jsonl").write_text(questions)
    monkeypatch.setenv("HELLASWAG_DIR", str(run[0] / "questions"))
    values = in_folder(run, monkeypatch, *SMALL, "--hellaswag_every", "6", "--log_dir", "hella2", "--block_size", "128")
    assert sorted(values["hella"]) == [0, 6, 12] and "12 hella " in (run[0] / "hella2/log.txt").read_text()


def test_the_log_has_the_mean_per_token_of_the_three_scores(run, monkeypatch):
    score = dict(acc=0.1, acc_norm=0.2, acc_norm_chars=0.3, acc_stderr=0.4, acc_norm_stderr=0.5, acc_norm_chars_stderr=0.6)
    monkeypatch.setattr("hellaswag.evaluate", lambda *_, **__: score)
    monkeypatch.setattr("hellaswag.find_data", lambda *_: None)
    monkeypatch.setattr("hellaswag.iterate_examples", lambda *_: iter(["a question"]))
    values = in_folder(run, monkeypatch, *SMALL, "--hellaswag_every", "12", "--log_dir", "hella3")
    assert values["hella"] == {0: 0.2, 12: 0.2}


# ---- whole runs, as the README and a user have them

@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    """--preset laptop, to its end: the val loss falls below 60 % of what it began with."""
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt2.py"), "--preset", "laptop"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(x) for x in re.findall(r"val loss ([\d.]+), [\d.]+ bits per byte", done.stdout)]
    assert losses[-1] < 0.6 * losses[0]
    assert "sample |" in done.stdout and "Try next" in done.stdout
    assert list((tmp_path / "log").glob("ckpt_*.pt")) and (tmp_path / "log/log.txt").exists()


@pytest.mark.slow
def test_the_full_model_on_web_text(tmp_path, real_data, gpt2_tokenizer):
    """124M on the first million characters of FineWeb-Edu: trains, saves, samples, exports."""
    from transformers import pipeline

    def program(name, *words):
        done = subprocess.run([sys.executable, str(ROOT / name), *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    program("fineweb.py", "--source", *map(str, sorted((real_data / "fineweb-edu").glob("*.txt"))), "--tokenizer", "gpt2", "--out", "edu")
    out = program("train_gpt2.py", "--data_dir", "edu", *"--max_steps 3 --total_batch_size 4096 --micro_batch_size 2 --val_tokens 8192".split())
    assert "124,475,904 parameters" in out
    first = float(re.search(r"step +0 \| loss ([\d.]+)", out)[1])
    assert 10.90 < first < 11.05
    assert out.count("val loss") == 2
    assert "Hello, I'm a language model," in program("train_gpt2.py", "sample", "--init", "log", "--max_new_tokens", "4")
    program("train_gpt2.py", "export", "--init", "log", "--out", "exported")
    text = pipeline("text-generation", model=str(tmp_path / "exported"))("Hello, I'm", max_new_tokens=3, do_sample=False)
    assert text[0]["generated_text"].startswith("Hello, I'm")
