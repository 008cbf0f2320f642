"""hellaswag.py against plain references: transformers on one ending at a time, cases by hand, the harness."""
import copy
import doctest
import hashlib
import io
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.overrides import TorchFunctionMode

import hellaswag
from conftest import ROOT
from fineweb import UserError, load_tokenizer, save_tokenizer
from hellaswag import evaluate, iterate_examples, plain_score, render_example, score
from helpers import run_worlds, tiny_model

FIXTURE = Path(__file__).with_name("hellaswag_fixture.jsonl")
DEFAULT = Path("data", "hellaswag", "hellaswag_val.jsonl")
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def examples():
    return list(iterate_examples(path=FIXTURE))


def tiny_gpt(block_size=1024, vocab_size=384, n_vocab=257):
    """For 257 ids, in a matrix that is padded: what the other rows say must not count."""
    model = tiny_model(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32)
    model.n_vocab = n_vocab
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_gpt()


def reference_log_p(model, context, ending):
    """Sum of log p of an ending's tokens, by a model of transformers: one text, no padding, float64."""
    with torch.no_grad():
        logits = model(torch.tensor([(context + ending)[:-1]])).logits[0, len(context) - 1:].double()
    return sum(row.log_softmax(0)[token].item() for row, token in zip(logits, ending, strict=True))


def record(**changes):
    example = {"activity_label": "Tea", "ctx_a": "A man boils water.", "ctx_b": "he", "ctx": "A man boils water. he",
               "endings": ["flies.", "is tea.", "pours it on.", "sells it."], "label": 2, **changes}
    return json.dumps({key: value for key, value in example.items() if value is not None})


def accuracies(results):
    return [results[rule] for rule in ("acc", "acc_norm", "acc_norm_chars")]


# ---- questions

def test_examples_in_docstrings_are_right():
    result = doctest.testmod(hellaswag)
    assert result.attempted >= 3 and result.failed == 0


def test_the_harness_tidies_text():
    """Worked out by hand from the rules of its tasks/hellaswag/utils.py."""
    for text, tidy in {"a [title] b": "a. b",               # ". " and the space that was there make one
                       " [header] a ": " a",                # trimmed before the bracket goes, not after
                       "a   b    c": "a  b  c",             # pairs of spaces, once
                       "a [x [y] z] b": "a z] b"}.items():  # to the nearest closing bracket
        assert hellaswag.tidy(text) == tidy
    example = {"activity_label": "Ice", "ctx_a": "A man.", "ctx_b": "he And Eve", "endings": ["a [title] b"]}
    assert hellaswag.question(example, harness=True) == ("Ice: A man. He and eve", ["a. b"])


@pytest.mark.parametrize("harness, ctx_b, context, endings", [
    (False, "", "she", [" sits", " is"]),
    (True, "", "x: she", ["its", " is"]),         # in one piece "x: she sits" is "x: shEits": cut after six tokens
    (True, "[a]", "x: she", ["  sits", "  is"]),  # tidied: "x: she ", whose space the ending gets besides its own
])
def test_the_harness_cuts_one_string(harness, ctx_b, context, endings):
    """A tokenizer that merges across the border shows it."""
    def merging(text):
        return list(text.replace("e s", "E").encode())

    example = dict(activity_label="x", ctx_a="she", ctx_b=ctx_b, ctx="she", endings=["sits", "is"])
    found = hellaswag.encode_question(example, merging, harness)
    assert (bytes(found[0]).decode(), [bytes(ending).decode() for ending in found[1]]) == (context, endings)


# ---- scores

