"""hellaswag.py against plain references: transformers on one ending at a time, cases by hand, the harness."""
import doctest
import hashlib
import http.server
import json
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import hellaswag
from conftest import ROOT
from fineweb import UserError, load_tokenizer, save_tokenizer
from hellaswag import evaluate, iterate_examples, render_example, score
from helpers import shake, tiny_model

FIXTURE = Path(__file__).with_name("hellaswag_fixture.jsonl")
BYTES = load_tokenizer("bytes")
RULES = ("acc", "acc_norm", "acc_norm_chars")


@pytest.fixture(scope="module")
def examples():
    return list(iterate_examples(path=FIXTURE))


def tiny_gpt(block_size=512, vocab_size=257):
    return tiny_model(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def model():
    return tiny_gpt()


def to_transformers(model, folder):
    from transformers import AutoModelForCausalLM
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def plain_log_p(model, context, ending):
    """Sum of log p of an ending's tokens, by a model of transformers: one text, no padding, float64."""
    with torch.no_grad():
        logits = model(torch.tensor([(context + ending)[:-1]])).logits[0, len(context) - 1:].double()
    return sum(row.log_softmax(0)[token].item() for row, token in zip(logits, ending, strict=True))


def accuracies(results):
    return {rule: results[rule] for rule in RULES}


def plain_score(model, examples, encode=BYTES.encode_ordinary):
    return torch.tensor([[plain_log_p(model, encode(e["ctx"]), encode(" " + text)) for text in e["endings"]]
                         for e in examples], dtype=torch.float64)


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


# ------------------------------------------------------------------------------------------------------------
# questions

def test_worked_examples_in_docstrings_hold():
    result = doctest.testmod(hellaswag)
    assert result.attempted >= 6 and result.failed == 0


def test_render_example_by_hand():
    words = {}

    def encode(text):
        return [words.setdefault(word, len(words) + 1) for word in text.split(" ")]

    example = {"ctx": "the cat", "endings": ["sat", "ate the fish", "cat", "ran off"], "label": 1}
    data, tokens, mask, label = render_example(example, encode)
    # " sat" is split at its space, too: an empty word, 3, and sat, 4
    assert tokens.tolist() == [[1, 2, 3, 4, 0, 0], [1, 2, 3, 5, 1, 6], [1, 2, 3, 2, 0, 0], [1, 2, 3, 7, 8, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert tokens.dtype == mask.dtype == torch.long and label == 1
    endings = [[3, 4], [3, 5, 1, 6], [3, 2], [3, 7, 8]]
    assert data == {"label": 1, "ctx_tokens": [1, 2], "ending_tokens": endings}


def test_render_example_with_gpt2_tokens(gpt2_tokenizer, examples):
    """Where the mask is 1 stands the ending with the space before it, and nothing else."""
    for example in examples:
        data, tokens, mask, label = render_example(example)
        assert label == example["label"]
        for row, m, ending in zip(tokens, mask, example["endings"]):
            assert gpt2_tokenizer.decode(row[m == 1].tolist()) == " " + ending
            assert gpt2_tokenizer.decode(row[:m.nonzero()[0]].tolist()) == example["ctx"]
            assert row[m.nonzero()[-1] + 1:].eq(0).all()


def test_render_example_scored_the_usual_way_gives_our_sums(model, examples):
    """Four padded rows a forward, all logits, the shifted mask: what the scripts of this family do."""
    for example, ours in zip(examples, score(model, examples, BYTES)[0]):
        _, tokens, mask, _ = render_example(example, BYTES.encode_ordinary)
        with torch.no_grad():
            logits, _ = model(tokens)
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(),
                                                   reduction="none").view(4, -1)
        torch.testing.assert_close(-(losses * mask[:, 1:]).sum(1).double(), ours, rtol=1e-5, atol=1e-4)


def test_the_harness_tidies_text():
    """Expected strings worked out by hand from the rules of its tasks/hellaswag/utils.py."""
    assert hellaswag.tidy("a [title] b") == "a. b"          # ". " and the space that was there make one
    assert hellaswag.tidy("a [step] b [substeps] c") == "a b c"
    assert hellaswag.tidy(" [header] a ") == " a"           # trimmed before the bracket goes, not after
    assert hellaswag.tidy("a   b    c") == "a  b  c"        # pairs of spaces, once
    assert hellaswag.tidy("a [x [y] z] b") == "a z] b"      # to the nearest closing bracket
    example = {"activity_label": "Ice", "ctx_a": "A man.", "ctx_b": "he And Eve", "endings": ["a [title] b"]}
    assert hellaswag.question(example, harness=True) == ("Ice: A man. He and eve", ["a. b"])


def test_the_harness_cuts_one_string():
    """A tokenizer that merges across the border shows it, as does a context that ends in spaces."""
    def merging(text):
        return list(text.replace("e s", "E").encode())

    example = dict(activity_label="x", ctx_a="she", ctx_b="", ctx="she", endings=["sits", "is"] * 2)
    # "x: she sits" in one piece becomes "x: shEits"; "x: she" is 6 tokens, and behind the sixth stands "its"
    context, endings = hellaswag.encode_question(example, merging, harness=True)
    assert bytes(context) == b"x: she" and [bytes(e) for e in endings[:2]] == [b"its", b" is"]
    context, endings = hellaswag.encode_question(example, merging)
    assert bytes(context) == b"she" and [bytes(e) for e in endings[:2]] == [b" sits", b" is"]
    example["ctx_b"] = "[a]"  # tidied: "x: she ", whose space the ending gets besides its own
    for prefix in [], [1]:
        context, endings = hellaswag.encode_question(example, lambda text: list(text.encode()), True, prefix)
        assert bytes(context) == bytes(prefix) + b"x: she"
        assert [bytes(e) for e in endings[:2]] == [b"  sits", b"  is"]


# ------------------------------------------------------------------------------------------------------------
# scores

def test_scores_are_those_of_a_plain_reference(model, examples, tmp_path):
    sums, counts = score(model, examples, BYTES)
    expected = plain_score(to_transformers(model, tmp_path), examples)
    torch.testing.assert_close(sums, expected, rtol=0, atol=2e-3)  # sums of -100 to -600
    assert counts.tolist() == [[len((" " + ending).encode()) for ending in e["endings"]] for e in examples]
    found = accuracies(evaluate(model, examples, BYTES))
    assert found == plain_accuracies(expected, examples)
    assert len(set(found.values())) > 1, "the fixture should tell the rules apart"


def test_packed_or_not_any_batch_any_order(model, examples):
    expected, counts = score(model, examples, BYTES)
    for options in (dict(packed=False), dict(packed=True, max_tokens=1), dict(max_tokens=100_000),
                    dict(packed=False, max_tokens=1)):
        sums, n = score(model, examples, BYTES, **options)
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-4)
        assert torch.equal(n, counts)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
    sums, _ = score(model, [examples[i] for i in order], BYTES)
    torch.testing.assert_close(sums, expected[order], rtol=1e-6, atol=1e-4)


def test_only_the_endings_are_projected_to_the_vocabulary(model, examples):
    """And never many at once: the logits of whole rows would be 200 times the size of their hidden states."""
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    _, counts = score(model, examples, BYTES, packed=True, max_tokens=100_000)
    hook.remove()
    assert sum(seen) == counts.sum().item() and max(seen) <= 512


def test_what_packing_saves(model, examples, monkeypatch):
    """A context is read once, behind it the endings but for their last tokens; long rows go first."""
    original, rows = hellaswag.log_p, []
    monkeypatch.setattr(hellaswag, "log_p", lambda m, some, p: rows.extend(some) or original(m, some, p))
    score(model, examples, BYTES, packed=True)
    # bytes: an ending has one token more than bytes, the space before it, and one fewer is read
    expected = [len((e["ctx"] + "".join(e["endings"])).encode()) for e in examples]
    assert [len(row.tokens) for row in rows] == sorted(expected, reverse=True)


def test_packing_is_used_where_it_can_be(model, examples, monkeypatch):
    """Our model passes the trial, and a question that just fits is one row: its last tokens are not read."""
    log_p, used = hellaswag.log_p, []
    monkeypatch.setattr(hellaswag, "log_p", lambda m, rows, p: used.append(p) or log_p(m, rows, p))
    score(model, examples[:2], BYTES)
    assert used == [False] * 4 + [True] * 2  # four endings by themselves, their row, and then all of it
    for block_size, rows in (5, 1), (4, 2):
        assert len(hellaswag.rows_of([7, 8, 9], [[1], [2, 3, 4]], [0, 1], block_size)) == rows


@pytest.mark.parametrize("block_size", [24, 64, 150])
def test_long_contexts_lose_their_beginning(examples, tmp_path, block_size):
    """As in the harness: the last block_size + 1 tokens of context and ending, the last of them not read."""
    model = tiny_gpt(block_size=block_size)
    reference = to_transformers(model, tmp_path)
    encode = BYTES.encode_ordinary
    sums, counts = score(model, examples, BYTES)
    for e, row, n in zip(examples, sums.tolist(), counts.tolist()):
        for ending, ours, length in zip(e["endings"], row, n):
            text = (encode(e["ctx"]) + encode(" " + ending))[-(block_size + 1):]
            scored = min(len(encode(" " + ending)), block_size)  # longer endings lose their own beginning
            assert length == scored
            assert abs(plain_log_p(reference, text[:-scored], text[-scored:]) - ours) < 2e-3


def test_bfloat16_rounds_and_no_more(model, examples):
    exact, _ = score(model, examples, BYTES)
    rounded, counts = score(model, examples, BYTES, dtype=torch.bfloat16)
    error = ((rounded - exact) / counts).abs()
    assert 0 < error.mean() < 0.05  # nats per token
    # a loss rounded to 8 bits would be a multiple of 1/32 (it's below 8): the sums are not
    assert (rounded * 32).frac().abs().gt(1e-3).float().mean() > 0.5


def test_a_model_in_bfloat16(examples):
    exact, _ = score(tiny_gpt(), examples, BYTES)
    rounded, counts = score(tiny_gpt().to(torch.bfloat16), examples, BYTES)
    assert 0 < ((rounded - exact) / counts).abs().mean() < 0.1


def test_fewer_rows_at_a_time_when_memory_is_short(model, examples, monkeypatch):
    expected, _ = score(model, examples, BYTES)
    original, sizes = hellaswag.log_p, []

    def small(model, rows, packed):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("pretended")
        return original(model, rows, packed)

    monkeypatch.setattr(hellaswag, "log_p", small)
    sums, _ = score(model, examples, BYTES, packed=True, max_tokens=100_000)
    assert sizes[:3] == [12, 6, 3] and sum(size for size in sizes if size <= 3) == 12
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-4)

    def none(model, rows, packed):
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(hellaswag, "log_p", none)
    with pytest.raises(UserError, match="memory can't hold one question"):
        score(model, examples, BYTES, packed=True)


