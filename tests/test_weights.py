"""OpenAI's weights in, and out again: Hugging Face's library reads what we write, and we what it wrote."""
import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import TINY, gap, hf_twin, random_ids, tiny_model
from train_gpt2 import GPT, GPTConfig, UserError, fetch_pretrained

# Of what openai-community/gpt2 has in its config.json; much of it means nothing to us.
OPENAI = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256,
          "eos_token_id": 50256, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 11, "resid_pdrop": 0.1,
          "summary_type": "cls_index", "task_specific_params": {"text-generation": {"do_sample": True}}}


@pytest.fixture(scope="module")
def theirs():
    return hf_twin(tiny_model(), bos_token_id=1, eos_token_id=35)


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
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# ---- in

@pytest.mark.parametrize("noise, tolerance", [(0.2, 1e-4), (0.0, 1e-5)], ids=["shaken", "plain"])
def test_imported_logits_equal_theirs(noise, tolerance, tmp_path):
    theirs = hf_twin(tiny_model(noise=noise), bos_token_id=1, eos_token_id=35)
    theirs.save_pretrained(tmp_path)
    model, idx = GPT.from_pretrained(str(tmp_path)), random_ids(3, 11)
    assert model.config == GPTConfig(**TINY) and (model.n_vocab, model.eot) == (37, 35)
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


def as_openai_uploaded_it(folder):
    """No prefix before the names, the causal masks among the tensors, and OpenAI's own config.json."""
    masks = {f"h.{i}.attn.{name}": mask for i in range(TINY["n_layer"]) for name, mask in
             [("bias", torch.ones(11, 11).tril()[None, None]), ("masked_bias", torch.tensor(-1e4))]}
    rewrite(folder, lambda weights: masks | {name.removeprefix("transformer."): w for name, w in weights.items()})
    shape = dict(n_embd=24, n_head=4, n_layer=3, n_positions=11, vocab_size=37)
    (folder / "config.json").write_text(json.dumps({**OPENAI, **shape}))


def with_a_head(folder):
    rewrite(folder, lambda weights: {**weights, "lm_head.weight": weights["transformer.wte.weight"]})


def halved(folder):
    rewrite(folder, lambda weights: {name: w.half() for name, w in weights.items()})


def in_several_files(folder):
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("change", [as_openai_uploaded_it, with_a_head, in_several_files, halved])
def test_every_form_that_gpt2_files_come_in_is_read(theirs, folder, change):
    change(folder)
    model, idx = GPT.from_pretrained(folder), random_ids(2, 7)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.config == GPTConfig(**TINY)
    assert gap(model(idx)[0], theirs(idx).logits) < (0.1 if change is halved else 1e-4)


@pytest.mark.parametrize("eos, eot", [(35, 35), (50256, 36), (None, 36)])
def test_the_mark_is_the_end_of_a_text_not_its_beginning(folder, eos, eot):
    """Many small models name OpenAI's, which they haven't; then it is the last id."""
    configure(folder, bos_token_id=1, eos_token_id=eos)
    assert GPT.from_pretrained(folder).eot == eot


# ---- what is refused, in one line that names the folder

C_ATTN = "transformer.h.1.attn.c_attn.weight"