@pytest.mark.parametrize("vocabulary, block_size", [("bytes", 1024), ("bytes", 150), ("bytes", 24), ("gpt2", 1024)])
def test_scores_are_those_of_transformers_and_of_the_plain_way(examples, vocabulary, block_size, tmp_path, request):
    """Of a long text the last block_size + 1 tokens count, as in the harness, and the last of them is not read."""
    from transformers import AutoModelForCausalLM
    given, model, encode = BYTES, tiny_gpt(block_size), BYTES.encode_ordinary
    if vocabulary == "gpt2":  # which is the default; and real questions, ActivityNet's and WikiHow's
        given, model = None, tiny_gpt(vocab_size=50304, n_vocab=50257)
        encode = request.getfixturevalue("gpt2_tokenizer").encode_ordinary
        folder = request.getfixturevalue("real_data")
        real = list(iterate_examples(path=folder / "hellaswag" / "hellaswag_val_1000.jsonl"))
        examples = real[:5] + real[-5:]
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    sums, counts = score(model, examples, given)
    for example, ours, n in zip(examples, sums, counts):
        endings = [encode(" " + ending) for ending in example["endings"]]
        texts = [(encode(example["ctx"]) + ending)[-block_size - 1:] for ending in endings]
        scored = [min(len(ending), block_size) for ending in endings]  # something has to predict the first
        expected = [reference_log_p(theirs, text[:-k], text[-k:]) for text, k in zip(texts, scored)]
        torch.testing.assert_close(ours.tolist(), expected, rtol=0, atol=2e-3)  # sums of -100 to -600
        assert n.tolist() == scored
        if block_size == 1024:
            plain, m = plain_score(model, example, encode)
            torch.testing.assert_close(plain.double(), ours, rtol=0, atol=1e-3)
            assert m.tolist() == scored
            data, rows, mask, label = render_example(example, encode)  # as in build-nanogpt
            assert rows[mask.bool()].tolist() == sum(endings, []) and data["ending_tokens"] == endings
            assert data["ctx_tokens"] == encode(example["ctx"]) and label == data["label"] == example["label"]
    labels = torch.tensor([e["label"] for e in examples])
    chars = torch.tensor([[len(ending) for ending in e["endings"]] for e in examples])
    right = [((sums / unit).argmax(dim=1) == labels).double().mean().item() for unit in (1, counts, chars)]
    assert accuracies(evaluate(model, examples, given)) == pytest.approx(right)


def test_a_question_that_just_fits_is_one_row():
    """Of context and endings all but the last tokens are read: 3 + 0 + 2 of them here."""
    for block_size, rows in (5, 1), (4, 2):
        assert len(hellaswag.rows_of([7, 8, 9], [[1], [2, 3, 4]], [0, 1], block_size)) == rows


def test_batches_are_full_and_their_order_does_not_matter(model, examples, monkeypatch):
    """A context is read once, then the endings but for their last tokens; long rows go first. Only the endings meet the
    vocabulary, few at a time: the logits of whole rows would be 200 times the size of their hidden states."""
    batches, projected, log_p = [], [], hellaswag.log_p
    monkeypatch.setattr(hellaswag, "log_p", lambda model, rows: batches.append(rows) or log_p(model, rows))
    hook = model.lm_head.register_forward_hook(lambda module, args, out: projected.append(len(out)))
    expected, counts = score(model, examples, BYTES, max_tokens=1500)
    hook.remove()
    # bytes: an ending has one token more than bytes, the space before it, and one fewer is read
    lengths = [len((e["ctx"] + "".join(e["endings"])).encode()) for e in examples]
    assert [len(row.tokens) for rows in batches for row in rows] == sorted(lengths, reverse=True)
    assert 1 < len(batches) < 12 and all(len(rows) * len(rows[0].tokens) <= 1500 for rows in batches)
    assert sum(projected) == counts.sum().item() and max(projected) <= 512
    sums, n = score(model, examples[::-1], BYTES, max_tokens=1)
    torch.testing.assert_close(sums.flip(0), expected, rtol=1e-6, atol=1e-4)
    assert torch.equal(n.flip(0), counts)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_rounds_and_no_more(model, examples, weights):
    """In autocast, or with weights in bfloat16: the network rounds, the loss of a token isn't rounded again."""
    exact, _ = score(model, examples, BYTES)
    rounded, counts = score(copy.deepcopy(model).to(weights), examples, BYTES,
                            dtype=torch.bfloat16 if weights == torch.float32 else None)
    error = ((rounded - exact) / counts).abs()
    assert 0 < error.mean() < 0.05  # nats per token
    # a loss with 8 bits would be a multiple of 1/32 (it's below 8): the sums are not
    assert (rounded * 32).frac().abs().gt(1e-3).float().mean() > 0.5