# ------------------------------------------------------------------------------------------------------------
# other architectures: those that can be packed, and those that must not be

def hub_model(kind, **config):
    import transformers
    name, shape = {
        "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=2, n_positions=512)),
        "llama": ("Llama", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                num_attention_heads=2, num_key_value_heads=1)),
        "mistral": ("Mistral", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                    num_attention_heads=2, num_key_value_heads=1, head_dim=16)),
        "gpt_neox": ("GPTNeoX", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=2)),
        "opt": ("OPT", dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                            word_embed_proj_dim=32, max_position_embeddings=512)),
        "bloom": ("Bloom", dict(hidden_size=32, n_layer=2, n_head=2)),
        "gemma2": ("Gemma2", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                  final_logit_softcapping=1.0)),
        "mamba": ("Mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=4)),
    }[kind]
    torch.manual_seed(0)
    tokens = dict(vocab_size=257, bos_token_id=256, eos_token_id=256, pad_token_id=256)
    config = getattr(transformers, name + "Config")(**tokens | shape | config)
    return shake(transformers.AutoModelForCausalLM.from_config(config), 0.1).eval()


@pytest.mark.parametrize("kind, packed, config", [
    ("gpt2", True, {}),
    ("gpt2", True, {"attn_implementation": "eager"}),
    ("llama", True, {}),
    ("llama", True, {"attn_implementation": "eager"}),
    ("mistral", True, {}),
    ("gpt_neox", True, {}),
    ("opt", None, {}),                      # None: either way is fine, if the numbers are right
    ("mistral", None, {"sliding_window": 16}),
    ("bloom", False, {}),                   # ALiBi: positions are counted in the row
    ("gemma2", False, {}),                  # the logits are bent after the projection
    ("mamba", False, {}),                   # no attention, nothing to mask
])
def test_other_architectures(examples, monkeypatch, kind, packed, config):
    """The sums are those of one ending at a time whatever the architecture; where it can be packed, it is."""
    model = hub_model(kind, **config)
    original, used = hellaswag.log_p, []
    monkeypatch.setattr(hellaswag, "log_p", lambda m, r, p: used.append(p) or original(m, r, p))
    some = examples[:4]
    sums, _ = score(model, some, BYTES)
    torch.testing.assert_close(sums, plain_score(model, some), rtol=0, atol=5e-3)
    assert packed is None or used[-1] is packed


