"""The explorer's page: its arithmetic and its tokenizer against ours under node, and the page itself in a browser."""
import copy
import html
import itertools
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import textwrap
import types
import urllib.parse
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch.nn.functional import cross_entropy

from conftest import ROOT
from fineweb import UserError, builtin_documents, load_tokenizer, train_tokenizer
from helpers import tiny_model
from lessons import explore

NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# No two sizes alike, an odd vocabulary, and more rows than it has ids.
SIZES = dict(block_size=23, vocab_size=384, n_layer=3, n_head=4, n_embd=24)
N_VOCAB = 301
LONG = "Return the list of the items of the list, and the items of the list of the list. " * 3
TEXTS = ["", " ", "   two  spaces ", "It's we'll they'VE I'm", "1234567 0x7F ١٢٣", "naïve café, Ελληνικά, 日本語",
         "👩‍🚀🎉 ok", "a\n\n\tb \r\n c\n", "tail  ", "\ufeffmark\u0085next\u00a0nbsp\u2028line", "<|endoftext|>",
         "</script><!--", LONG]

DRIVER = """
const html = require("fs").readFileSync(process.argv[1], "utf-8");
const script = id => html.split(`id="${id}">`)[1].split("</script>")[0];
const makeExplorer = new Function(script("engine") + "; return makeExplorer")();
const explorer = makeExplorer(JSON.parse(script("model")), script("weights"));
const given = JSON.parse(require("fs").readFileSync(0, "utf-8"));
const answer = new Function("explorer", "given", process.argv[2])(explorer, given);
process.stdout.write(JSON.stringify(answer, (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value));
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, tokenizer, page): a tiny model, shaken, its weights rounded as the page's are."""
    tokenizer = train_tokenizer(itertools.islice(builtin_documents(), 40), N_VOCAB)
    model = tiny_model(**SIZES).eval()
    model.n_vocab = N_VOCAB
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore.train_gpt2, "load_model", {"log": (model, tokenizer)}.get)
        out = tmp_path_factory.mktemp("made") / "deep" / "my-gpt2.html"
        page = explore.main(["log", "--out", str(out), "--text", "Return the list."])
    return model, tokenizer, page


def node(page, body, given=None):
    """What a function body returns under node, where `explorer` is the page's object and `given` our argument."""
    if not NODE:
        pytest.skip("node is not installed")
    done = subprocess.run([NODE, "-e", DRIVER, str(page), body], input=json.dumps(given), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@torch.no_grad()
def reference(model, ids, off=()):
    """What transformers has from the same weights, those of the parts that are off set to 0: logits (T, V), attention
    (L, nh, T, T), the stream (L+1, T, C)."""
    from transformers import GPT2LMHeadModel
    less, hs, last = copy.deepcopy(model), model.config.n_embd // model.config.n_head, []
    for layer, part in (name.split(".") for name in off):
        block = less.transformer.h[int(layer)]
        if part == "mlp":
            for p in block.mlp.c_proj.parameters():
                p.zero_()
        else:
            block.attn.c_proj.weight[:, int(part) * hs:(int(part) + 1) * hs].zero_()
    with tempfile.TemporaryDirectory() as folder:
        less.save_pretrained(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    # their last hidden state is the normalized one
    theirs.transformer.ln_f.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    found = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    return found.logits[0], torch.cat(found.attentions), torch.cat([*found.hidden_states[:-1], *last])


def close(ours, ref, atol=1e-3):
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float32), ref, atol=atol, rtol=0)


# ---- the engine, under node

