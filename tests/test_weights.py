"""OpenAI's weights in, and out again: Hugging Face's library reads what we write, and we what it wrote."""
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import TINY, random_ids, shake, tiny_model
from train_gpt2 import GPT, GPTConfig, UserError

# What openai-community/gpt2 has in its config.json besides the shape; much of it means nothing to us.
OPENAI = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
          "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
          "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "resid_pdrop": 0.1, "summary_activation": None,
          "summary_first_dropout": 0.1,
          "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
          "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}


def hf_model(noise=0.2, **shape):
    """A GPT2LMHeadModel of the tiny shape, made from a config: no file and no network."""
    from transformers import GPT2Config, GPT2LMHeadModel
    names = dict(block_size="n_positions")
    torch.manual_seed(0)
    config = {names.get(k, k): v for k, v in {**TINY, **shape}.items()}
    return shake(GPT2LMHeadModel(GPT2Config(bos_token_id=36, eos_token_id=36, **config)).eval(), noise)


def gap(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def theirs():
    return hf_model()


@pytest.fixture
def folder(theirs, tmp_path):
    """What Hugging Face's library writes: config.json and model.safetensors."""
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(folder, change):
    """Let change(dict of tensors) return what model.safetensors shall hold instead."""
    file = folder / "model.safetensors"
    weights = change(load_file(file))
    save_file({name: w.clone().contiguous() for name, w in weights.items()}, file)


def configure(folder, **changes):
    """Set keys of config.json, or take out those that are set to `del`."""
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "del"}))


# ---- in

@pytest.mark.parametrize("noise, tolerance", [(0.2, 1e-4), (0.0, 1e-5)], ids=["shaken", "plain"])
def test_imported_logits_equal_theirs(noise, tolerance, tmp_path):
    theirs = hf_model(noise)
    theirs.save_pretrained(tmp_path)
    model, idx = GPT.from_pretrained(str(tmp_path)), random_ids(3, 11)
    assert model.config == GPTConfig(**TINY) and model.n_vocab == 37
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        assert gap(model(idx)[0], theirs(idx).logits) < tolerance
        # The same number for the same text: their loss shifts the labels by one, ours is handed them shifted.
        assert gap(model(idx[:, :-1], idx[:, 1:])[1], theirs(idx, labels=idx).loss) < tolerance


@pytest.mark.slow
def test_the_full_124m_goes_in_and_out(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs, idx = GPT2LMHeadModel(GPT2Config()).eval(), random_ids(1, 16, n=50257)
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    assert model.num_params() == 124_439_808
    model.save_pretrained(tmp_path / "ours")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        want = theirs(idx).logits
        assert gap(model(idx)[0], want) < 1e-5 and gap(again(idx).logits, want) < 1e-5


def without_prefix(weights):
    return {name.removeprefix("transformer."): w for name, w in weights.items()}


def with_buffers(weights):
    for i in range(TINY["n_layer"]):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(11, 11, dtype=torch.bool).tril()[None, None]
        weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return weights


def with_head(weights):
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"]}


@pytest.mark.parametrize("change", [without_prefix, with_buffers, with_head,
                                    lambda w: without_prefix(with_buffers(w)),
                                    lambda w: without_prefix(with_head(w))],
                         ids=["no-prefix", "buffers", "head", "no-prefix-buffers", "no-prefix-head"])
def test_every_shape_that_gpt2_files_come_in_is_read(theirs, folder, change):
    """OpenAI's upload has no prefix and holds the causal masks; newer files have neither masks nor head."""
    rewrite(folder, change)
    model, idx = GPT.from_pretrained(folder), random_ids(2, 7)
    assert gap(model(idx)[0], theirs(idx).logits) < 1e-4


def test_openais_config_is_read(theirs, folder):
    shape = dict(n_ctx=11, n_embd=24, n_head=4, n_layer=3, n_positions=11, vocab_size=37)
    (folder / "config.json").write_text(json.dumps({**OPENAI, **shape}))
    assert GPT.from_pretrained(folder).config == GPTConfig(**TINY)


def test_several_files_are_read_as_one(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    idx = random_ids(2, 7)
    assert gap(GPT.from_pretrained(tmp_path)(idx)[0], theirs(idx).logits) < 1e-4
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match="No such file"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halved_weights_become_float32(theirs, folder, dtype):
    rewrite(folder, lambda weights: {name: w.to(dtype) for name, w in weights.items()})
    model = GPT.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.transformer.wte.weight, theirs.transformer.wte.weight.to(dtype).float())


# ---- what is refused, each in one line that names the folder or the file

@pytest.mark.parametrize("key, value", [
    ("activation_function", "gelu"),
    ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 48),
    ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
    ("add_cross_attention", True), ("tie_word_embeddings", False)])
def test_another_architecture_is_refused(folder, key, value):
    """All of these load without a complaint from the shapes, and would compute something else."""
    configure(folder, **{key: value})
    with pytest.raises(UserError, match=f"{key}") as error:
        GPT.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_gpt_neo_is_refused(folder):
    from transformers import GPTNeoConfig
    (folder / "config.json").write_text(GPTNeoConfig().to_json_string())
    with pytest.raises(UserError, match="gpt_neo"):
        GPT.from_pretrained(folder)


