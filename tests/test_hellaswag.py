"""hellaswag.py against plain references: transformers on one ending at a time, cases by hand, the harness."""
import copy
import doctest
import functools
import hashlib
import http.server
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hellaswag
from conftest import ROOT
from fineweb import UserError, load_tokenizer, save_tokenizer
from hellaswag import evaluate, evaluating, iterate_examples, plain_score, render_example, score
from helpers import run_worlds, tiny_model

FIXTURE = Path(__file__).with_name("hellaswag_fixture.jsonl")
DEFAULT = Path("data", "hellaswag", "hellaswag_val.jsonl")
BYTES = load_tokenizer("bytes")
RULES = ("acc", "acc_norm", "acc_norm_chars")


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


def to_transformers(model, folder):
    from transformers import AutoModelForCausalLM
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def reference_log_p(model, context, ending):
    """Sum of log p of an ending's tokens, by a model of transformers: one text, no padding, float64."""
    with torch.no_grad():
        logits = model(torch.tensor([(context + ending)[:-1]])).logits[0, len(context) - 1:].double()
    return sum(row.log_softmax(0)[token].item() for row, token in zip(logits, ending, strict=True))


def reference(model, examples, encode=BYTES.encode_ordinary):
    return torch.tensor([[reference_log_p(model, encode(e["ctx"]), encode(" " + text)) for text in e["endings"]]
                         for e in examples], dtype=torch.float64)


def accuracies(results):
    return {rule: results[rule] for rule in RULES}


def plain_accuracies(sums, examples, encode=BYTES.encode_ordinary):
    """The three accuracies, written out in lists."""
    right = dict.fromkeys(RULES, 0)
    for row, e in zip(sums.tolist(), examples):
        for rule in RULES:
            values = []
            for s, ending in zip(row, e["endings"]):
                unit = {"acc": 1, "acc_norm": len(encode(" " + ending)), "acc_norm_chars": len(ending)}[rule]
                values.append(s / unit)
            right[rule] += values.index(max(values)) == e["label"]
    return {rule: n / len(examples) for rule, n in right.items()}


def watch(monkeypatch, watcher):
    """Call watcher(rows) before each of log_p's forward passes."""
    original = hellaswag.log_p
    monkeypatch.setattr(hellaswag, "log_p", lambda model, rows: watcher(rows) or original(model, rows))


# ---- questions

def test_examples_in_docstrings_are_right():
    result = doctest.testmod(hellaswag)
    assert result.attempted >= 3 and result.failed == 0


def test_the_harness_tidies_text():
    """Worked out by hand from the rules of its tasks/hellaswag/utils.py."""
    for text, tidy in {"a [title] b": "a. b",               # ". " and the space that was there make one
                       "a [step] b [substeps] c": "a b c",
                       " [header] a ": " a",                # trimmed before the bracket goes, not after
                       "a   b    c": "a  b  c",             # pairs of spaces, once
                       "a [x [y] z] b": "a z] b"}.items():  # to the nearest closing bracket
        assert hellaswag.tidy(text) == tidy
    example = {"activity_label": "Ice", "ctx_a": "A man.", "ctx_b": "he And Eve", "endings": ["a [title] b"]}
    assert hellaswag.question(example, harness=True) == ("Ice: A man. He and eve", ["a. b"])


def test_the_harness_cuts_one_string():
    """A tokenizer that merges across the border shows it, as does a context that ends in spaces."""
    def merging(text):
        return list(text.replace("e s", "E").encode())

    example = dict(activity_label="x", ctx_a="she", ctx_b="", ctx="she", endings=["sits", "is"] * 2)
    # "x: she sits" in one piece becomes "x: shEits"; "x: she" is 6 tokens, and after the sixth stands "its"
    for harness, start, want in (True, b"x: she", [b"its", b" is"]), (False, b"she", [b" sits", b" is"]):
        context, endings = hellaswag.encode_question(example, merging, harness)
        assert bytes(context) == start and [bytes(ending) for ending in endings[:2]] == want
    example["ctx_b"] = "[a]"  # tidied: "x: she ", whose space the ending gets besides its own
    context, endings = hellaswag.encode_question(example, lambda text: list(text.encode()), True)
    assert bytes(context) == b"x: she" and [bytes(ending) for ending in endings[:2]] == [b"  sits", b"  is"]