def test_the_device_is_read_once_and_float64_begins_on_the_cpu(model, examples):
    """A number that is read after every batch makes a GPU wait for Python. And a Mac's GPU has no float64."""
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    called, dtypes = [], []
    with Watch():
        score(model, examples, BYTES, max_tokens=1)
    home = called.index("cpu")
    assert called[:home].count("cross_entropy") == 12 and "cross_entropy" not in called[home:]
    assert not {"double", "item", "tolist", "numpy", "__bool__"} & set(called[:home])
    evaluate(model, examples[:2], BYTES, all_reduce=lambda t: dtypes.append(t.dtype) or t)
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("own", [
    lambda x: x, lambda x: attention(x, x, x),
    lambda x: attention(x, x, x, attn_mask=torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()),
    None], ids=["attention", "not causal", "mask", "positions"])
def test_models_that_cannot_read_packed_rows_fail(examples, own):
    """A fork's own attention or positions can't be replaced: an error, where the score would be wrong."""
    model = tiny_gpt()
    wpe = model.transformer.wpe
    if own:
        model.transformer.h[1].attn.forward = own
    else:
        wpe.forward = lambda pos: wpe.weight[pos]
    with pytest.raises(AssertionError, match="can't read packed rows"):
        score(model, examples[:2], BYTES)


def test_evaluating_keeps_every_mode_and_no_gradient(examples, monkeypatch):
    def interrupt(model, rows):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise KeyboardInterrupt

    model = tiny_gpt().train()
    model.transformer.h[1].eval()  # frozen, say
    modes = [module.training for module in model.modules()]
    monkeypatch.setattr(hellaswag, "log_p", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, examples, BYTES)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


# ---- evaluate

# Sums and tokens of four endings, and endings of as many characters, for which each rule picks another one.
# Sums: -2 is the highest; per token: -2, -1.5, -6, -8; per character: -2, -1, -0.6, -4.4.
BY_HAND = [torch.tensor([row], dtype=torch.float64) for row in ([-2, -9, -12, -40], [1, 6, 2, 5])]
ENDINGS = ["x", "x" * 9, "x" * 20, "x" * 9]


def test_the_three_rules_and_their_standard_errors_by_hand(model, monkeypatch):
    """A standard error is the deviation of the twelve 0s and 1s over the root of 12."""
    examples = [json.loads(record(endings=ENDINGS, label=label)) for label in [0] * 4 + [1] * 3 + [2] * 5]
    monkeypatch.setattr(hellaswag, "score", lambda model, mine, *_, **__: [t.repeat(len(mine), 1) for t in BY_HAND])
    results = evaluate(model, iter(examples), BYTES)
    assert results["n"] == 12 and results["examples_per_second"] > 0
    for rule, right in (("acc", 4), ("acc_norm", 3), ("acc_norm_chars", 5)):
        answers = torch.tensor([1.0] * right + [0.0] * (12 - right), dtype=torch.float64)
        assert results[rule] == answers.mean()
        assert results[rule + "_stderr"] == pytest.approx(answers.std().item() / math.sqrt(12), rel=1e-12)
    assert hellaswag.describe(results).startswith("acc 0.3333 +- 0.1421, acc_norm 0.2500 +- 0.1306, acc_norm_chars 0.")
    assert math.isnan(evaluate(model, examples[:1], BYTES)["acc_stderr"])


def test_the_harness_counts_characters_after_its_clean_up(model, monkeypatch):
    """-9/12 is more than -9/10, -9/6 is less."""
    total, asked = torch.tensor([[-9.0, -9.0, -90.0, -90.0]], dtype=torch.float64), []
    monkeypatch.setattr(hellaswag, "score", lambda *_, harness: asked.append(harness) or (total, total))
    example = json.loads(record(endings=["[step] xxxxx", "x" * 10, "x", "x"], label=0))
    assert [evaluate(model, [example], harness=harness)["acc_norm_chars"] for harness in (False, True)] == [1, 0]
    assert asked == [False, True]


