"""A trained model as one web page: it runs in any browser, offline, from a double click.

    python lessons/explore.py log --out my-gpt2.html             the newest model of a log folder
    python lessons/explore.py ckpt_00000540.pt --text "def f("   any checkpoint; how the page opens
    python lessons/explore.py my-gpt2                            a Hugging Face folder, if it is small enough

The page is explorer.html, a template, with the model filled in: its sizes, its tokenizer, its weights as float16, and
a map of the network with the lines of train_gpt2.py that do what it shows.
"""
import base64
import inspect
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fineweb  # noqa: E402
import train_gpt2  # noqa: E402
from fineweb import Parser, UserError, insist, read_json, tokenizer_to_json, write_file  # noqa: E402

LARGEST = 150e6  # bytes: a browser holds the page, its decoded weights and their float32 copy at the same time
TEXT = ("Return the number of items in the list. If the list is empty, return the default value. The open() function "
        "returns a file object. If the file")
ABOUT = {"builtin": "the documentation that comes with Python, so it knows little else",
         "tinystories": "short stories for children, so it knows little else",
         "edu_fineweb10B": "educational web pages"}

# The map: name, shape, how the names of its weights begin (None: it has none of its own), what it does, who does it,
# and between which words of the source: all of it where there are none. {C}, {V}, ... are this model's numbers.
MAP = [
    ("Text to tokens", "T ids below {V}", None,
     "The text is cut into pieces that the tokenizer knows, and each becomes its number in the vocabulary, its id.",
     fineweb.tokenize, ""),
    ("Embedding", "T ids → (T, {C})", "w",
     "Each id is looked up as {C} numbers, its embedding, that say what it means; {C} more are added that say where "
     "it stands.",
     train_gpt2.GPT.hidden, "transformer.wte("),
    ("Attention, in each of {L} layers", "(T, {C}) → {nh} heads × (T, T) → (T, {C})", "h.0.attn",
     "Each token asks a question, compares it with what it and the tokens before it offer, and takes a weighted "
     "average of their answers.", train_gpt2.CausalSelfAttention, ""),
    ("MLP (multilayer perceptron), after each attention", "(T, {C}) → (T, {wide}) → (T, {C})", "h.0.mlp",
     "Each token is worked on alone: its numbers become four times as many, pass GELU, which mutes the negative ones, "
     "and shrink back.",
     train_gpt2.MLP, ""),
    ("The two together: a layer", "(T, {C}) → (T, {C})", "h.0.ln",
     "Attention and MLP read the stream through a LayerNorm, which brings it to a standard size.",
     train_gpt2.Block, ""),
    ("Last LayerNorm", "(T, {C})", "ln_f",
     "Brings the stream, which has grown from layer to layer, back to a standard size.",
     train_gpt2.GPT.hidden, "transformer.ln_f("),
    ("Scores for the next token", "(T, {C}) → (T, {V})", None,
     "A token's numbers are compared with the embedding of every id: the better they fit, the higher its score.",
     train_gpt2.GPT.forward, "self.lm_head("),
    ("Surprise", "(T, {V}) → 1 number", None,
     "Training compares each guess with the token that really came next, and moves all learned numbers a little, many "
     "times, to make the surprise smaller.", train_gpt2.GPT.forward, "cross_entropy("),
    ("Sampling", "({V}) → 1 id", None,
     "Scores become probabilities (softmax: all positive, sum 1), one id is drawn and appended, and everything runs "
     "once more.",
     train_gpt2.GPT.generate, ""),
]


def lines_of(thing, words):
    """Where a function or class is written, or its one line with these words: found anew for each page, never stale."""
    lines, first = inspect.getsourcelines(thing)
    if words:
        at = next(i for i, line in enumerate(lines) if words in line)
        lines, first = [lines[at]], first + at
    where = f"line {first}" if len(lines) == 1 else f"lines {first}–{first + len(lines) - 1}"
    return {"where": f"{Path(inspect.getsourcefile(inspect.unwrap(thing))).name}, {where}",
            "source": inspect.cleandoc("\n" + "".join(lines))}