# ---- scores

def test_scores_are_those_of_transformers_and_of_the_plain_way(model, examples, tmp_path):
    sums, counts = score(model, examples, BYTES)
    expected = reference(to_transformers(model, tmp_path), examples)
    torch.testing.assert_close(sums, expected, rtol=0, atol=2e-3)  # sums of -100 to -600
    assert counts.tolist() == [[len((" " + ending).encode()) for ending in e["endings"]] for e in examples]
    for example, ours, n in zip(examples, sums, counts):
        plain, m = plain_score(model, example, BYTES.encode_ordinary)
        torch.testing.assert_close(plain.double(), ours, rtol=0, atol=1e-3)
        assert m.tolist() == n.tolist()
        data, tokens, mask, label = render_example(example, BYTES.encode_ordinary)
        assert label == data["label"] == example["label"]
        for row, chosen, ending in zip(tokens, mask.bool(), data["ending_tokens"], strict=True):
            assert row[chosen].tolist() == ending and row[:mask[0].argmax()].tolist() == data["ctx_tokens"]
    found = accuracies(evaluate(model, examples, BYTES))
    assert found == plain_accuracies(expected, examples)
    assert len(set(found.values())) > 1, "the fixture should tell the rules apart"


def test_batches_are_full_and_their_order_does_not_matter(model, examples, monkeypatch):
    """A context is read once, then the endings but for their last tokens; long rows go first."""
    batches = []
    watch(monkeypatch, batches.append)
    expected, counts = score(model, examples, BYTES, max_tokens=1500)
    # bytes: an ending has one token more than bytes, the space before it, and one fewer is read
    lengths = [len((e["ctx"] + "".join(e["endings"])).encode()) for e in examples]
    assert [len(row.tokens) for rows in batches for row in rows] == sorted(lengths, reverse=True)
    assert 1 < len(batches) < 12 and all(len(rows) * len(rows[0].tokens) <= 1500 for rows in batches)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    sums, n = score(model, [examples[i] for i in order], BYTES, max_tokens=1)
    torch.testing.assert_close(sums, expected[order], rtol=1e-6, atol=1e-4)
    assert torch.equal(n, counts[order])


def test_only_the_endings_are_projected_to_the_vocabulary(model, examples):
    """And never many at once: the logits of whole rows would be 200 times the size of their hidden states."""
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    _, counts = score(model, examples, BYTES, max_tokens=100_000)
    hook.remove()
    assert sum(seen) == counts.sum().item() and max(seen) <= 512


@pytest.mark.parametrize("block_size", [24, 150])
def test_long_contexts_lose_their_beginning(examples, tmp_path, block_size):
    """As in the harness: the last block_size + 1 tokens of context and ending, the last of them not read."""
    model = tiny_gpt(block_size=block_size)
    theirs, encode = to_transformers(model, tmp_path), BYTES.encode_ordinary
    sums, counts = score(model, examples, BYTES)
    for e, row, n in zip(examples, sums.tolist(), counts.tolist()):
        for ending, ours, length in zip(e["endings"], row, n):
            text = (encode(e["ctx"]) + encode(" " + ending))[-(block_size + 1):]
            scored = min(len(encode(" " + ending)), block_size)  # longer endings lose their own beginning
            assert length == scored
            assert abs(reference_log_p(theirs, text[:-scored], text[-scored:]) - ours) < 2e-3


def test_a_question_that_just_fits_is_one_row():
    """Of contexts and endings all but the last tokens are read: 3 + 0 + 2 of them here."""
    for block_size, rows in (5, 1), (4, 2):
        found = hellaswag.rows_of([7, 8, 9], [[1], [2, 3, 4]], [0, 1], block_size)
        assert len(found) == rows and all(len(row.tokens) <= block_size for row in found)


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