@pytest.mark.parametrize("off", [(), ("0.1", "2.3"), ("1.mlp", "1.0")])
def test_logits_attention_and_norms_are_those_of_pytorch(made, off):
    """Of a text that is too long: it is cropped from the left, as generate does."""
    model, tokenizer, page = made
    T = SIZES["block_size"]
    long = tokenizer.encode_ordinary(LONG)
    ids = long[-T:]
    ours = node(page, "return explorer.run(...given)", [long, list(off)])
    assert len(long) > T and ours["ids"] == ids
    logits, attention, stream = reference(model, ids, off)
    close(ours["logits"], logits)
    close([[[row + [0.0] * (T - len(row)) for row in rows] for rows in layer] for layer in ours["attention"]],
          attention, 1e-5)
    close(ours["norms"], stream.norm(dim=-1))
    close(ours["next"], logits[-1])
    nats = cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none")
    close([told["bits"] for told in ours["surprises"][1:]], (nats / math.log(2)).float())
    ranks = [1 + int((row > row[id]).sum()) for row, id in zip(logits, ids[1:])]
    assert [told["rank"] for told in ours["surprises"][1:]] == ranks


@pytest.mark.parametrize("kind", ["bpe", "bytes", "gpt2"])
def test_ids_are_the_tokenizers_and_decode_leads_back(made, kind, request, tmp_path):
    tokenizer = made[1] if kind == "bpe" else load_tokenizer("bytes") if kind == "bytes" else (
        request.getfixturevalue("gpt2_tokenizer"))
    model = tiny_model(block_size=8, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=6)
    page = tmp_path / "page.html"
    page.write_text(explore.make_page(model, tokenizer, "</script>"), encoding="utf-8")
    texts = TEXTS + ["\n\n".join(itertools.islice(builtin_documents(), 3))]
    half = tokenizer.encode_ordinary("🎉")[:1]
    ids, back, *odd = node(page, """const ids = given.texts.map(explorer.encode);
        return [ids, ids.map(explorer.decode), explorer.decode(given.half), explorer.decode([explorer.eot])]""",
                           dict(texts=texts, half=half))
    assert ids == [tokenizer.encode_ordinary(text) for text in texts] and back == texts
    assert odd == [tokenizer.decode(half), "<|endoftext|>"]


def test_what_is_remembered_equals_what_is_computed_anew_and_no_more_is_computed_than_needed(made):
    """Typing, deleting, changing the middle, writing past the window, switching: always as a fresh session."""
    ids = made[1].encode_ordinary(LONG)
    steps = [[ids[:n], []] for n in (3, 4, 5, 12, 11, 12)] + [[ids[:6] + ids[9:20], []], [ids[:6] + ids[9:21], ["2.1"]],
             [ids[:6] + ids[9:21], ["2.1", "0.mlp"]], [ids[:6] + ids[9:20], ["0.mlp"]], [ids[:6] + ids[9:20], []]]
    steps += [[ids[:n], []] for n in range(19, 27)] + [[[], []], [ids[:2], ["1.2"]]]
    # Each third time only the last token's logits are asked for: the others are then owed to the next question.
    told = node(made[2], """const copy = (run, i) => JSON.stringify(i % 3 === 1 ? Array.from(run.next) : [
          Array.from(run.next), run.logits.map(row => Array.from(row)), run.norms, run.surprises, run.attention]);
        return given.map(([ids, off], i) => { const run = explorer.run(ids, off);
          return [run.computed, copy(run, i) === copy(explorer.session()(ids, off), i)]; })""", steps)
    assert [same for _, same in told] == [True] * len(steps)
    computed = [3, 1, 1, 7, 0, 1, 11, 18, 18, 17, 17, 13, 1, 1, 1, 1, 23, 23, 23, 1, 2]
    assert [n for n, _ in told] == computed


def test_what_it_draws_from_is_what_generate_draws_from(made):
    model, tokenizer, page = made
    logits = reference(model, tokenizer.encode_ordinary("Return the"))[0][-1]
    ways = [(1.0, N_VOCAB), (0.7, 5), (1.6, 50), (0, 50)]
    *drawn, greedy = node(page, """const { next } = explorer.run(explorer.encode("Return the"));
                                   return given.map(way => explorer.distribution(next, ...way))""", ways)
    for (temperature, top_k), ours in zip(ways, drawn):
        kept = logits.topk(top_k)
        assert [id for id, _ in ours] == kept.indices.tolist()
        close([p for _, p in ours], (kept.values / temperature).softmax(-1), 1e-5)
    assert greedy == [[int(logits.argmax()), 1]]