def test_dropout_is_off_and_modes_are_kept(examples):
    model = hub_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected, _ = score(model, examples[:4], BYTES)
    model.train()
    model.transformer.h[1].eval()  # frozen, say
    modes = [module.training for module in model.modules()]
    sums, _ = score(model, examples[:4], BYTES)
    assert torch.equal(sums, expected) and [module.training for module in model.modules()] == modes


def test_modes_are_kept_when_scoring_fails(examples, monkeypatch):
    model = tiny_gpt().train()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(hellaswag, "log_p", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, examples, BYTES)
    assert model.training and all(module.training for module in model.modules())


def test_no_gradient_is_kept(model, examples, monkeypatch):
    log_p, on = hellaswag.log_p, []
    monkeypatch.setattr(hellaswag, "log_p", lambda *args: on.append(torch.is_grad_enabled()) or log_p(*args))
    evaluate(model, examples[:2], BYTES)
    assert on and not any(on) and all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------
# evaluate

def test_the_three_rules_by_hand():
    """Sums, tokens and characters chosen so that each rule picks another ending."""
    total = torch.tensor([[-2.0, -9.0, -12.0, -40.0]], dtype=torch.float64)
    count = torch.tensor([[1.0, 6.0, 2.0, 5.0]], dtype=torch.float64)
    example = {"ctx": "", "endings": ["x", "x" * 9, "x" * 20, "x" * 9]}
    # sums: -2 is the highest; per token: -2, -1.5, -6, -8; per character: -2, -1, -0.6, -4.4
    assert [pick.tolist() for pick in hellaswag.picks(total, count, [example])] == [[0], [1], [2]]


