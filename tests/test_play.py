"""play.ipynb: its form, that the pictures of attention are true, and that it runs from a clean clone."""
import base64
import re
import shutil
import struct

import nbformat
import pytest
import torch

from conftest import ROOT
from fineweb import load_tokenizer
from helpers import random_ids, tiny_model

NOTEBOOK = nbformat.read(ROOT / "play.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
SOURCE = "\n".join(cell.source for cell in CODE)
PROSE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")


def test_form():
    """It begins as the lessons do, fits on a page, and names no place of the machine on which it ran."""
    nbformat.validate(NOTEBOOK)
    first = nbformat.read(ROOT / "lessons" / "10_ddp.ipynb", as_version=4).cells[1].source
    assert NOTEBOOK.cells[0].source.startswith("# ") and CODE[0].source.startswith(first)
    assert max(len(cell.source.splitlines()) for cell in CODE) <= 30
    assert all(len(line) <= 119 for line in SOURCE.splitlines())
    text = (ROOT / "play.ipynb").read_text()
    assert len(text) <= 1_500_000
    assert not re.search(r"(?<![\w.])/(home|root|Users|tmp|usr|work|opt)/", text)


def test_was_executed_from_top_to_bottom_without_an_error():
    """With pictures that can be read, each of which asks a question."""
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    widths = [struct.unpack(">I", base64.b64decode(picture)[16:20])[0] for picture in pictures]
    assert len(widths) >= 10 and min(widths) >= 700, widths
    titles = re.findall(r"title\(\s*f?([\"'])(.*?)\1", SOURCE)
    assert len(titles) >= 7 and all("?" in title for _, title in titles), titles


def test_names_what_exists():
    source = (ROOT / "train_gpt2.py").read_text()
    for name in re.findall(r"`(?:GPT\.|CausalSelfAttention\.)?(\w+)`", PROSE):
        assert re.search(rf"\b{name}\b", source + SOURCE), name


def cell_with(text):
    return next(cell.source for cell in CODE if text in cell.source)


def test_attention_weights_are_those_of_the_model(tmp_path):
    """As transformers has them; and the cell itself notices a wrong one."""
    from transformers import GPT2LMHeadModel
    names, source = {"torch": torch}, cell_with("def attention_weights")
    model, idx = tiny_model().eval(), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        exec(source, names)
        expected = torch.cat(theirs(idx, output_attentions=True).attentions)
        torch.testing.assert_close(names["attention_weights"](model, idx), expected, atol=1e-5, rtol=1e-4)
        assert not model.transformer.h[0].attn._forward_hooks         # it has tidied up
        for right, wrong in ((".triu(1)", ".triu(2)"), ("** 0.5", "** 1.0"), ("softmax(dim=-1)", "softmax(dim=-2)")):
            assert right in source
            exec(source.replace(right, wrong), names)
            with pytest.raises(AssertionError):
                names["attention_weights"](model, idx)


def test_token_losses_are_the_models_loss():
    """Their mean is what the model says of the same text."""
    model, tokenizer = tiny_model(vocab_size=257).eval(), load_tokenizer("bytes")
    names = dict(torch=torch, F=torch.nn.functional, model=model, tokenizer=tokenizer, c=model.config)
    exec(cell_with("def token_losses").split("\n\n\n")[0], names)
    with torch.no_grad():
        for text in "abcdefg", "longer than the context is":
            words, losses = names["token_losses"](text)
            ids = torch.tensor([[256, *text.encode()][:model.config.block_size + 1]])
            assert words == list(text[:model.config.block_size])
            torch.testing.assert_close(losses.mean(), model(ids[:, :-1], ids[:, 1:])[1])


# ---- every cell, in a fresh kernel

def execute(folder, source="log", only=""):
    """Run the cells, or only those that match a pattern -> (what they print, the number of pictures)."""
    from nbclient import NotebookClient
    nb = nbformat.read(ROOT / "play.ipynb", as_version=4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type == "code" and re.search(only, cell.source)]
    for cell in nb.cells:
        cell.source = cell.source.replace('SOURCE = "log" ', f'SOURCE = "{source}" ')
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in nb.cells for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return ("".join(output.get("text", "") for output in outputs),
            sum("image/png" in output.get("data", {}) for output in outputs))


@pytest.mark.slow
def test_runs_from_a_clean_clone_and_on_what_it_trained(tmp_path, monkeypatch):
    """Offline, with no log: a small model is trained. Then on that one as a checkpoint and as an exported folder."""
    import train_gpt2
    clone, temporary = tmp_path / "clone", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    shutil.copytree(ROOT / "lessons", clone / "lessons", ignore=shutil.ignore_patterns("*.ipynb", "__pycache__"))
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py"):
        shutil.copy(ROOT / name, clone)
    text, pictures = execute(clone / "lessons")                               # from any folder inside it
    assert text.startswith("a small run of now: ") and pictures == 11
    assert (clone / "my-gpt2.html").exists()                                  # the explorer's page
    assert not (clone / "log").exists() and not (clone / "data").exists()     # all else was elsewhere

    log = next(temporary.rglob("log.txt")).parent
    val = [float(line.split()[2]) for line in (log / "log.txt").read_text().splitlines() if " val " in line]
    assert val[-1] < val[0] - 1.5
    checkpoint = next(log.glob("ckpt_*.pt"))
    text, pictures = execute(clone, str(checkpoint), r"REPOSITORY =|^import|load_model\(|LOGS =")
    assert text.startswith(f"{checkpoint.name}: ") and pictures == 1          # of the log that lies beside it
    train_gpt2.main(["export", "--init", str(log), "--out", str(clone / "exported")])
    text, pictures = execute(clone, "exported")
    assert "exported has no log" in text and pictures == 9