def test_the_lens_and_the_habits_of_heads(made):
    model, tokenizer, page = made
    ids = tokenizer.encode_ordinary("Return the list")
    lens = node(page, "const run = explorer.run(given); return [0, 1, 2, 3].map(layer => run.lens(layer, 2))", ids)
    with torch.no_grad():
        close(lens, model.lm_head(model.transformer.ln_f(reference(model, ids)[2][:, 2]))[:, :N_VOCAB])
    scores = node(page, "return explorer.headScores()")
    n = len(scores["ids"]) // 2
    assert scores["ids"][:n] == scores["ids"][n:] and len(set(scores["ids"])) == n == SIZES["block_size"] // 2
    attention = reference(model, scores["ids"])[1]
    close(scores["previous"], attention.diagonal(-1, 2, 3).mean(-1), 1e-5)
    close(scores["induction"], torch.stack([attention[:, :, t, t - n + 1] for t in range(n, 2 * n)]).mean(0), 1e-5)


# ---- the page's making

def test_the_map_names_the_lines_that_do_it():
    for *_, thing, words in explore.MAP:
        told = explore.lines_of(thing, words)
        file, first, last = re.fullmatch(r"(\S+), lines? (\d+)(?:–(\d+))?", told["where"]).groups()
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(first) - 1:int(last or first)]
        assert textwrap.dedent("\n".join(lines)) == told["source"] and (words or f" {thing.__name__}") in told["source"]


def test_wrong_input_is_one_line_and_status_2(made, monkeypatch, capsys):
    model, tokenizer, _ = made
    for error in UserError, OSError:
        monkeypatch.setattr(explore.train_gpt2, "load_model", mock.Mock(side_effect=error("log: nothing is here")))
        monkeypatch.setattr(sys, "argv", ["explore.py", "log"])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(explore.__file__, run_name="__main__")
        assert capsys.readouterr() == ("", "explore.py: log: nothing is here\n")
    strange = types.SimpleNamespace(n_vocab=9, eot_token=0, json='{"model": {"type": "WordPiece", "vocab": {}}}')
    with pytest.raises(UserError, match="a tokenizer of GPT-2's kind"):
        explore.make_page(model, strange)
    monkeypatch.setattr(explore, "LARGEST", 1000)
    with pytest.raises(UserError, match="weights would make a page of .* MB"):
        explore.make_page(model, tokenizer)


# ---- the page in a browser

def look(page, script, width=1400, **view):
    """What the body of an async JavaScript function returns in Chromium, where `page` is the window of the page, opened
    from its file in a frame of this width; `$`, `$$` find nodes in it, `until` waits. The screenshot is next to it."""
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    driver = page.with_name("driver.html")
    driver.write_text(f"""<body style="margin: 0"><pre hidden></pre>
        <iframe src="{page.name}#{urllib.parse.urlencode(view)}" style="width: {width}px; height: 900px"></iframe>
        <script>onload = async () => {{
          const page = document.querySelector("iframe").contentWindow, $ = css => page.document.querySelector(css);
          const $$ = css => [...page.document.querySelectorAll(css)];
          const until = async ready => {{ while (!ready()) await new Promise(done => setTimeout(done, 20)); }};
          await until(() => page.explorer?.took);
          const answer = await (async () => {{ {script} }})();
          document.querySelector("pre").textContent = JSON.stringify(answer);
        }};</script>""", encoding="utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                           f"--user-data-dir={page.parent / 'chromium'}", "--allow-file-access-from-files",
                           "--virtual-time-budget=30000", "--enable-logging=stderr", "--window-size=1400,900",
                           f"--screenshot={page.with_name('seen.png')}", "--dump-dom", driver.as_uri()],
                          capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(done.stdout.split("<pre hidden=\"\">")[1].split("</pre>")[0]))