def token_bytes(tokenizer):
    """The tokens of a byte-level BPE in the order of their ids, each a string with one letter for each of its bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    told, byte = json.loads(tokenizer_to_json(tokenizer)), {letter: i for i, letter in bytes_to_unicode().items()}
    vocab = told["model"]["vocab"]
    insist(told["model"]["type"] == "BPE" and set("".join(vocab)) <= set(byte),
           "the page can only use a tokenizer of GPT-2's kind, a byte-level BPE")
    tokens = {id: bytes(map(byte.get, token)).decode("latin-1") for token, id in vocab.items()}
    tokens |= {token["id"]: token["content"] for token in told["added_tokens"]}
    return [tokens.get(id, "") for id in range(tokenizer.n_vocab)]


def make_page(model, tokenizer, text=TEXT, about=""):
    """The page of a model, as one string. UserError if it would be too large for a browser."""
    c, n_vocab = model.config, tokenizer.n_vocab
    # Rows past the vocabulary are padding that no text reaches. lm_head is the embedding: stored once.
    weights = {name.removeprefix("transformer."): p[:n_vocab] if name == "transformer.wte.weight" else p
               for name, p in model.named_parameters()}
    sizes = dict(C=c.n_embd, V=f"{n_vocab:,}", L=c.n_layer, nh=c.n_head, wide=4 * c.n_embd)
    filled = json.dumps({
        "config": {"block_size": c.block_size, "n_vocab": n_vocab, "n_layer": c.n_layer, "n_head": c.n_head,
                   "n_embd": c.n_embd},
        "eot": tokenizer.eot_token, "text": text, "about": about, "tokens": token_bytes(tokenizer),
        "tensors": [(name, p.numel()) for name, p in weights.items()],
        "map": [{"name": name.format(**sizes), "shape": shape.format(**sizes), "weights": prefix,
                 "words": does.format(**sizes), **lines_of(thing, words)}
                for name, shape, prefix, does, thing, words in MAP],
    }).replace("<", "\\u003c")  # "</script>" in a text would end the script that holds it
    n = sum(p.numel() for p in weights.values())
    size = n * 2 * 4 / 3 + len(filled)  # float16 is two bytes, and base64 writes three bytes as four
    insist(size <= LARGEST, f"{n:,} weights would make a page of {size / 1e6:,.0f} MB: "
                            f"browsers open up to {LARGEST / 1e6:.0f} MB well")
    blob = b"".join(p.detach().cpu().numpy().astype("<f2").tobytes() for p in weights.values())
    insist(np.isfinite(np.frombuffer(blob, "<f2")).all(),
           "the model has weights that are not finite, or above 65,504, the largest float16")
    page = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    before, between, after = page.replace("{{weights}}", "{{model}}").split("{{model}}")
    return before + filled + between + base64.b64encode(blob).decode() + after


def main(argv=None):
    """Write the page that a command line asks for -> its path. UserError on wrong input."""
    parser = Parser(prog="explore.py", description="a trained model as one web page that runs in any browser, offline")
    parser.add_argument("source", help="a log folder, a checkpoint file, or a GPT-2-shaped Hugging Face folder")
    parser.add_argument("--out", type=Path, default=Path("my-gpt2.html"), help="the page (%(default)s)")
    parser.add_argument("--text", default=TEXT, help="the text it opens with")
    args = parser.parse_args(argv)
    model, tokenizer = train_gpt2.load_model(args.source)
    config = Path(args.source, "config.json")  # a run says there what it learned from
    data = Path(read_json(config).get("data_dir", "")).name if config.exists() else ""
    page = make_page(model, tokenizer, args.text, data and f"It learned from {ABOUT.get(data, data)}.")
    write_file(args.out, lambda file: file.write(page.encode()))
    print(f"wrote {args.out}, {len(page.encode()) / 1e6:.1f} MB: open it in a browser")
    return args.out


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"explore.py: {error}", file=sys.stderr)
        sys.exit(2)
