"""A trained model as one web page: it runs in any browser, offline, from a double click.

    python lessons/explore.py log --out my-gpt2.html             the newest model of a log folder
    python lessons/explore.py ckpt_00000540.pt --text "def f("   any checkpoint; how the page opens
    python lessons/explore.py my-gpt2                            a Hugging Face folder, if it is small enough

The page is explorer.html, a template, with the model filled in: its sizes, its tokenizer, its weights as float16, and
the lines of train_gpt2.py that do what the page shows.
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
from fineweb import Parser, UserError, read_json, tokenizer_to_json, write_file  # noqa: E402

LARGEST = 150e6  # bytes: a browser holds the page, its decoded weights and their float32 copy at the same time
TEXT = "Return the number of items in the list. If the list is empty, return the"
ABOUT = {"builtin": "It learned from the documentation that comes with Python, so it knows little else.",
         "tinystories": "It learned from short stories for children, so it knows little else.",
         "edu_fineweb10B": "It learned from educational web pages."}

# What the page explains -> who does it, and between which words of its source: all of it where there are none.
CODE = {
    "tokens": (fineweb.tokenize, ""),
    "embedding": (train_gpt2.GPT.hidden, "transformer.wte("),
    "attention": (train_gpt2.CausalSelfAttention, ""),
    "mlp": (train_gpt2.MLP, ""),
    "block": (train_gpt2.Block, ""),
    "norm": (train_gpt2.GPT.hidden, "transformer.ln_f("),
    "head": (train_gpt2.GPT.forward, "self.lm_head("),
    "loss": (train_gpt2.GPT.forward, "cross_entropy("),
    "sample": (train_gpt2.GPT.generate, ""),
}


def lines_of(thing, words):
    """Where a function or class is written, or its one line with these words: found anew for each page, never stale."""
    lines, first = inspect.getsourcelines(thing)
    if words:
        at = next(i for i, line in enumerate(lines) if words in line)
        lines, first = [lines[at]], first + at
    return {"file": Path(inspect.getsourcefile(inspect.unwrap(thing))).name,
            "first": first, "last": first + len(lines) - 1, "source": inspect.cleandoc("\n" + "".join(lines))}


def make_page(model, tokenizer, text=TEXT, about=""):
    """The page of a model, as one string. UserError if it would be too large for a browser."""
    c, n_vocab = model.config, tokenizer.n_vocab
    # Rows past the vocabulary are padding that no text reaches. lm_head is the embedding: stored once.
    weights = {name.removeprefix("transformer."): p[:n_vocab] if name == "transformer.wte.weight" else p
               for name, p in model.named_parameters()}
    told = json.loads(tokenizer_to_json(tokenizer))
    filled = json.dumps({
        "config": {"block_size": c.block_size, "n_vocab": n_vocab, "n_layer": c.n_layer, "n_head": c.n_head,
                   "n_embd": c.n_embd},
        "eot": tokenizer.eot_token, "text": text, "about": about,
        "tokenizer": {"vocab": told["model"]["vocab"],
                      "merges": [m.split(" ") if isinstance(m, str) else m for m in told["model"]["merges"]],
                      "added": {token["id"]: token["content"] for token in told["added_tokens"]}},
        "tensors": [(name, p.numel()) for name, p in weights.items()],
        "code": {name: lines_of(*where) for name, where in CODE.items()},
    }).replace("<", "\\u003c")  # "</script>" in a text would end the script that holds it
    n = sum(p.numel() for p in weights.values())
    size = n * 2 * 4 / 3 + len(filled)  # float16 is two bytes, and base64 writes three bytes as four
    if size > LARGEST:
        raise UserError(f"{n:,} weights would make a page of {size / 1e6:,.0f} MB: "
                        f"browsers open up to {LARGEST / 1e6:.0f} MB well")
    blob = b"".join(p.detach().cpu().numpy().astype("<f2").tobytes() for p in weights.values())
    if not np.isfinite(np.frombuffer(blob, "<f2")).all():
        raise UserError("the model has weights that are not finite, or above 65,504, the largest float16")
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
    page = make_page(model, tokenizer, args.text, ABOUT.get(data, ""))
    write_file(args.out, lambda file: file.write(page.encode()))
    print(f"wrote {args.out}, {len(page.encode()) / 1e6:.1f} MB: open it in a browser")
    return args.out


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"explore.py: {error}", file=sys.stderr)
        sys.exit(2)