def test_characters_are_counted_after_the_clean_up():
    total = torch.tensor([[-8.0, -5.0, -90.0, -90.0]], dtype=torch.float64)
    example = dict(ctx="", activity_label="", ctx_a="", ctx_b="", endings=["[step] xxxxx", "xxxx", "a", "b"])
    count = torch.ones(1, 4)
    assert hellaswag.picks(total, count, [example])[2].item() == 0        # -8/12 against -5/4
    assert hellaswag.picks(total, count, [example], True)[2].item() == 1  # -8/6, a space stays, against -5/4


def test_accuracy_and_standard_error(model, examples, monkeypatch):
    """Of 12 questions 3 are right: 0.25 +- the deviation of the twelve 0s and 1s over the root of 12."""
    labels = torch.tensor([e["label"] for e in examples])
    wrong = (labels + torch.tensor([0] * 3 + [1] * 9)) % 4
    monkeypatch.setattr(hellaswag, "picks", lambda *args: [labels, wrong, (labels + 1) % 4])
    results = evaluate(model, examples, BYTES)
    answers = torch.tensor([1.0] * 3 + [0.0] * 9, dtype=torch.float64)
    assert (results["acc"], results["acc_norm"], results["acc_norm_chars"]) == (1, 0.25, 0)
    assert results["acc_norm_stderr"] == pytest.approx((answers.std() / math.sqrt(12)).item(), rel=1e-12)
    assert results["acc_stderr"] == results["acc_norm_chars_stderr"] == 0
    assert results["n"] == 12 and results["examples_per_second"] > 0
    assert set(results) == {"n", "examples_per_second", *RULES, *(rule + "_stderr" for rule in RULES)}
    monkeypatch.undo()
    assert math.isnan(evaluate(model, examples[:1], BYTES)["acc_stderr"])