def no_qkv(weights):
    return {name: w for name, w in weights.items() if name != "transformer.h.1.attn.c_attn.weight"}


@pytest.mark.parametrize("change, says", [
    (no_qkv, "transformer.h.1.attn.c_attn.weight missing"),
    (lambda w: {**w, "transformer.h.3.ln_1.weight": torch.ones(24)}, "transformer.h.3.ln_1.weight .*unknown"),
    (lambda w: {**no_qkv(w), "score.weight": torch.ones(2)}, "score.weight missing or unknown, transformer.h.1.attn.c_attn.weight"),
    (lambda w: {**w, "lm_head.weight": w["transformer.wte.weight"] + 1e-3}, "lm_head and wte differ"),
    (lambda w: {**w, "transformer.wpe.weight": torch.zeros(12, 24)}, "mismatch"),
    (lambda w: {**w, "transformer.h.0.mlp.c_fc.weight": w["transformer.h.0.mlp.c_fc.weight"].t()},
     "mismatch"),
], ids=["missing", "unknown", "both", "untied", "positions", "linear"])
def test_other_tensors_are_refused(folder, change, says):
    rewrite(folder, change)
    with pytest.raises(UserError, match=says) as error:
        GPT.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_another_number_of_blocks_is_refused(folder):
    for n_layer, says in ((2, "transformer.h.2"), (4, "transformer.h.3")):
        configure(folder, n_layer=n_layer)
        with pytest.raises(UserError, match=says):
            GPT.from_pretrained(folder)


def test_damaged_folders_are_refused(folder, tmp_path):
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, words = file.read_bytes(), config.read_text()

    def refused(says):
        with pytest.raises(UserError, match=says) as error:
            GPT.from_pretrained(folder)
        assert str(folder) in str(error.value)

    for damage in (whole[:-100], whole[:50], b"", b"\xff" * 1000):
        file.write_bytes(damage)
        refused("layout")
    file.rename(folder / "pytorch_model.bin")
    refused("safetensors")
    file.write_bytes(whole)
    for damage in ("{", "", "[]", "\x00\xff"):
        config.write_text(damage)
        refused("config.json|layout")
    config.unlink()
    refused("config.json|layout")
    config.write_text(words)
    GPT.from_pretrained(folder)  # and whole again, it is read


def test_a_name_that_cannot_be_fetched_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no-such-owner/no-such-model") as error:
        GPT.from_pretrained("no-such-owner/no-such-model")
    assert "\n" not in str(error.value)


# ---- out

def export(model, folder):
    """Our save_pretrained, then their from_pretrained, which must find all of its tensors and no other."""
    from transformers import GPT2LMHeadModel
    model.save_pretrained(folder)
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return theirs.eval()


@pytest.mark.parametrize("noise, tolerance", [(0.2, 1e-4), (0.0, 1e-5)], ids=["shaken", "plain"])
def test_exported_logits_equal_ours(noise, tolerance, tmp_path):
    model, idx = tiny_model(noise=noise), random_ids(3, 11)
    theirs = export(model, tmp_path / "out")
    with torch.no_grad():
        assert gap(theirs(idx).logits, model(idx)[0]) < tolerance
    assert not [f.name for f in (tmp_path / "out").iterdir() if f.suffix not in (".json", ".safetensors")]


def test_rows_that_pad_the_vocabulary_stay_at_home(tmp_path):
    model, idx = tiny_model(), random_ids(3, 11, n=31)
    model.n_vocab = 31
    theirs = export(model, tmp_path)
    assert theirs.config.vocab_size == 31 and theirs.lm_head.weight.shape == (31, 24)
    with torch.no_grad():
        assert gap(theirs(idx).logits, model(idx)[0][:, :, :31]) < 1e-4
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight[:31])


def test_out_and_in_again_changes_no_bit(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "once")
    again = GPT.from_pretrained(tmp_path / "once")
    assert again.config == model.config
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
    again.save_pretrained(tmp_path / "twice")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_in_and_out_again_changes_no_bit(folder, tmp_path):
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "out")
    stored, again = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == again.keys() and all(torch.equal(stored[k], again[k]) for k in stored)


def test_export_is_float32_and_leaves_the_model_alone(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert all(torch.equal(v, before[k]) and v.dtype == torch.bfloat16 for k, v in model.state_dict().items())


def test_exported_models_stop_at_the_last_id_and_drop_nothing_out(tmp_path):
    """<|endoftext|> is the last id of our vocabularies. Fine-tuning must not find a dropout we never had."""
    config = export(tiny_model(), tmp_path).config
    assert config.eos_token_id == config.bos_token_id == 36
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0
    assert config.activation_function == "gelu_new" and math.isclose(config.layer_norm_epsilon, 1e-5)
    assert config.n_positions == 11 and config.tie_word_embeddings


def test_exported_models_write_what_ours_do(tmp_path):
    model, prompt = tiny_model(block_size=40), random_ids(2, 6)
    theirs = export(model, Path(tmp_path, "deep", "folder"))
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20,
                           eos_token_id=-1, pad_token_id=0)
    assert torch.equal(model.generate(prompt, 20, temperature=0), want)