def test_the_device_is_read_once_and_float64_begins_on_the_cpu(model, examples, monkeypatch):
    """A number that is read after every batch makes a GPU wait for Python. And a Mac's GPU has no float64, so here
    double() fails on what has not been to cpu()."""
    cpu, double, home, batches, dtypes = torch.Tensor.cpu, torch.Tensor.double, [], [], []

    def to_double(self):
        assert any(self is t for _, t in home) or not self.is_floating_point(), "double() on the device"
        return double(self)

    watch(monkeypatch, batches.append)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: home.append((len(batches), cpu(self))) or home[-1][1])
    monkeypatch.setattr(torch.Tensor, "double", to_double)
    evaluate(model, examples[:2], BYTES, all_reduce=lambda t: dtypes.append(t.dtype))
    assert home and dtypes == [torch.float32]
    home.clear(), batches.clear()
    for name in ("item", "tolist", "numpy", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("a number is read"))
    score(model, examples, BYTES, max_tokens=1)
    assert [count for count, _ in home] == [12] and len(batches) == 12


@pytest.mark.parametrize("kind", ["written out", "another mask", "not causal", "half written out", "without wpe"])
def test_models_that_cannot_read_packed_rows_fail(examples, kind):
    """A fork's own attention or positions can't be replaced: an error, where the score would be wrong."""
    def forward(self, x):
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.c_attn(x).split(32, dim=2))
        past = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril()
        if "written out" in kind:
            att = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
            y = att.masked_fill(~past, -math.inf).softmax(3) @ v
        else:
            y = scaled_dot_product_attention(q, k, v, attn_mask=past if kind == "another mask" else None)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    model = tiny_gpt()
    if kind == "without wpe":
        wpe = model.transformer.wpe
        wpe.forward = lambda pos: wpe.weight[pos]
    else:
        for block in list(model.transformer.h)[kind == "half written out":]:
            block.attn.forward = forward.__get__(block.attn)
    with pytest.raises(AssertionError, match="can't read packed rows"):
        score(model, examples[:2], BYTES)


def test_evaluating_keeps_every_mode_and_no_gradient(examples, monkeypatch):
    model, inside = tiny_gpt().train(), []
    model.transformer.h[1].eval()  # frozen, say
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    watch(monkeypatch, lambda rows: inside.append((model.training, torch.is_grad_enabled())))
    evaluate(model, iter(examples[:2]), BYTES)
    assert set(inside) == {(False, False)} and [module.training for module in model.modules()] == modes


# ---- evaluate

def test_the_three_rules_by_hand():
    """Sums, tokens and characters chosen so that each rule picks another ending."""
    total = torch.tensor([[-2.0, -9.0, -12.0, -40.0]], dtype=torch.float64)
    count = torch.tensor([[1.0, 6.0, 2.0, 5.0]], dtype=torch.float64)
    example = {"ctx": "", "endings": ["x", "x" * 9, "x" * 20, "x" * 9]}
    # sums: -2 is the highest; per token: -2, -1.5, -6, -8; per character: -2, -1, -0.6, -4.4
    assert [pick.tolist() for pick in hellaswag.picks(total, count, [example])] == [[0], [1], [2]]
    # The harness counts characters after its clean-up: -9/12 is more than -9/10, -9/6 is less.
    total = torch.tensor([[-9.0, -9.0, -90.0, -90.0]], dtype=torch.float64)
    example = dict(ctx="", activity_label="", ctx_a="", ctx_b="", endings=["[step] xxxxx", "x" * 10, "x", "x"])
    assert [hellaswag.picks(total, count, [example], harness)[2].item() for harness in (False, True)] == [0, 1]


def test_accuracy_and_standard_error(model, examples, monkeypatch):
    """Of 12 questions 3 are right: 0.25 +- the deviation of the twelve 0s and 1s over the root of 12."""
    labels = torch.tensor([e["label"] for e in examples])
    wrong = (labels + torch.tensor([0] * 3 + [1] * 9)) % 4
    with monkeypatch.context() as patch:
        patch.setattr(hellaswag, "picks", lambda *args: [labels, wrong, (labels + 1) % 4])
        results = evaluate(model, examples, BYTES)
    answers = torch.tensor([1.0] * 3 + [0.0] * 9, dtype=torch.float64)
    assert results.pop("examples_per_second") > 0
    assert results == dict(n=12, acc=1, acc_stderr=0, acc_norm_chars=0, acc_norm_chars_stderr=0, acc_norm=0.25,
                           acc_norm_stderr=pytest.approx((answers.std() / math.sqrt(12)).item(), rel=1e-12))
    assert math.isnan(evaluate(model, examples[:1], BYTES)["acc_stderr"])