@pytest.mark.parametrize("size", [3, 13])
def test_any_number_of_processes(model, examples, size):
    """Of 13 processes for 12 questions, the last one has none."""
    def one(world, mine):
        return evaluate(mine, examples, BYTES, rank=world.rank, world_size=size, all_reduce=world.sum)

    whole = evaluate(model, examples, BYTES)
    for results in run_worlds(size, one, model):
        assert {**results, "examples_per_second": 0} == {**whole, "examples_per_second": 0}


def test_what_evaluate_refuses(model, examples):
    with pytest.raises(UserError, match="no HellaSwag questions"):
        evaluate(model, [], BYTES)
    with pytest.raises(UserError, match="the tokenizer has 257 ids, the model knows 256"):
        evaluate(tiny_gpt(n_vocab=256), examples, BYTES)


# ---- the file

@pytest.mark.parametrize("line", [
    "{'label': 1}", record()[:-1], record().encode("utf-16"), b'{"ctx": "caf\xe9"}', "[1, 2]", "3", "null",
    *(record(**{name: value}) for name, values in dict(
        ctx=[None, "  "], ctx_a=[None], ctx_b=[7], activity_label=[None],
        endings=[None, "abcd", ["a", "b", "c"], list("abcde"), ["a", "b", "c", 4], ["a", "b", "", "d"]],
        label=[None, 7, -1, 1.5, True, ""]).items() for value in values)])
def test_bad_records_are_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\n".join([record().encode(), b"", line if isinstance(line, bytes) else line.encode()]))
    with pytest.raises(UserError) as error:
        list(iterate_examples(path=path))
    assert str(error.value).startswith(f"{path}, line 3: not a question") and "\n" not in str(error.value)


def test_good_records_are_yielded_as_they_are(tmp_path, examples):
    assert len(examples) == 12
    assert examples == [json.loads(line) for line in FIXTURE.read_text("utf-8").splitlines()]
    path = tmp_path / "text_label.jsonl"
    path.write_text(record(label="3") + "\n\n", encoding="utf-8-sig")  # as the hub has it, and some editors save it
    assert [e["label"] for e in iterate_examples("val", path)] == [3]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder to work in, for which no file of questions is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HELLASWAG_DIR", raising=False)
    return tmp_path


def test_where_the_file_is_looked_for(elsewhere, monkeypatch):
    """What is asked for comes first, then HELLASWAG_DIR, then our own copy, which is fetched once."""
    DEFAULT.parent.mkdir(parents=True)
    fetched, files = [], [elsewhere / name / DEFAULT.name for name in "ab"]
    monkeypatch.setattr(hellaswag, "download", lambda file: fetched.append(file) or file.write_text("downloaded"))
    assert hellaswag.find_data() == hellaswag.find_data() == DEFAULT and fetched == [DEFAULT]
    for file in files:
        file.parent.mkdir()
        file.write_text(record())
    monkeypatch.setenv("HELLASWAG_DIR", str(files[0].parent))
    assert hellaswag.find_data() == files[0]
    assert hellaswag.find_data(files[1]) == hellaswag.find_data(files[1].parent) == files[1]
    monkeypatch.setenv("HELLASWAG_DIR", str(elsewhere))
    with pytest.raises(UserError, match="HELLASWAG_DIR says .* no file .*hellaswag_val.jsonl"):
        hellaswag.find_data()


@pytest.fixture
def published(elsewhere, monkeypatch, examples):
    """As if the fixture were what has been published."""
    assert hellaswag.SHA256 == "148f8efb84d40214a08c6a1dd0702f980d326148811411b4b5316e397b9b2fc6"
    lines = [json.dumps([e["ctx"], e["endings"], e["label"]]) + "\n" for e in examples]
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256("".join(lines).encode()).hexdigest())


def test_what_is_scored_is_checked(published, examples):
    """Our own copy must hold the published questions in their order; a file that the user names may hold any."""
    DEFAULT.parent.mkdir(parents=True)
    lines = FIXTURE.read_bytes().splitlines(keepends=True)
    DEFAULT.write_bytes(b"".join(lines))
    assert list(iterate_examples()) == examples
    changed = [line.replace(b"tray", b"trap") for line in lines]
    relabeled = [re.sub(rb'"label": (\d)', rb'"label": 0', line) for line in lines]
    assert changed != lines and relabeled != lines
    for bad in lines[:-1], lines[::-1], changed, relabeled, []:
        DEFAULT.write_bytes(b"".join(bad))
        with pytest.raises(UserError, match="hellaswag_val.jsonl doesn't hold the 10,042 published questions"):
            list(iterate_examples())
        assert len(list(iterate_examples(path=DEFAULT.resolve()))) == len(bad)


