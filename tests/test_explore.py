"""The explorer's page: its arithmetic and its tokenizer against ours under node, and the page itself in a browser."""
import html
import inspect
import json
import math
import shutil
import subprocess
import sys
import types
import urllib.parse

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from conftest import ROOT
from fineweb import UserError, builtin_documents, load_tokenizer, save_tokenizer, train_tokenizer
from helpers import tiny_model
from lessons import explore
from train_gpt2 import load_model

NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_node = pytest.mark.skipif(not NODE, reason="node is not installed")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")

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
    tokenizer = train_tokenizer((text for text, _ in zip(builtin_documents(), range(40))), N_VOCAB)
    model = tiny_model(**SIZES).eval()
    model.n_vocab = N_VOCAB
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
    page = tmp_path_factory.mktemp("page") / "my-gpt2.html"
    page.write_text(explore.make_page(model, tokenizer, "Return the list."), encoding="utf-8")
    return model, tokenizer, page


def node(page, body, given=None):
    """What a function body returns under node, where `explorer` is the page's object and `given` our argument."""
    done = subprocess.run([NODE, "-e", DRIVER, str(page), body], input=json.dumps(given), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@torch.no_grad()
def reference(model, ids, off=()):
    """Plain PyTorch, parts switched off by hooks: logits (T, V), attention (L, nh, T, T), the stream (L+1, T, C)."""
    attention, stream, hooks = [], [], []
    nh, hs, T = model.config.n_head, model.config.n_embd // model.config.n_head, len(ids)

    def look(module, inputs, qkv):
        q, k, _ = (part.view(T, nh, hs).transpose(0, 1) for part in qkv[0].chunk(3, dim=-1))
        scores = (q @ k.transpose(1, 2) / hs ** 0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
        attention.append(scores.softmax(-1))

    for l, block in enumerate(model.transformer.h):
        heads = torch.ones(nh, hs)
        for name in off:
            if name.startswith(f"{l}.") and not name.endswith("mlp"):
                heads[int(name[2:])] = 0
        hooks += [block.attn.c_attn.register_forward_hook(look),
                  block.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0][0])),
                  block.attn.c_proj.register_forward_pre_hook(
                      lambda module, inputs, heads=heads: inputs[0] * heads.flatten())]
        if f"{l}.mlp" in off:
            hooks.append(block.mlp.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out)))
    hooks.append(model.transformer.ln_f.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0][0])))
    logits = model(torch.tensor([ids]))[0][0, :, :N_VOCAB]
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(attention), torch.stack(stream)


def close(ours, ref, atol=1e-3):
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float32), ref, atol=atol, rtol=0)


# ---- the engine, under node

@needs_node
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
    nats = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none")
    close([told["bits"] for told in ours["surprises"][1:]], (nats / math.log(2)).float())
    ranks = [1 + int((row > row[id]).sum()) for row, id in zip(logits, ids[1:])]
    assert [told["rank"] for told in ours["surprises"][1:]] == ranks


@needs_node
@pytest.mark.parametrize("kind", ["bpe", "bytes", "gpt2"])
def test_ids_are_the_tokenizers_and_decode_leads_back(made, kind, request, tmp_path):
    tokenizer = {"bpe": lambda: made[1], "bytes": lambda: load_tokenizer("bytes"),
                 "gpt2": lambda: request.getfixturevalue("gpt2_tokenizer")}[kind]()
    model = tiny_model(block_size=8, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=6)
    page = tmp_path / "page.html"
    page.write_text(explore.make_page(model, tokenizer), encoding="utf-8")
    texts = TEXTS + ["\n\n".join(text for text, _ in zip(builtin_documents(), range(3)))]
    ids, back = node(page, "const ids = given.map(explorer.encode); return [ids, ids.map(explorer.decode)]", texts)
    assert ids == [tokenizer.encode_ordinary(text) for text in texts]
    assert back == texts
    half = tokenizer.encode_ordinary("🎉")[:1]
    assert node(page, "return [explorer.decode(given), explorer.decode([explorer.eot])]",
                half) == [tokenizer.decode(half), "<|endoftext|>"]


@needs_node
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


@needs_node
def test_what_it_draws_from_is_what_generate_draws_from(made):
    model, tokenizer, page = made
    logits = reference(model, tokenizer.encode_ordinary("Return the"))[0][-1]
    for temperature, top_k in (1.0, N_VOCAB), (0.7, 5), (1.6, 50):
        kept = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
        ours = node(page, "const [text, ...how] = given;"
                    "return explorer.distribution(explorer.run(explorer.encode(text)).next, ...how)",
                    ["Return the", temperature, top_k])
        close([p for _, p in ours], (kept / temperature).softmax(-1).sort(descending=True).values[:top_k], 1e-5)
    greedy = node(page, "return explorer.distribution(explorer.run(explorer.encode(given)).next, 0, 50)", "Return the")
    assert greedy == [[int(logits.argmax()), 1]]