@pytest.mark.parametrize("world_size", [2, 3, 13])
@pytest.mark.parametrize("in_place", [True, False])
def test_any_number_of_processes(model, examples, world_size, in_place):
    """Processes played one after the other: the first round collects sums, the second hands out the total."""
    whole = evaluate(model, examples, BYTES)
    parts = []
    for rank in range(world_size):
        evaluate(model, examples, BYTES, rank=rank, world_size=world_size,
                 all_reduce=lambda t: parts.append(t.clone()) or torch.ones(4))
    assert all(part.dtype == torch.float64 for part in parts) and len(parts) == world_size
    total = torch.stack(parts).sum(0)

    def all_reduce(t):
        t.copy_(total if in_place else t)
        return None if in_place else total

    for rank in (0, world_size - 1):  # with 13 processes for 12 questions, the last one has none
        results = evaluate(model, examples, BYTES, rank=rank, world_size=world_size, all_reduce=all_reduce)
        assert {k: v for k, v in results.items() if k != "examples_per_second"} == \
               {k: v for k, v in whole.items() if k != "examples_per_second"}


def worker(rank, world_size, port, queue):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results = evaluate(tiny_gpt(), list(iterate_examples(path=FIXTURE))[:2], BYTES, rank=rank,
                       world_size=world_size, all_reduce=dist.all_reduce)
    queue.put((rank, results["n"], accuracies(results)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_three_real_processes_two_questions(examples):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(rank, 3, port, queue)) for rank in range(3)]
    for process in processes:
        process.start()
    found = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    expected = accuracies(evaluate(tiny_gpt(), examples[:2], BYTES))
    assert found == [(rank, 2, expected) for rank in range(3)]


def test_what_evaluate_refuses(model, examples):
    with pytest.raises(UserError, match="no HellaSwag questions"):
        evaluate(model, [], BYTES)
    highest = max("".join(ending for e in examples for ending in e["endings"]).encode())
    with pytest.raises(UserError, match=f"has a token {highest}, the model knows {highest} ids"):
        evaluate(tiny_gpt(vocab_size=highest), examples, BYTES)
    evaluate(tiny_gpt(vocab_size=highest + 1), examples, BYTES)


def test_examples_may_be_an_iterator(model, examples):
    found = evaluate(model, iterate_examples(path=FIXTURE), BYTES)
    assert found["n"] == 12 and accuracies(found) == accuracies(evaluate(model, examples, BYTES))


# ------------------------------------------------------------------------------------------------------------
# the file

def record(**changes):
    example = {"ind": 1, "activity_label": "Tea", "ctx_a": "A man boils water.", "ctx_b": "he",
               "ctx": "A man boils water. he", "endings": ["flies.", "is tea.", "pours it on.", "sells it."],
               "label": 2, "split": "val", "split_type": "indomain", "source_id": "made~0"}
    example.update(changes)
    return json.dumps({key: value for key, value in example.items() if value is not None})


@pytest.mark.parametrize("line, fault", [
    ("{'label': 1}", "this is not JSON"),
    (record()[:-1], "this is not JSON"),
    (record().encode("utf-16"), "this is not JSON"),
    (b'{"ctx": "caf\xe9"}', "this is not JSON"),
    ("[1, 2]", "not a record"),
    ("3", "not a record"),
    (record(ctx=None), "no text under 'ctx'"),
    (record(ctx_a=None), "no text under 'ctx_a'"),
    (record(ctx_b=None), "no text under 'ctx_b'"),
    (record(activity_label=None), "no text under 'activity_label'"),
    (record(ctx_b=7), "no text under 'ctx_b'"),
    (record(ctx="  "), "ctx is empty"),
    (record(endings=None), "no list under 'endings'"),
    (record(endings="abcd"), "no list under 'endings'"),
    (record(endings=["a", "b", "c"]), "endings: 3, not 4"),
    (record(endings=list("abcde")), "endings: 5, not 4"),
    (record(endings=["a", "b", "c", 4]), "an ending is empty or not a text"),
    (record(endings=["a", "b", "", "d"]), "an ending is empty or not a text"),
    (record(label=None), "label: None, not 0, 1, 2 or 3"),
    (record(label=7), "label: 7, not 0, 1, 2 or 3"),
    (record(label=-1), "label: -1, not"),
    (record(label=1.5), "label: 1.5, not"),
    (record(label=True), "label: True, not"),
    (record(label=""), "label: '', not"),
])
def test_bad_records_are_named_by_file_and_line(tmp_path, line, fault):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\n".join([record().encode(), b"", line if isinstance(line, bytes) else line.encode()]))
    found = iterate_examples(path=path)
    assert next(found)["label"] == 2
    with pytest.raises(UserError) as error:
        next(found)
    assert str(error.value).startswith(f"{path}, line 3: {fault}") and "\n" not in str(error.value)