def test_the_hub_has_the_questions(published, examples, monkeypatch):
    """They are fetched once. Other questions, a broken file, and a network that does not answer, which the library by
    itself would ask for long, are one line and leave no file."""
    import pyarrow
    import pyarrow.parquet
    asked, hub = [], Path("hub.parquet")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, repo, timeout: asked.append((repo, timeout)))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *file, **of: asked.append((*file, of)) or hub)
    rows = [{**e, "label": str(e["label"])} for e in examples]  # the hub's labels are text

    def refused():
        with pytest.raises(UserError, match="HellaSwag can't be fetched .*: bring data.hellaswag.hellaswag_val.jsonl"):
            list(iterate_examples())
        return not DEFAULT.parent.exists()

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:11]), hub)
    assert refused()
    hub.write_bytes(hub.read_bytes()[:1000])
    assert refused()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), hub)
    assert list(iterate_examples()) == list(iterate_examples()) == examples
    assert [json.loads(line) for line in DEFAULT.read_text().splitlines()] == examples  # with numbers as labels
    assert [path.name for path in DEFAULT.parent.iterdir()] == [DEFAULT.name]
    parquet = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet", {"repo_type": "dataset"})
    assert asked == [("Rowan/hellaswag", 10), parquet] * 3


def test_offline_it_fails_at_once(elsewhere):
    """As HF_HUB_OFFLINE demands, which conftest.py sets."""
    with pytest.raises(UserError, match="HellaSwag can't be fetched from the Hugging Face hub .*offline mode"):
        list(iterate_examples())


# ---- the command line

@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A Hugging Face folder of the tiny model, with its tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    save_tokenizer(BYTES, folder)
    return str(folder)


def test_main_scores_and_shows(folder, model, examples, capsys):
    argv = ["--model", folder, "--data", str(FIXTURE), "--device", "cpu", "--dtype", "float32"]
    results, expected = hellaswag.main(argv), evaluate(model, examples, BYTES)
    assert accuracies(results) == accuracies(expected)
    out = capsys.readouterr().out
    assert f"12 questions: {folder}, float32 on cpu" in out and hellaswag.describe(expected) in out
    results = hellaswag.main([*argv, "--limit", "5", "--show", "3", "--harness"])
    assert accuracies(results) == accuracies(evaluate(model, examples[:5], BYTES, harness=True))
    out = capsys.readouterr().out
    assert "5 questions, by the rules of the harness" in out and "\n3. " in out and "\n4. " not in out
    assert f"\n1. {hellaswag.question(examples[0], harness=True)[0]}\n" in out
    sums, counts = score(model, examples[:3], BYTES, harness=True)
    losses = [float(loss) for loss in re.findall(r"^  [> ][* ] +(\d\.\d{3})  ", out, re.MULTILINE)]
    assert losses == pytest.approx((-sums / counts).flatten().tolist(), abs=6e-4)
    hellaswag.show([json.loads(record())], *BY_HAND)
    assert capsys.readouterr().out.splitlines() == ["", "1. A man boils water. he",
                                                    "      2.000  flies.",
                                                    "  >   1.500  is tea.",
                                                    "   *  6.000  pours it on.",
                                                    "      8.000  sells it."]


@pytest.mark.parametrize("argv, message", [
    (["--data", FIXTURE], "--model"),
    (["--model", "gpt2", "--fast"], "--fast"),
    (["--model", "gpt2", "--limit", "0"], "--limit and --max_tokens must be at least 1"),
    (["--model", "gpt2", "--max_tokens", "0"], "--max_tokens must be at least 1"),
    (["--model", "gpt2", "--show", "-1"], "--show at least 0"),
    (["--model", "gpt2", "--dtype", "int8"], "--dtype"),
    (["--model", "gpt2", "--data", "nowhere"], "--data says nowhere"),
    (["--model", "empty", "--data", FIXTURE], "empty")])