@pytest.mark.parametrize("size, in_place", [(3, True), (13, False)])
def test_any_number_of_processes(model, examples, size, in_place):
    """Of 13 processes for 12 questions, the last one has none."""
    def one(world, mine):
        def all_reduce(t):
            total = world.sum(t)
            if not in_place:
                return total
            t.copy_(total)

        return evaluate(mine, examples, BYTES, rank=world.rank, world_size=size, all_reduce=all_reduce)

    whole = evaluate(model, examples, BYTES)
    for results in run_worlds(size, one, model):
        assert {**results, "examples_per_second": 0} == {**whole, "examples_per_second": 0}


def test_what_evaluate_refuses(model, examples):
    with pytest.raises(UserError, match="no HellaSwag questions"):
        evaluate(model, [], BYTES)
    with pytest.raises(UserError, match="the tokenizer has 257 ids, the model knows 256"):
        evaluate(tiny_gpt(n_vocab=256), examples, BYTES)


# ---- the file

def record(**changes):
    example = {"ind": 1, "activity_label": "Tea", "ctx_a": "A man boils water.", "ctx_b": "he",
               "ctx": "A man boils water. he", "endings": ["flies.", "is tea.", "pours it on.", "sells it."],
               "label": 2, "split": "val", "split_type": "indomain", "source_id": "made~0"}
    example.update(changes)
    return json.dumps({key: value for key, value in example.items() if value is not None})


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
    assert len(examples) == 12 and {len(e) for e in examples} == {10}
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
    with pytest.raises(UserError, match="--data says nowhere"):
        hellaswag.find_data("nowhere")


def plain_sha256(records):
    """Of what is scored, written out once more."""
    content = hashlib.sha256()
    for e in records:
        content.update(json.dumps([e["ctx"], e["endings"], int(e["label"])]).encode() + b"\n")
    return content.hexdigest()


def test_what_is_scored_is_checked(elsewhere, monkeypatch, examples):
    """Our own copy must hold the published questions in their order; a file that the user names may hold any."""
    assert hellaswag.SHA256 == "148f8efb84d40214a08c6a1dd0702f980d326148811411b4b5316e397b9b2fc6"
    monkeypatch.setattr(hellaswag, "SHA256", plain_sha256(examples))
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


def parquet(records):
    """The bytes of a file like the hub's, where labels are texts."""
    import pyarrow
    import pyarrow.parquet
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**e, "label": str(e["label"])} for e in records]), out)
    return out.getvalue()


ON_THE_HUB = "datasets/Rowan/hellaswag/resolve/main/data/validation-00000-of-00001.parquet"
READER = """
import sys, hellaswag
hellaswag.SHA256 = sys.argv[1]
for _ in sys.stdin:
    try:
        print(len(list(hellaswag.iterate_examples())), flush=True)
    except hellaswag.UserError as error:
        print(error, flush=True)
"""