def test_good_records_are_yielded_as_they_are(tmp_path, examples):
    assert len(examples) == 12 and {len(e) for e in examples} == {10}
    assert examples == [json.loads(line) for line in FIXTURE.read_text("utf-8").splitlines()]
    path = tmp_path / "text_label.jsonl"
    path.write_text(record(label="3") + "\n\n")
    assert [e["label"] for e in iterate_examples(path=path)] == [3]
    path.write_text(record(), encoding="utf-8-sig")  # as some editors save it
    assert [e["label"] for e in iterate_examples(path=path)] == [2]
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no records"):
        list(iterate_examples(path=path))


def test_where_the_file_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "download", lambda file, split: Path(file).write_text("downloaded"))
    monkeypatch.delenv("HELLASWAG_DIR", raising=False)
    (tmp_path / "data" / "hellaswag").mkdir(parents=True)
    default = Path("data", "hellaswag", "hellaswag_val.jsonl")
    assert hellaswag.find_data() == default and default.read_text() == "downloaded"
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "hellaswag_val.jsonl").write_text(record())
    (b / "hellaswag_train.jsonl").write_text(record())
    monkeypatch.setenv("HELLASWAG_DIR", str(a))
    assert hellaswag.find_data() == a / "hellaswag_val.jsonl"
    assert hellaswag.find_data(b) == b / "hellaswag_val.jsonl"  # what is asked for comes first
    assert hellaswag.find_data(b / "hellaswag_val.jsonl") == b / "hellaswag_val.jsonl"
    assert hellaswag.find_data(b, "train") == b / "hellaswag_train.jsonl"
    with pytest.raises(UserError, match="HELLASWAG_DIR says .* no file .*hellaswag_train.jsonl"):
        hellaswag.find_data(split="train")
    with pytest.raises(UserError, match="--data says nowhere"):
        hellaswag.find_data("nowhere")
    with pytest.raises(UserError, match="no split 'test' with labels: use val or train"):
        hellaswag.find_data(split="test")


@pytest.fixture
def server():
    """A web server on this machine that gives its `answers` in turn: (status, content, claimed length)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            status, content, claimed = server.answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(claimed or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_address[1]}/hellaswag_{{split}}.jsonl"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(monkeypatch):
    """The fixture's bytes as if they were what is published."""
    content = FIXTURE.read_bytes()
    monkeypatch.setattr(hellaswag, "FILES", {"val": (12, hashlib.sha256(content).hexdigest())})
    return content