def test_wrong_input_is_one_line(elsewhere, argv, message):
    Path("empty").mkdir()
    with pytest.raises(UserError) as error:
        hellaswag.main(list(map(str, argv)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_as_people_run_it(folder, tmp_path, monkeypatch, capsys):
    """Characters that a Windows terminal lacks don't end it; wrong input does, with status 2 and one line."""
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *argv])
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True))
        runpy.run_path(str(ROOT / "hellaswag.py"), run_name="__main__")

    odd = tmp_path / "odd.jsonl"
    odd.write_text(record(ctx="A \ufffd man \u4e2d boils water. he"))
    run("--model", folder, "--data", str(odd), "--show", "1", "--device", "cpu")
    assert b"1. A ? man ? boils water. he" in sys.stdout.buffer.getvalue()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run("--model", "gpt2", "--data", "nowhere")
    said = capsys.readouterr().err
    assert said.startswith("hellaswag.py: --data says nowhere") and said.count("\n") == 1
    assert sys.stdout.buffer.getvalue() == b""


# ---- real questions, and the harness itself

def test_what_the_comments_say_of_costs(real_data, gpt2_tokenizer):
    """Tokens and operations a question, padded and packed; the standard error of GPT-2's score."""
    padded = packed = targets = 0
    for e in iterate_examples(path=real_data / "hellaswag" / "hellaswag_val_1000.jsonl"):
        context, endings = hellaswag.encode_question(e, gpt2_tokenizer.encode_ordinary)
        row = hellaswag.pack(context, endings, range(4))
        padded += 4 * (len(context) + max(map(len, endings)))
        packed, targets = packed + len(row.tokens), targets + len(row.target)
    assert [round(n / 1000) for n in (padded, packed, targets)] == [198, 88, 64]
    blocks, head = 2 * 12 * (12 * 768 ** 2 + 13 * 768), 2 * 50257 * 768  # operations a token
    assert [round(n / 1e6) for n in (blocks, head)] == [170, 77]
    assert round(padded * (blocks + head) / 1e12) == 49
    assert round((packed * blocks + targets * head) / 1e12) == 20
    p = 0.2955
    assert [round(math.sqrt(p * (1 - p) / n), d) for n, d in ((10042, 4), (100, 3))] == [0.0046, 0.046]


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [512, 96])
def test_the_harness_itself(real_data, tmp_path, block_size):
    """lm-evaluation-harness, pip install "lm-eval[hf]", finds the same accuracies and log p."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("accelerate", reason="lm-eval is installed without its hf extra")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs
    model = tiny_gpt(block_size=block_size)
    model.save_pretrained(tmp_path)
    save_tokenizer(BYTES, tmp_path)
    # an ending that is longer than the model's context is more than the harness can score
    examples = [e for e in iterate_examples(path=real_data / "hellaswag" / "hellaswag_val_1000.jsonl")
                if max(len(" " + ending) for ending in hellaswag.question(e, True)[1]) <= block_size][:100]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in examples))
    task = dict(task="questions", output_type="multiple_choice", process_docs=process_docs,
                dataset_path="json", dataset_kwargs={"data_files": {"validation": str(file)}},
                validation_split="validation", doc_to_text="{{query}}", doc_to_target="{{label}}",
                doc_to_choice="choices", metric_list=[dict(metric="acc"), dict(metric="acc_norm")])
    lm = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=8)
    theirs = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=1000)
    results, found = evaluate(model, examples, BYTES, harness=True), theirs["results"]["questions"]
    assert (results["acc"], results["acc_norm_chars"]) == (found["acc,none"], found["acc_norm,none"])
    assert results["acc_stderr"] == pytest.approx(found["acc_stderr,none"], rel=1e-9)
    sums = torch.tensor([[r[0][0] for r in sample["resps"]] for sample in theirs["samples"]["questions"]])
    ours, _ = score(model, examples, BYTES, harness=True)
    torch.testing.assert_close(ours, sums.double(), rtol=0, atol=5e-3)