class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves a folder of this machine as the hub does."""

    asked = []

    def end_headers(self):
        version = hashlib.sha1(Path(self.directory, ON_THE_HUB).read_bytes()).hexdigest()
        self.send_header("ETag", f'"{version}"')
        self.send_header("X-Repo-Commit", version)
        super().end_headers()

    def log_message(self, *words):
        self.asked.append(words)


def test_the_hub_has_the_questions(elsewhere, examples):
    """They are fetched once. Other questions, a broken file, and a network that does not answer, which the library by
    itself would ask for long, are one line and leave no file."""
    site, good = elsewhere / "site", parquet(examples)
    for path, content in (ON_THE_HUB, b""), ("api/datasets/Rowan/hellaswag", b'{"id": "Rowan/hellaswag", "sha": "1"}'):
        (site / path).parent.mkdir(parents=True)
        (site / path).write_bytes(content)
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=site))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    # A fresh process, since the library looks for the hub's address when it starts. It reads once for each line.
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(elsewhere / "home"), "HF_HUB_OFFLINE": "0",
                        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "NO_PROXY": "127.0.0.1"}
    with hub, subprocess.Popen([sys.executable, "-c", READER, plain_sha256(examples)], env=env, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        def read(content):
            (site / ON_THE_HUB).write_bytes(content)
            print(file=reader.stdin, flush=True)
            return reader.stdout.readline().rstrip("\n")

        for bad in parquet(examples[:11]), good[:1000]:
            assert re.fullmatch("HellaSwag can't be fetched .*: bring data.hellaswag.hellaswag_val.jsonl .*", read(bad))
            assert not DEFAULT.parent.exists()
        assert read(good) == "12" and [path.name for path in DEFAULT.parent.iterdir()] == [DEFAULT.name]
        assert [json.loads(line) for line in DEFAULT.read_text().splitlines()] == examples  # with numbers as labels
        asked = len(Hub.asked)
        assert asked and read(good) == "12" and len(Hub.asked) == asked
        DEFAULT.unlink()
        hub.shutdown()
        hub.server_close()
        assert "refused" in read(good) and not DEFAULT.exists()


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
    assert "12 questions:" in out and f"{folder}, float32 on cpu" in out
    for rule in RULES:
        assert f"  {rule:14s}  {expected[rule]:.4f} +- {expected[rule + '_stderr']:.4f}  " in out
    results = hellaswag.main([*argv, "--limit", "5", "--show", "3", "--harness"])
    assert accuracies(results) == accuracies(evaluate(model, examples[:5], BYTES, harness=True))
    out = capsys.readouterr().out
    assert "5 questions, by the rules of the harness" in out and "\n4. " not in out
    sums, counts = score(model, examples[:3], BYTES, harness=True)
    for number, (e, losses) in enumerate(zip(examples, (-sums / counts).tolist()), start=1):
        context, endings = hellaswag.question(e, harness=True)
        assert f"{number}. {context}\n" in out
        for j, (ending, loss) in enumerate(zip(endings, losses)):
            mark = (">" if loss == min(losses) else " ") + ("*" if j == e["label"] else " ")
            assert f"  {mark} {loss:6.3f}  {ending}\n" in out


def test_wrong_input_is_one_line(folder, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(record() + "\n" + record(label=7))
    model, data = ["--model", folder], ["--data", str(FIXTURE)]
    for argv, message in [
        (data, "--model"),
        ([*model, *data, "--fast"], "--fast"),
        ([*model, *data, "--limit", "0"], "--limit and --max_tokens must be at least 1"),
        ([*model, *data, "--max_tokens", "0"], "--max_tokens must be at least 1"),
        ([*model, *data, "--show", "-1"], "--show at least 0"),
        ([*model, *data, "--dtype", "int8"], "--dtype"),
        ([*model, "--data", str(broken)], f"{broken}, line 2: not a question"),
        ([*model, "--data", "nowhere"], "--data says nowhere"),
        (["--model", str(tmp_path), *data], tmp_path.name),
    ]:
        with pytest.raises(UserError) as error:
            hellaswag.main(argv)
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

def test_real_questions(real_data, gpt2_tokenizer, tmp_path):
    """20 of the validation set with GPT-2's tokenizer, against the plain reference; all 1,000 are read."""
    examples = list(iterate_examples(path=real_data / "hellaswag" / "hellaswag_val_1000.jsonl"))
    assert len(examples) == 1000 and {len(e) for e in examples} == {10}
    model, encode = tiny_gpt(vocab_size=50304, n_vocab=50257), gpt2_tokenizer.encode_ordinary
    some = examples[:10] + examples[-10:]  # ActivityNet's and WikiHow's
    expected = reference(to_transformers(model, tmp_path), some, encode)
    torch.testing.assert_close(score(model, some)[0], expected, rtol=0, atol=2e-3)
    assert accuracies(evaluate(model, some, gpt2_tokenizer)) == plain_accuracies(expected, some, encode)


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
def test_the_harness_itself(tmp_path, block_size):
    """lm-evaluation-harness, pip install "lm-eval[hf]", finds the same accuracies and log p."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("accelerate", reason="lm-eval is installed without its hf extra")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs
    model = tiny_gpt(block_size=block_size)
    model.save_pretrained(tmp_path)
    save_tokenizer(BYTES, tmp_path)
    real = os.environ.get("GPT2_TEST_DATA")
    data = Path(real).resolve() / "hellaswag" / "hellaswag_val_1000.jsonl" if real else FIXTURE
    # an ending that is longer than the model's context is more than the harness can score
    examples = [e for e in iterate_examples(path=data)
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