@needs_node
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
        file, lines = told["where"].split(", ")
        first, *last = lines.removeprefix("lines ").removeprefix("line ").split("–")
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(first) - 1:int(*last or [first])]
        assert words in lines[0] if words else any(f" {thing.__name__}" in line for line in lines[:2]), told
        assert inspect.cleandoc("\n" + "\n".join(lines)) == told["source"]


def test_wrong_input_is_one_line_and_status_2(made, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run([sys.executable, ROOT / "lessons" / "explore.py", empty], capture_output=True, text=True,
                          cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and str(empty) in done.stderr
    model, tokenizer, _ = made
    monkeypatch.setattr(explore, "LARGEST", 1000)
    with pytest.raises(UserError, match="weights would make a page of .* MB"):
        explore.make_page(model, tokenizer)
    monkeypatch.undo()
    strange = types.SimpleNamespace(n_vocab=9, eot_token=0, json='{"model": {"type": "WordPiece", "vocab": {}}}')
    with pytest.raises(UserError, match="a tokenizer of GPT-2's kind"):
        explore.make_page(model, strange)
    monkeypatch.setattr(explore.train_gpt2, "load_model", lambda source: (model, tokenizer))
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError), match="file"):  # a place that cannot be written, root's rights or not
        explore.main(["log", "--out", str(tmp_path / "file" / "page.html")])


@pytest.mark.slow
@needs_node
def test_an_exported_folder_becomes_a_page(made, tmp_path):
    model, tokenizer, _ = made
    model.save_pretrained(tmp_path / "hf")
    save_tokenizer(tokenizer, tmp_path / "hf")
    page = explore.main([str(tmp_path / "hf"), "--out", str(tmp_path / "deep" / "page.html"), "--text", "Return"])
    loaded, _ = load_model(str(tmp_path / "hf"))
    ids = tokenizer.encode_ordinary("Return the list")
    ours = node(page, "return explorer.run(explorer.encode(given)).logits", "Return the list")
    close(ours, reference(loaded, ids)[0])


# ---- the page in a browser

def look(page, script, width=1400, **view):
    """What the body of an async JavaScript function returns in Chromium, where `page` is the window of the page, opened
    from its file in a frame of this width; `$`, `$$` find nodes in it, `until` waits. The screenshot is next to it."""
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
@needs_chromium
def test_typing_drawing_and_switching(made):
    model, tokenizer, page = made
    opened, here, bars, off, tokens, written, stopped = look(page, """
        const opened = $("#text").value, shown = () => $$("#tokens .token").map(node => +node.dataset.id);
        const changed = async change => { page.explorer.took = 0; change(); await until(() => page.explorer.took); };
        page.Math.random = () => 0;                       // it draws the likeliest
        $("#text").value = "Return the items";
        await changed(() => $("#text").dispatchEvent(new page.Event("input")));
        await until(() => page.location.hash.includes("items"));
        await changed(() => page.dispatchEvent(new page.Event("hashchange")));       // nothing of it is lost
        const here = +$("#tokens .here").dataset.t;
        $("#temperature").dispatchEvent(new page.Event("input"));                    // it leaves top-k at 50
        const bars = $$(".bar").map(bar => [+bar.dataset.id, +bar.dataset.p]);
        await changed(() => $("#switches [data-part='1.2']").click());
        const off = [+$(".bar").dataset.id, $$("#compare th").map(node => node.textContent)];
        await changed(() => $("#all-on").click());
        off.push($$("#compare th")[1].textContent);
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
    losses = [torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(ids[1:])) / math.log(2)
              for rows in (logits, switched)]
    best, told = int(switched[-1].argmax()), [f"{loss:.2f}" for loss in losses]
    more = f"{float(told[1]) - float(told[0]):+.2f}"
    assert off == [best, [f"all on\n{told[0]} bits", f"now\n{told[1]} bits ({more})"], f"now\n{told[0]} bits"]
    assert tokens == written[0] == ids + [best] and (written[1], stopped) == ("Stop", "Write")


@pytest.mark.slow
@needs_chromium
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
@needs_chromium
@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("text", ["", LONG])
def test_it_is_readable_at_every_width(made, width, text):
    page = made[2]
    assert look(page, "return page.document.documentElement.scrollWidth;", width, text=text) <= width
    seen = imread(page.with_name("seen.png"))[:, :width]
    assert len(np.unique(seen)) > 100, "a blank picture has a handful of shades"