def test_download_is_whole_or_not_at_all(tmp_path, server, published):
    half, other = published[:len(published) // 2], published.replace(b"tray", b"trap")
    file = tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl"
    for answers, fault in [
        ([(404, b"gone", None)] * 3, "404"),
        ([(200, half, None)] * 3, "lines of 12"),
        ([(200, half, len(published))] * 3, "IncompleteRead"),
        ([(200, other, None)] * 3, "sha256"),
        ([(200, b"", None)] * 3, "0 lines of 12"),
    ]:
        server.answers = list(answers)
        advice = ".*--data FILE .*HELLASWAG_DIR.*--hellaswag_every 0"
        with pytest.raises(UserError, match=fault + advice) as error:
            hellaswag.download(file, url=server.url, wait=0)
        assert "\n" not in str(error.value) and not server.answers and not list(tmp_path.rglob("*.jsonl*"))
    server.asked.clear()
    server.answers = [(503, b"later", None), (200, half, len(published)), (200, published, None)]
    assert hellaswag.download(file, url=server.url, wait=0) == file
    assert server.asked == ["/hellaswag_val.jsonl"] * 3
    assert file.read_bytes() == published and os.listdir(file.parent) == [file.name]


def test_a_truncated_file_is_fetched_again_and_a_whole_one_is_not(tmp_path, server, published, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HELLASWAG_DIR", raising=False)
    monkeypatch.setattr(hellaswag.download, "__defaults__", ("val", server.url, 1, 0))
    server.answers = [(200, published, None)] * 2
    file = hellaswag.find_data()
    assert file.read_bytes() == published and len(server.asked) == 1
    assert len(list(iterate_examples())) == 12 and len(server.asked) == 1
    file.write_bytes(published[:1000])
    assert len(list(iterate_examples())) == 12 and len(server.asked) == 2
    file.write_bytes(published.replace(b"tray", b"trap"))
    with pytest.raises(UserError, match="can't download"):  # nothing left to fetch: no score on another text
        next(iterate_examples())


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    with socket.socket() as s:  # a port that nobody listens on
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    waits = []
    monkeypatch.setattr(hellaswag.time, "sleep", waits.append)
    with pytest.raises(UserError, match="can't download HellaSwag .*refused"):
        hellaswag.download(tmp_path / "file", url=f"http://127.0.0.1:{port}/")
    assert waits == [0, 1, 2] and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path, server, published):
    (tmp_path / "data").write_text("a file where a folder should be")
    server.answers = [(200, published, None)]
    with pytest.raises(UserError, match="can't write"):
        hellaswag.download(tmp_path / "data" / "file", url=server.url, wait=0)


def test_what_is_published():
    """The constants, as the authors' repository has them."""
    sha256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
    assert hellaswag.FILES["val"] == (10042, sha256)
    assert hellaswag.URL.format(split="val") == \
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"


# ------------------------------------------------------------------------------------------------------------
# the command line

@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A Hugging Face folder of the tiny model, with its tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    save_tokenizer(BYTES, folder)
    return str(folder)


def test_main_on_an_exported_model(folder, model, examples, capsys):
    argv = ["--model", folder, "--data", str(FIXTURE), "--device", "cpu"]
    results, expected = hellaswag.main(argv), evaluate(model, examples, BYTES)
    assert accuracies(results) == accuracies(expected)
    out = capsys.readouterr().out
    assert "12 questions:" in out and f"{folder}, float32 on cpu" in out
    for rule in RULES:
        assert f"  {rule:14s}  {expected[rule]:.4f} +- {expected[rule + '_stderr']:.4f}  " in out
    results = hellaswag.main([*argv, "--limit", "5", "--harness"])
    assert results["n"] == 5
    assert accuracies(results) == accuracies(evaluate(model, examples[:5], BYTES, harness=True))
    assert "5 questions, by the rules of the harness" in capsys.readouterr().out


def test_main_shows_questions_losses_and_picks(folder, model, examples, capsys):
    argv = ["--model", folder, "--data", str(FIXTURE), "--device", "cpu"]
    hellaswag.main([*argv, "--show", "3", "--limit", "4"])
    out = capsys.readouterr().out
    losses = [-a / b for a, b in zip(*score(model, examples[:3], BYTES))]
    for number, (e, row) in enumerate(zip(examples[:3], losses), start=1):
        assert f"{number}. {e['ctx']}\n" in out
        pick = row.argmin().item()
        for j, (ending, loss) in enumerate(zip(e["endings"], row.tolist())):
            mark = (">" if j == pick else " ") + ("*" if j == e["label"] else " ")
            assert f"  {mark} {loss:6.3f}  {ending}\n" in out
        verdict = "right" if pick == e["label"] else "wrong"
        assert f"{verdict}: it picked {pick}, the real ending is {e['label']}\n" in out
    assert examples[3]["ctx"] not in out


def test_main_on_another_architecture(tmp_path, examples):
    """Llama: transformers loads it, in the dtype that is asked for, with the tokenizer in its folder."""
    from transformers import AutoTokenizer
    model = hub_model("llama", max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    save_tokenizer(BYTES, tmp_path)
    argv = ["--model", str(tmp_path), "--data", str(FIXTURE), "--device", "cpu"]
    assert accuracies(hellaswag.main(argv)) == plain_accuracies(plain_score(model, examples), examples)
    loaded, _, autocast = hellaswag.load(str(tmp_path), torch.device("cpu"), torch.bfloat16)
    assert next(loaded.parameters()).dtype == torch.bfloat16 and autocast is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert hellaswag.HubTokenizer(tokenizer).prefix == []
    assert hellaswag.HubTokenizer(tokenizer).encode_ordinary(" a b") == BYTES.encode_ordinary(" a b")


def test_a_tokenizer_that_opens_texts(model, examples, tmp_path):
    """Such an id goes before the context and never before an ending."""
    class Opening:
        prefix = [256]
        encode_ordinary = staticmethod(BYTES.encode_ordinary)

        def encode(self, text, add_special_tokens=True):
            return [256] * add_special_tokens + self.encode_ordinary(text)

    sums, _ = score(model, examples[:3], Opening())
    reference, encode = to_transformers(model, tmp_path), BYTES.encode_ordinary
    for e, row in zip(examples, sums.tolist()):
        for ending, ours in zip(e["endings"], row):
            assert abs(plain_log_p(reference, [256, *encode(e["ctx"])], encode(" " + ending)) - ours) < 2e-3
    assert hellaswag.HubTokenizer(Opening()).prefix == [256]


def test_wrong_input_is_one_line(folder, tmp_path, monkeypatch):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(record() + "\n" + record(label=7))
    (tmp_path / "empty").mkdir()
    good = ["--model", folder, "--data", str(FIXTURE)]
    for argv, message in [
        ([], "--model"),
        (good + ["--fast"], "--fast"),
        (good + ["--limit", "0"], "--limit 0: must be at least 1"),
        (good + ["--limit", "x"], "--limit"),
        (good + ["--show", "-1"], "--show -1: must be at least 0"),
        (good + ["--max_tokens", "0"], "--max_tokens 0: must be at least 1"),
        (good + ["--dtype", "int8"], "--dtype"),
        (good + ["--device", "abacus"], "--device abacus"),
        (["--model", folder, "--data", str(broken)], f"{broken}, line 2: label: 7"),
        (["--model", folder, "--data", "nowhere"], "--data says nowhere"),
        (["--model", "nowhere", "--data", str(FIXTURE)], "--model nowhere: no such file or folder"),
        (["--model", str(tmp_path / "empty"), "--data", str(FIXTURE)], "empty"),
        (["--model", str(FIXTURE), "--data", str(FIXTURE)], "hellaswag_fixture.jsonl"),
        (["--model", "someone/nothing", "--data", str(FIXTURE)], "someone/nothing"),
    ]:
        with pytest.raises(UserError) as error:
            hellaswag.main(argv)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_ends_with_status_2_and_no_traceback(tmp_path):
    def run(*argv):
        command = [sys.executable, str(ROOT / "hellaswag.py"), *argv]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    for argv in (["--model"], ["--model", "gpt2", "--data", "nowhere"]):
        done = run(*argv)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("hellaswag.py: ") and done.stderr.count("\n") == 1
    assert run("--help").returncode == 0 and not list(tmp_path.iterdir())


def test_import_is_light_and_silent(tmp_path):
    code = """if True:
        import sys, hellaswag
        heavy = {"torch", "transformers", "datasets", "tiktoken", "tokenizers", "pyarrow", "tqdm"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# real questions, and the harness itself

def test_real_questions(real_data, gpt2_tokenizer, tmp_path):
    """20 of the validation set with GPT-2's tokenizer, against the plain reference; all 1,000 are read."""
    examples = list(iterate_examples(path=real_data / "hellaswag" / "hellaswag_val_1000.jsonl"))
    assert len(examples) == 1000 and {len(e) for e in examples} == {10}
    model, some = tiny_gpt(vocab_size=50257), examples[:10] + examples[-10:]  # ActivityNet's and WikiHow's
    encode = gpt2_tokenizer.encode_ordinary
    expected = plain_score(to_transformers(model, tmp_path), some, encode)
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
    data = FIXTURE
    if os.environ.get("GPT2_TEST_DATA"):
        data = Path(os.environ["GPT2_TEST_DATA"]).resolve() / "hellaswag" / "hellaswag_val_1000.jsonl"
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
    results = evaluate(model, examples, BYTES, harness=True)
    found = theirs["results"]["questions"]
    assert (results["acc"], results["acc_norm_chars"]) == (found["acc,none"], found["acc_norm,none"])
    assert results["acc_stderr"] == pytest.approx(found["acc_stderr,none"], rel=1e-9)
    sums = torch.tensor([[r[0][0] for r in sample["resps"]] for sample in theirs["samples"]["questions"]])
    ours, _ = score(model, examples, BYTES, harness=True)
    torch.testing.assert_close(ours, sums.double(), rtol=0, atol=5e-3)