@pytest.mark.slow
def test_typing_drawing_and_switching(made):
    model, tokenizer, page = made
    opened, here, bars, off, tokens, written, stopped = look(page, """
        const opened = $("#text").value, shown = () => $$("#tokens .token").map(node => +node.dataset.id);
        const changed = async change => { page.explorer.took = 0; change(); await until(() => page.explorer.took); };
        const losses = () => $$("#compare th").map(node => node.textContent);
        page.Math.random = () => 0;                       // it draws the likeliest
        $("#text").value = "Return the items";
        await changed(() => $("#text").dispatchEvent(new page.Event("input")));
        await until(() => page.location.hash.includes("items"));
        await changed(() => page.dispatchEvent(new page.Event("hashchange")));       // nothing of it is lost
        const here = +$("#tokens .here").dataset.t;
        $("#temperature").dispatchEvent(new page.Event("input"));                    // it leaves top-k at 50
        const bars = $$(".bar").map(bar => [+bar.dataset.id, +bar.dataset.p]);
        await changed(() => $("#switches [data-part='1.2']").click());
        const off = losses();
        await changed(() => $("#all-on").click());
        off.push(...losses());
        await changed(() => $("#switches [data-part='1.2']").click());
        await changed(() => $(".bar").click());
        const tokens = shown();
        $("#write").click();
        await until(() => shown().length > tokens.length + 3 || $("#write").textContent === "Write");
        const written = [shown().slice(0, tokens.length), $("#write").textContent];
        await changed(() => $("#step").click());
        return [opened, here, bars, off, tokens, written, $("#write").textContent];""")
    ids = tokenizer.encode_ordinary("Return the items")
    assert opened == "Return the list." and here == len(ids) - 1
    logits, switched = reference(model, ids)[0], reference(model, ids, ("1.2",))[0]
    kept = logits[-1].topk(50)
    assert [id for id, _ in bars] == kept.indices[:20].tolist()
    close([p for _, p in bars], kept.values.softmax(-1)[:20], 1e-4)
    on, less = [f"{cross_entropy(rows[:-1], torch.tensor(ids[1:])) / math.log(2):.2f}" for rows in (logits, switched)]
    assert off == [f"all on\n{on} bits", f"now\n{less} bits ({float(less) - float(on):+.2f})",
                   f"all on\n{on} bits", f"now\n{on} bits"]
    assert tokens == written[0] == ids + [int(switched[-1].argmax())] and (written[1], stopped) == ("Stop", "Write")


@pytest.mark.slow
def test_the_address_restores_the_view_and_the_keyboard_moves_in_it(made):
    text = "the list, 日本 & the=items"
    view = dict(text=text, layer=2, head=1, token=1, off="0.3,1.mlp,9.9", temperature=0.5, top_k=7)
    restored, now = look(made[2], """
        const title = () => $("#head-title").textContent.split(":")[0];
        const off = $$("[aria-checked=false]").map(node => node.dataset.part);
        const bars = $$(".bar").filter(bar => bar.dataset.p > 0).length;
        const restored = [$("#text").value, title(), $("#tokens .here").dataset.t, off, bars];
        const press = (css, key) => $(css).dispatchEvent(new page.KeyboardEvent("keydown", { key, bubbles: true }));
        press("#heads .here", "ArrowUp");
        press("#heads .here", "ArrowRight");
        press("#takes .here", "ArrowRight");
        await until(() => page.location.hash.includes("layer=1"));
        return [restored, Object.fromEntries(new URLSearchParams(page.location.hash.slice(1)))];""", **view)
    assert restored == [text, "Layer 2, head 1", "1", ["0.3", "1.mlp"], 7]
    assert now == {name: str(value) for name, value in {**view, "layer": 1, "head": 2, "token": 2}.items()}


@pytest.mark.slow
@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("text", ["", LONG])
def test_it_is_readable_at_every_width(made, width, text):
    page = made[2]
    assert look(page, "return page.document.documentElement.scrollWidth;", width, text=text) <= width
    seen = imread(page.with_name("seen.png"))[:, :width]
    assert len(np.unique(seen)) > 100, "a blank picture has a handful of shades"