def file(name, change):
    """A file whose bytes become change(bytes)."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def gpt_neo(folder):
    from transformers import GPTNeoConfig
    (folder / "config.json").write_text(GPTNeoConfig().to_json_string())


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def one_file_of_several_is_missing(folder):
    in_several_files(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


REFUSED = {
    # other architectures, most of which load without a complaint from the shapes and would compute something else
    **{f"{key} {value}": (lambda folder, key=key, value=value: configure(folder, **{key: value}), key)
       for key, value in [("activation_function", "gelu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 48),
                          ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
                          ("add_cross_attention", True), ("tie_word_embeddings", False)]},
    "GPT-Neo": (gpt_neo, "gpt_neo"),
    # other tensors
    "a tensor with another name": (
        lambda folder: rewrite(folder, lambda w: {"score" if name == C_ATTN else name: t for name, t in w.items()}),
        f"score missing or unknown, {C_ATTN} missing or unknown"),
    "an untied head": (
        lambda folder: rewrite(folder, lambda w: {**w, "lm_head.weight": w["transformer.wte.weight"] + 1e-3}),
        "lm_head and wte differ"),
    "a transposed matrix": (lambda folder: rewrite(folder, lambda w: {**w, C_ATTN: w[C_ATTN].t()}), "mismatch"),
    "one block too few": (lambda folder: configure(folder, n_layer=4), r"transformer.h.3"),
    # damaged folders
    "a truncated file": (file("model.safetensors", lambda content: content[:-100]), "layout"),
    "only a pickle": (pickled, "safetensors"),
    "one file of several": (one_file_of_several_is_missing, "No such file"),
    "half a config": (file("config.json", lambda content: content[:-50]), "config.json"),
    "a list as config": (file("config.json", lambda content: b"[]"), "layout"),
}


@pytest.mark.parametrize("change, says", REFUSED.values(), ids=REFUSED)
def test_what_is_not_gpt2_is_refused(folder, change, says):
    change(folder)
    with pytest.raises(UserError, match=says) as error:
        GPT.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_cannot_be_fetched_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no-such-owner/no-such-model") as error:
        GPT.from_pretrained("no-such-owner/no-such-model")
    assert "\n" not in str(error.value)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(name))
    for name in "gpt2-xl", "owner/name":
        fetch_pretrained(name)
    with pytest.raises(UserError, match="^log: no such checkpoint"):
        fetch_pretrained("log")
    assert asked == ["openai-community/gpt2-xl", "owner/name"]


# ---- out

@pytest.mark.parametrize("noise, tolerance", [(0.2, 1e-4), (0.0, 1e-5)], ids=["shaken", "plain"])
def test_exported_logits_equal_ours(noise, tolerance, tmp_path):
    """From a padded vocabulary, whose padding stays at home, and with an end of text that is not its last id.
    Fine-tuning must not find a dropout we never had."""
    from transformers import GPT2LMHeadModel
    model, idx, folder = tiny_model(noise=noise), random_ids(3, 11, n=31), tmp_path / "deep" / "folder"
    model.n_vocab, model.eot = 31, 7
    model.save_pretrained(folder)
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # it finds all of its tensors and no other
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    with torch.no_grad():
        logits = theirs.eval()(idx).logits
        assert logits.shape == (3, 11, 31) and gap(logits, model(idx)[0][:, :, :31]) < tolerance
    c = theirs.config
    assert (c.vocab_size, c.n_positions, c.bos_token_id, c.eos_token_id) == (31, 11, 7, 7)
    assert c.resid_pdrop == c.embd_pdrop == c.attn_pdrop == 0 and c.tie_word_embeddings
    assert GPT.from_pretrained(folder).eot == 7


def test_in_and_out_and_in_again_changes_no_bit(folder, tmp_path):
    """From bfloat16 too: what is written is float32, and the model stays as it was."""
    model = GPT.from_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16):
        before = copy.deepcopy(model.to(dtype).state_dict())
        model.save_pretrained(tmp_path / "out")
        again = GPT.from_pretrained(tmp_path / "out")
        assert again.config == model.config
        for name, w in model.state_dict().items():
            assert w.dtype == dtype and torch.equal(w, before[name])
            assert torch.equal(again.state_dict()[name], w.float())
        stored, written = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
        assert {w.dtype for w in written.values()} == {torch.float32} and stored.keys() == written.keys()
        assert dtype != torch.float32 or all(torch.equal(w, written[name]) for name, w in stored.items())


def test_an_untied_head_is_not_exported(tmp_path):
    """transformers would tie it again, and compute something else."""
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(AssertionError, match="untied head"):
        model.save_pretrained(tmp_path / "out")
