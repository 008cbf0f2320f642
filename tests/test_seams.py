"""What slips between parts that are each well tested: a tiny world of two optimizers, two tokenizers, and models that
come from scratch, from a checkpoint, from a folder."""
import json
import shutil
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import fineweb
import train_gpt2
from helpers import TINY, FakeWorld, random_ids, tiny_config, tiny_model, write_shards
from launch import log_values, saved
from train_gpt2 import GPT, Corpus, DataLoaderLite, GPTConfig, TrainConfig, UserError, main, parse_config

TEXT = "\n\n\n".join(f"Chapter {n}. The {a} fox number {n * n} jumps over {b} lazy dogs, it isn't {n % 7}; so what?"
                     for n, (a, b) in enumerate(zip(["quick", "brown", "old", "sly"] * 60, ["two", "three"] * 120)))
SMALL = ("--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --total_batch_size 64 --micro_batch_size 2 --max_steps 4 "
         "--warmup_steps 1 --max_lr 1e-2 --min_lr 1e-3 --val_every 2 --sample_every 0 --hellaswag_every 0 "
         "--checkpoint_every 2 --device cpu --dtype float32").split()
TUNE = [*SMALL[8:], "--max_lr", "1e-2"]  # without the shape, which comes from --init


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with shards of bytes and of bpe:280, and for each a run ("log_bytes", "log_bpe") and its export."""
    folder = tmp_path_factory.mktemp("seams")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(TEXT)
        for name, tokenizer in (("bytes", "bytes"), ("bpe", "bpe:280")):
            fineweb.main(["--source", "text.txt", "--tokenizer", tokenizer, "--out", name, "--val_fraction", "0.2"])
            main([*SMALL, "--data_dir", name, "--log_dir", f"log_{name}", "--weight_decay", "0.3"])
            main(["export", "--init", f"log_{name}", "--out", f"hf_{name}"])
    return folder


def weights(source):
    return {name: p.detach().clone() for name, p in train_gpt2.load_model(str(source))[0].named_parameters()}


# ---- fine-tuning, end to end

@pytest.mark.parametrize("optimizer, T", [("adamw", 16), ("muon", 8)])
@pytest.mark.parametrize("name, n_vocab", [("bytes", 257), ("bpe", 280)])
@pytest.mark.parametrize("kind", ["log", "hf"])
def test_fine_tuning_begins_with_the_weights_moves_them_all_and_takes_the_shape_alone(
        world, monkeypatch, kind, name, n_vocab, optimizer, T):
    """From a log folder and from an export, in which padding does not travel; a shorter context is a cut of wpe."""
    monkeypatch.chdir(world)
    source, out, wpe = f"{kind}_{name}", f"tuned_{kind}_{name}_{optimizer}", "transformer.wpe.weight"
    before = weights(source)
    assert len(before["transformer.wte.weight"]) == (n_vocab if kind == "hf" else 384)
    words = [*TUNE, "--init", source, "--data_dir", name, "--log_dir", out, "--block_size", str(T), "--optimizer",
             optimizer, "--max_steps", "2", "--sample_every", "2", "--prompt", "longer than eight tokens"]
    values = main(words)
    assert sorted(values["train"]) == [0, 1]
    again = main([*words, "--resume"])["val"]  # from the checkpoint, not from --init
    assert again == pytest.approx(values["val"], rel=1e-6)
    if kind == "log" and T == 16:
        assert values["val"][0] == pytest.approx(log_values(f"log_{name}")["val"][4], rel=1e-5)
    before[wpe], after = before[wpe][:T], weights(out)
    assert (after[wpe] - before[wpe]).abs().max() < 0.02  # two steps at 1e-2 and 1e-3
    for key, p in after.items():
        if key == "transformer.wte.weight":  # every row that the text holds, and by decay the others
            assert (p != before[key]).any(dim=1).float().mean() > 0.9
        else:
            assert not torch.equal(p, before[key]), key
    cfg = json.loads(Path(out, "config.json").read_text())
    assert cfg["weight_decay"] == TrainConfig.weight_decay and cfg["init"] == source and cfg["n_embd"] == 16


def test_what_comes_along_from_a_checkpoint(world, monkeypatch):
    """To a new run the shape alone; to eval, sample and export all settings of the run."""
    monkeypatch.chdir(world)
    begun, _ = parse_config("train", ["--init", "log_bytes"])
    assert (begun.n_embd, begun.vocab_size, begun.weight_decay, begun.data_dir, begun.max_steps) == (
        16, 384, TrainConfig.weight_decay, TrainConfig.data_dir, TrainConfig.max_steps)
    seen, _ = parse_config("eval", ["--init", "log_bytes"])
    assert (seen.weight_decay, seen.data_dir, seen.max_steps) == (0.3, "bytes", 4)
    assert parse_config("eval", ["--log_dir", "log_bytes"])[0] == seen
    assert parse_config("train", ["--init", "hf_bytes"])[0].block_size == 16


# ---- which wins

# from the strongest to the weakest, with the number of layers that each asks for
LAYERS = dict(flag=1, config=5, preset=3, remembered=4, found=2)


def test_which_setting_wins(world, tmp_path, monkeypatch):
    """Flag, configuration file, preset, what a resumed run remembers, the model of --init: each pair once, in either
    order on the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_gpt2.PRESETS, "mine", dict(n_layer=LAYERS["preset"]))
    Path("c.json").write_text(json.dumps(dict(n_layer=LAYERS["config"])))
    Path("log").mkdir()
    Path("log/config.json").write_text(json.dumps({**asdict(TrainConfig()), "n_layer": LAYERS["remembered"]}))
    says = dict(flag=["--n_layer", "1"], config=["--config", "c.json"], preset=["--preset", "mine"],
                remembered=["--resume"], found=["--init", str(world / "log_bytes")])
    for stronger, weaker in combinations(LAYERS, 2):
        for argv in (says[stronger] + says[weaker], says[weaker] + says[stronger]):
            assert parse_config("train", argv)[0].n_layer == LAYERS[stronger], (stronger, weaker)


# ---- models from elsewhere

def test_added_ids_survive_and_padding_is_never_drawn(world, tmp_path, monkeypatch):
    """A folder whose tokenizer has an id added after <|endoftext|>, and whose matrix has rows past both."""
    from transformers import AutoTokenizer, GPT2LMHeadModel
    monkeypatch.chdir(tmp_path)
    model, tokenizer = train_gpt2.load_model(str(world / "hf_bpe"))
    shape = {**asdict(model.config), "vocab_size": 290}
    padded = GPT(GPTConfig(**shape))
    with torch.no_grad():
        padded.transformer.wte.weight[:280] = model.transformer.wte.weight
        padded.transformer.wte.weight[281:] = 50 * model.transformer.wte.weight.mean(0)  # loud, and no tokenizer's
    padded.save_pretrained("padded")
    fineweb.save_tokenizer(tokenizer, "padded")
    added = json.loads(Path("padded/tokenizer.json").read_text())
    mark = {**added["added_tokens"][0], "id": 280, "content": "<|pad|>"}
    added["added_tokens"].append(mark)
    Path("padded/tokenizer.json").write_text(json.dumps(added))

    again, theirs = train_gpt2.load_model("padded")
    assert (theirs.n_vocab, theirs.eot_token) == (again.n_vocab, again.eot) == (281, 279)
    assert again.config.vocab_size == 290
    assert again.generate(random_ids(8, 5, n=279), 30, temperature=5.0).max() < 281
    main(["export", "--init", "padded", "--out", "out", "--device", "cpu"])
    config = json.loads(Path("out/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (281, 279, 279)
    assert GPT2LMHeadModel.from_pretrained("out").transformer.wte.weight.shape == (281, 16)
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.convert_tokens_to_ids("<|pad|>") == 280 and tokenizer.eos_token_id == 279


def test_transformers_stops_where_a_padded_model_says(world):
    """The end of text is the tokenizer's, not the last row of the matrix."""
    from transformers import GPT2LMHeadModel
    folder = world / "hf_bytes"
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    assert theirs.config.vocab_size == 257 and theirs.generation_config.eos_token_id == 256
    with torch.no_grad():  # now <|endoftext|> is what it always says next
        theirs.transformer.ln_f.weight.zero_()
        theirs.transformer.ln_f.bias.copy_(theirs.transformer.wte.weight[256])
        theirs.transformer.wte.weight[256] *= 100
    out = theirs.generate(torch.tensor([[65, 66]]), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert out.tolist() == [[65, 66, 256]]


def test_the_mark_of_another_tokenizer_travels_with_a_checkpoint(world, tmp_path):
    """One that has no <|endoftext|>, but another id that ends a text."""
    checkpoint = saved(world / "log_bpe", 4)
    text = checkpoint["data"]["json"].replace("<|endoftext|>", "<|pad|>")
    checkpoint["data"].update(tokenizer="another", eot=5, json=text)
    torch.save(checkpoint, tmp_path / "copy.pt")
    model, tokenizer = train_gpt2.load_model(str(tmp_path / "copy.pt"))
    assert model.eot == tokenizer.eot_token == 5


def test_a_tokenizer_of_more_ids_than_the_model_has_is_refused(world, tmp_path):
    shutil.copytree(world / "hf_bytes", tmp_path / "hf")
    shutil.copy(world / "hf_bpe/tokenizer.json", tmp_path / "hf")
    with pytest.raises(UserError, match="its tokenizer has more ids than its model"):
        train_gpt2.load_model(str(tmp_path / "hf"))


def another_kind(folder):
    return "log_bpe", "bytes"


def another_name(folder):
    """Shards whose tokenizer is not at hand."""
    shutil.copytree("bpe", folder / "data")
    (folder / "data/tokenizer.json").unlink()
    return "log_bytes", str(folder / "data")


def other_words(folder):
    """Shards of a bpe:280 that was trained on another text."""
    (folder / "other.txt").write_text(" ".join(f"zx{n * n}qy{n}" for n in range(3000)))
    fineweb.main(["--source", str(folder / "other.txt"), "--tokenizer", "bpe:280", "--out", str(folder / "data")])
    return "log_bpe", str(folder / "data")


def another_mark(folder):
    """A model whose tokenizer gives the same ids, but ends its texts with another."""
    shutil.copytree("hf_bpe", folder / "model")
    text = (folder / "model/tokenizer.json").read_text()
    (folder / "model/tokenizer.json").write_text(text.replace("<|endoftext|>", "<|pad|>"))
    (folder / "model/tokenizer_config.json").write_text(json.dumps(dict(eos_token="!")))
    return str(folder / "model"), "bpe"


@pytest.mark.parametrize("make", [another_kind, another_name, other_words, another_mark])
def test_shards_of_another_tokenizer_are_refused(world, tmp_path, monkeypatch, make):
    """In eval and in fine-tuning, though all ids fit."""
    monkeypatch.chdir(world)
    init, data = make(tmp_path)
    for words in (["eval", "--device", "cpu"], [*TUNE, "--log_dir", str(tmp_path / "tuned")]):
        with pytest.raises(UserError, match=f"{data} was made with another tokenizer"):
            main([*words, "--init", init, "--data_dir", data])
    assert not (tmp_path / "tuned").exists()


def test_a_log_with_damaged_checkpoints_only_is_not_begun_anew(tmp_path):
    for step in (1, 2):
        (tmp_path / f"ckpt_{step:08d}.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        train_gpt2.find_checkpoint(tmp_path)


# ---- too little

@pytest.mark.parametrize("size, windows", [(0, 0), (1, 0), (16, 0), (17, 1), (18, 1), (32, 1), (33, 2), (34, 2)])
def test_a_shard_that_ends_at_a_windows_border(tmp_path, size, windows):
    """A window of 16 inputs takes 17 ids; the next one begins with the last of them."""
    write_shards(tmp_path, [np.arange(size) % 30], "train")
    if windows == 0:
        with pytest.raises(UserError, match="shorter than --block_size 16"):
            Corpus(tmp_path, "train", 16, 37)
    else:
        corpus = Corpus(tmp_path, "train", 16, 37)
        assert corpus.n_windows == windows
        assert corpus.windows([windows - 1])[0].tolist() == [i % 30 for i in range(16 * windows - 16, 16 * windows + 1)]
        DataLoaderLite(corpus, 1, tiny_config(block_size=16, total_batch_size=16 * windows), FakeWorld())
        with pytest.raises(UserError, match="less than a step"):
            DataLoaderLite(corpus, 1, tiny_config(block_size=16, total_batch_size=16 * windows + 16), FakeWorld())


# ---- what auto chooses

@pytest.mark.parametrize("rows, size, block_size, B", [
    (12, 1, 11, 12), (12, 3, 11, 4), (15, 1, 1024, 3), (14, 1, 1024, 2), (7, 1, 1024, 1), (4, 4, 8192, 1)])
def test_what_auto_chooses_on_a_cpu(rows, size, block_size, B):
    """The largest divisor of a process's rows that stays within 4,096 tokens."""
    cfg = tiny_config(block_size=block_size, total_batch_size=rows * block_size)
    assert train_gpt2.fit_micro_batch(tiny_model(), cfg, FakeWorld(size=size)) == B
    cfg.micro_batch_size = 5
    assert train_gpt2.fit_micro_batch(tiny_model(), cfg, FakeWorld(size=size)) == 5  # who asks for it, gets it


@pytest.mark.parametrize("n_vocab, rows", [(256, 256), (257, 384), (384, 384), (2048, 2048)])
def test_a_vocabulary_is_padded_to_a_multiple_of_128(tmp_path, n_vocab, rows):
    cfg = tiny_config(vocab_size=0, data_dir=str(tmp_path))
    (tmp_path / "meta.json").write_text(json.dumps(dict(tokenizer="bytes", vocab_size=n_vocab, shards=[])))
    write_shards(tmp_path, [[1] * 20], "val")
    meta, _, _ = train_gpt2.open_data(cfg, FakeWorld(), quiz=False)
    assert cfg.vocab_size == rows and meta["vocab_size"] == n_vocab


def test_data_that_is_missing_is_fetched_by_process_0_alone(tmp_path, monkeypatch):
    """The laptop preset's text and HellaSwag's questions; here by the second of two, which leaves it to the first."""
    world, left, tokenizer = FakeWorld(1, 2), [], fineweb.load_tokenizer("bytes")
    world.first = left.append
    for name in "fineweb.main", "hellaswag.find_data":
        monkeypatch.setattr(name, lambda *words: pytest.fail("both would write"))
    monkeypatch.setattr("hellaswag.iterate_examples", lambda split: [])
    monkeypatch.setattr(train_gpt2, "load_tokenizer", lambda source: tokenizer)
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data/builtin", [[1] * 20], "val")
    train_gpt2.open_data(tiny_config(data_dir="data/builtin", vocab_size=0), world, quiz=True)
    assert len(left) == 2


# ---- devices

def test_every_tensor_is_made_on_the_models_device():
    """The meta device stands for a GPU: what is made elsewhere is refused. Only its embeddings have to be watched."""
    def check(module, inputs):
        assert inputs[0].device == module.weight.device

    with torch.device("meta"):
        model, idx = GPT(GPTConfig(**TINY)), torch.zeros(2, 5, dtype=torch.long)
    model.transformer.wte.register_forward_pre_hook(check)
    model.transformer.wpe.register_forward_pre_hook(check)
    model(idx, idx)[1].backward()
    with pytest.raises(RuntimeError, match="device"):  # the device itself refuses a mix
        idx + torch.zeros(2, 5, dtype=torch.long)
