"""The pictures of the lessons, drawn with matplotlib and nothing else: they look the same in Jupyter, in Colab and on
GitHub, and change in one place.

    import figures                       # also sets fonts, colors and sizes for the plots of the notebook
    figures.gpt2_map("attn", "residual") # the map of GPT-2 with these parts lit
    figures.show(fig)                    # any figure, as a small and sharp PNG

Sizes are chosen so that every picture is at least 700 pixels wide and its text can be read without zooming.
"""
import io

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from PIL import Image

INK, QUIET, PALE, EDGE = "#2b3440", "#667080", "#f3f5f8", "#b6bfca"   # text, side remarks, a box at rest, its edge
LIT, LIT_EDGE, ROAD = "#ffdf9e", "#c9800a", "#dbe5ef"                  # a lit box, its edge, the residual stream
BLUE, ORANGE, GREEN, RED, VIOLET, GRAY = "#3b76af", "#dd8a2e", "#4c9a62", "#c8504f", "#8064a8", "#8a93a0"

plt.rcParams.update({
    "figure.dpi": 110, "savefig.dpi": 110, "figure.figsize": (8, 3.8), "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08,
    "font.size": 11, "axes.titlesize": 13, "axes.edgecolor": EDGE, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.8, "image.cmap": "Blues",
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, VIOLET, GRAY]),
})


def show(fig=None, alt="", colors=128):
    """Display a figure as a PNG with a palette (a third of the size), and close it. `alt` is for those who can't see."""
    from IPython.display import Image as Picture, display
    fig = fig or plt.gcf()
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    plt.close(fig)
    display(Picture(data=small.getvalue(), alt=alt))


# ---- what drawings are made of

def canvas(width, height, title=None):
    """An empty sheet of width x height units; a unit is a tenth of an inch, 11 pixels. -> (fig, ax)"""
    fig, ax = plt.subplots(figsize=(width / 10, height / 10), layout="none")
    ax.set_position([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    if title:
        ax.text(width / 2, height - 2, title, ha="center", va="center", size=13)
    return fig, ax


def box(ax, x, y, w, h, text, note="", lit=False, color=None, size=12, note_size=9.5):
    """A rounded box around the point (x, y): a name, and under it a remark in small letters."""
    face, edge = (LIT, LIT_EDGE) if lit else (color or PALE, EDGE)
    ax.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=0.9", zorder=3,
                                fc=face, ec=edge, lw=2.0 if lit else 1.2))
    lines = note.count("\n") + 1 if note else 0
    ax.text(x, y + 0.85 * lines, text, ha="center", va="center", size=size, zorder=4, weight="bold" if lit else "normal")
    if note:
        ax.text(x, y - 1.15, note, ha="center", va="center", size=note_size, color=INK if lit else QUIET, zorder=4,
                linespacing=1.25)


def arrow(ax, start, end, text="", color=GRAY, lw=1.6, bend=0.0, dashed=False, where=0.5, offset=(0, 1.1), size=10,
          ha="center", head=14, zorder=2):
    """An arrow from start to end, with a word beside it (at the share `where` of its way, moved by offset)."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=head, lw=lw, color=color, zorder=zorder,
                                 ls=(0, (4, 3)) if dashed else "-", shrinkA=0, shrinkB=0,
                                 connectionstyle=f"arc3,rad={bend}"))
    if text:
        x, y = (a + where * (b - a) for a, b in zip(start, end))
        ax.text(x + offset[0], y + offset[1], text, ha=ha, va="center", size=size, color=QUIET, zorder=4)


def path(ax, points, text="", color=GRAY, lw=1.6, dashed=False, at=None, size=10, ha="center", head=14, zorder=2):
    """A line with corners through the points, and an arrow's head at its end."""
    xs, ys = zip(*points)
    ax.plot(xs, ys, color=color, lw=lw, zorder=zorder, ls=(0, (4, 3)) if dashed else "-", solid_joinstyle="round")
    (x0, y0), (x1, y1) = points[-2:]
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    arrow(ax, (x1 - (x1 - x0) / length, y1 - (y1 - y0) / length), (x1, y1), color=color, lw=lw, head=head, zorder=zorder)
    if text:
        ax.text(*at, text, ha=ha, va="center", size=size, color=QUIET, zorder=4)


def plus(ax, x, y, lit=False, r=1.5):
    """The place where something is added to the stream."""
    ax.add_patch(Circle((x, y), r, fc=LIT if lit else "white", ec=LIT_EDGE if lit else EDGE, lw=1.6, zorder=4))
    ax.plot([x - 0.8, x + 0.8], [y, y], color=INK, lw=1.5, zorder=5)
    ax.plot([x, x], [y - 0.8, y + 0.8], color=INK, lw=1.5, zorder=5)


# ---- the map at the top of every lesson

PARTS = ("data tokenizer wte wpe residual ln_1 attn ln_2 mlp block ln_f lm_head softmax sampling loss backward ddp "
         "optimizer weights").split()


def gpt2_map(*lit):
    """The map of GPT-2 (124M), with the parts named lit: gpt2_map("attn", "residual"), or gpt2_map("all").

    The parts: data tokenizer wte wpe residual ln_1 attn ln_2 mlp block ln_f lm_head softmax sampling loss backward
    ddp optimizer weights. "block" lights its frame alone; "backward" is the arrow from the loss to the optimizer.
    """
    lit = set(PARTS) if lit == ("all",) else set(lit)
    assert lit <= set(PARTS), f"no such part: {sorted(lit - set(PARTS))}; there are {PARTS}"
    on = lit.__contains__
    fig, ax = canvas(112, 58)
    road = 29

    def part(name, x, y, w, h, text=None, note=""):
        box(ax, x, y, w, h, text or name, note, lit=on(name))

    # in: text, tokenizer, data, embeddings
    ax.text(9, 55, "text", ha="center", va="center", size=11, color=QUIET)
    arrow(ax, (9, 53.6), (9, 50.4))
    part("tokenizer", 9, 47, 15, 6.6, note="text to ids")
    arrow(ax, (9, 43.6), (9, 33))
    part("data", 9, road, 15, 7.6, note="shards, windows,\nbatches")
    path(ax, [(16.6, road), (19.5, road), (19.5, 37), (21.7, 37)])
    path(ax, [(16.6, road), (19.5, road), (19.5, 21), (21.7, 21)])
    ax.text(19, 41.6, "ids (B, T)", ha="center", va="center", size=10, color=QUIET)
    part("wte", 28.4, 37, 13.4, 6.6, note="what: (V, C)")
    part("wpe", 28.4, 21, 13.4, 6.6, note="where: (T, C)")
    path(ax, [(35.1, 37), (38, 37), (38, road + 1.6)])
    path(ax, [(35.1, 21), (38, 21), (38, road - 1.6)])

    # the block and the road through it
    ax.add_patch(FancyBboxPatch((42.2, 19), 40.4, 32, boxstyle="round,pad=0,rounding_size=1.2", fc="#fafbfc",
                                ec=LIT_EDGE if on("block") else EDGE, lw=2.4 if on("block") else 1.2, zorder=0))
    ax.text(62.4, 21.6, "Block, 12 times", ha="center", va="center", size=11.5,
            weight="bold" if on("block") else "normal", color=INK if on("block") else QUIET)
    ax.plot([38, 85.6], [road, road], color=LIT if on("residual") else ROAD, lw=13, zorder=1, solid_capstyle="butt")
    arrow(ax, (84, road), (88, road), color=LIT_EDGE if on("residual") else GRAY)
    if on("residual"):
        for edge in (road - 0.82, road + 0.82):
            ax.plot([38, 85.6], [edge, edge], color=LIT_EDGE, lw=1.2, zorder=1)
    ax.text(62.4, road - 3.4, "residual stream (B, T, C)", ha="center", va="center", size=10.5, zorder=4,
            weight="bold" if on("residual") else "normal", color=INK if on("residual") else QUIET)
    plus(ax, 38, road, lit=on("residual"))
    for x, ln, name, note in ((51, "ln_1", "attn", "tokens talk"), (70, "ln_2", "mlp", "each thinks alone")):
        arrow(ax, (x, road + 1), (x, 34.1))
        part(ln, x, 36.6, 13, 4.6)
        arrow(ax, (x, 39), (x, 41.4))
        part(name, x, 45, 15, 6.8, note=note)
        path(ax, [(x + 7.5, 45), (x + 9.3, 45), (x + 9.3, road + 1.6)])
        plus(ax, x + 9.3, road, lit=on("residual"))

    # out: logits, then a text or a loss
    part("ln_f", 91.5, road, 7, 5)
    arrow(ax, (95, road), (97.4, road))
    part("lm_head", 104.2, road, 13.2, 6.6, note="wte once more")
    arrow(ax, (104.2, 32.4), (104.2, 37.6), text="logits (B, T, V)", offset=(-1, 0), ha="right")
    part("softmax", 104.2, 40.6, 13.2, 5.6, note="")
    arrow(ax, (104.2, 43.5), (104.2, 46.6))
    part("sampling", 104.2, 49.6, 13.2, 5.6)
    path(ax, [(104.2, 52.5), (104.2, 55), (12, 55)], dashed=True)
    ax.text(60, 56.6, "one token more, and again", ha="center", va="center", size=10, color=QUIET)
    arrow(ax, (104.2, 25.6), (104.2, 9.8), text="logits", offset=(-1, 0), ha="right")
    path(ax, [(9, 25.1), (9, 13.6), (100.5, 13.6), (100.5, 9.8)], text="targets (B, T): the ids that come next",
         at=(28, 15.2))

    # the way back
    part("loss", 104.2, 6.4, 13.2, 6.4, note="-ln p, the mean")
    arrow(ax, (97.5, 6.4), (85.6, 6.4), color=LIT_EDGE if on("backward") else GRAY, lw=3 if on("backward") else 1.6,
          text="backward", offset=(0.4, 1.8), size=11 if on("backward") else 10)
    part("ddp", 77.8, 6.4, 15.4, 6.4, text="DDP", note="mean over GPUs")
    arrow(ax, (70, 6.4), (61.4, 6.4), text="gradients", offset=(0.2, 1.6))
    part("optimizer", 53.6, 6.4, 15.4, 6.4, note="AdamW, Muon")
    arrow(ax, (45.8, 6.4), (38.6, 6.4), text="update", offset=(0.2, 1.6))
    part("weights", 28.4, 6.4, 20.2, 6.4, note="124,439,808 numbers")
    path(ax, [(18.2, 6.4), (2, 6.4), (2, 12)], dashed=True)
    ax.text(3, 8.2, "to every part above", ha="left", va="center", size=9.5, color=QUIET)
    show(fig, alt="Map of GPT-2: text, tokenizer, data, wte + wpe, twelve blocks with attn and mlp that add to the "
                  f"residual stream, ln_f, lm_head, loss, optimizer. Lit: {', '.join(sorted(lit))}")


# ---- lesson 05

def merge_tree(word, steps, title):
    """The merges of a word as a tree. steps: in order, (place of the left piece, id of the new piece)."""
    gap, pieces = 100 / max(8, len(word)), []
    for i, letter in enumerate(word):
        x = (i - (len(word) - 1) / 2) * gap
        pieces.append(dict(x=x, level=0, text=letter.replace(" ", "␣"), id=None, kids=()))
    nodes = list(pieces)
    for place, new in steps:
        kids = pieces[place:place + 2]
        piece = dict(x=sum(kid["x"] for kid in kids) / 2, level=1 + max(kid["level"] for kid in kids), id=new,
                     text="".join(kid["text"] for kid in kids), kids=kids)
        pieces[place:place + 2] = [piece]
        nodes.append(piece)
    top = max(node["level"] for node in nodes)
    fig, ax = canvas(100, 14 + 9 * top, title)
    ys = [5 + 9 * level for level in range(top + 1)]
    for node in nodes:
        x, y = 50 + node["x"], ys[node["level"]]
        for kid in node["kids"]:
            ax.plot([50 + kid["x"], x], [ys[kid["level"]] + 2.4, y - 2.6], color=GRAY, lw=1.5, zorder=1)
        box(ax, x, y, max(gap * 0.55, 1.9 * len(node["text"]) + 1.6), 5.2 if node["id"] else 4.4, node["text"],
            "" if node["id"] is None else f"id {node['id']:,}", lit=any(node is piece for piece in pieces))
    show(fig, alt=f"The merges that build {word!r}, from its bytes at the bottom to its tokens")


# ---- lesson 06

def parameter_map(config):
    """All parameters of a GPT as one area: wte and wpe, then a column for each block, cut into its matrices."""
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    wte, wpe, block = V * C / 1e6, config.block_size * C / 1e6, 12 * C * C / 1e6
    start, y = wte + wpe, 1
    fig, ax = plt.subplots(figsize=(10, 4.4))

    def area(x, width, y, height, color):
        ax.add_patch(plt.Rectangle((x, y), width, height, fc=color, ec="white", lw=1))

    area(0, wte, 0, 1, BLUE)
    ax.text(wte / 2, 0.5, f"wte\n{V:,} x {C}\n{wte:.1f} million\n\none vector\nfor each token", ha="center",
            va="center", color="white", size=12, weight="bold")
    area(wte, wpe, 0, 1, RED)
    ax.annotate(f"wpe, {wpe:.1f} million", (wte + wpe / 2, 0), (wte + wpe / 2, -0.2), ha="center", color=RED,
                arrowprops=dict(arrowstyle="-", color=RED), annotation_clip=False)
    for name, squares, shape, color in (
            ("attn.c_attn", 3, f"{C} to {3 * C:,}", ORANGE), ("attn.c_proj", 1, f"{C} to {C}", GRAY),
            ("mlp.c_fc", 4, f"{C} to {4 * C:,}", GREEN), ("mlp.c_proj", 4, f"{4 * C:,} to {C}", VIOLET)):
        y -= squares / 12
        for i in range(L):
            area(start + i * block, block, y, squares / 12, color)
        ax.text(start + L * block / 2, y + squares / 24, f"{name}: {shape}, {squares * C * C * L / 1e6:.1f} million",
                ha="center", va="center", color="white", size=12, weight="bold", bbox=dict(fc=color, ec="none", pad=1))
    ax.set(xlim=(0, start + L * block), ylim=(0, 1), xlabel="million parameters", yticks=[])
    ax.spines[:].set_visible(False)
    top = ax.secondary_xaxis("top")
    top.set_ticks([start + (i + 0.5) * block for i in range(L)], [f"h.{i}" for i in range(L)], size=9)
    top.spines[:].set_visible(False)
    ax.set_title("Where do the parameters sit?")
    show(fig, alt="The parameters of GPT-2 as one area: wte on the left, then the matrices of each block")


# ---- lesson 07

def ridges(columns, title, xlabel):
    """Histograms, one for each layer, the first at the top. columns: {name: list of tensors, one for each layer}."""
    fig, axes = plt.subplots(1, len(columns), figsize=(10, 4.8), sharey=True, sharex=True)
    reach = 3.2 * max(layer.std().item() for layers in columns.values() for layer in layers)
    for ax, (name, layers) in zip(axes, columns.items()):
        for i, layer in enumerate(layers):
            counts, edges = layer.flatten().histogram(150, range=(-reach, reach))
            height, x = 1.7 * counts / counts.max(), (edges[:-1] + edges[1:]) / 2
            color = plt.cm.viridis(0.15 + 0.7 * i / len(layers))
            ax.fill_between(x, -i, height - i, color=color, alpha=0.85, lw=0, zorder=i)
            ax.plot(x, height - i, color="white", lw=0.9, zorder=i)
            ax.text(reach, 0.12 - i, f"{layer.std():.3f}", ha="right", size=9, color=QUIET, zorder=99)
        ax.set_title(name, size=11.5)
        ax.set(xlabel=xlabel, yticks=[-i for i in range(len(layers))], yticklabels=range(1, len(layers) + 1))
        ax.spines["left"].set_visible(False)
        ax.tick_params(left=False)
    axes[0].set_ylabel("after block")
    fig.suptitle(title, size=13)
    show(fig, alt=title)


# ---- lesson 08

def byte_roads(rungs, title):
    """Roads between memory and arithmetic, as wide as what travels on them. rungs: {name: {load: bytes}}."""
    loads, width = list(next(iter(rungs.values()))), 104 / len(rungs)
    widest = [max(rung[load] for rung in rungs.values()) for load in loads]
    scale = 34 / sum(widest)
    fig, ax = canvas(104, 14 + 34 + 3 * len(loads), title)
    top = 3 + 34 + 3 * len(loads)
    for n, (name, rung) in enumerate(rungs.items()):
        left, middle, y = n * width + 1, (n + 0.5) * width, top - 1.5
        ax.text(middle, top + 3, f"{name}: {sum(rung.values()) / 1e6:,.0f} MB", ha="center", size=12)
        for x, label in ((left, "memory"), (left + width - 7, "arithmetic")):
            ax.add_patch(plt.Rectangle((x, 2), 5, top - 2, fc=PALE, ec=EDGE, lw=1.2, zorder=3))
            ax.text(x + 2.5, top / 2, label, rotation=90, ha="center", va="center", size=13, zorder=4)
        for load, color, most in zip(loads, (RED, ORANGE, VIOLET, GREEN, BLUE, GRAY), widest):
            high, low = rung[load] * scale, y - most * scale
            ax.add_patch(plt.Rectangle((left + 5, low), width - 12, high, fc=color, alpha=0.8, lw=0, zorder=2))
            on_it = high > 2.2
            ax.text(middle - 1, low + high / 2 if on_it else low + high + 1.1, f"{load}: {rung[load] / 1e6:,.0f} MB",
                    ha="center", va="center", size=10.5, color="white" if on_it else INK, zorder=4,
                    weight="bold" if on_it else "normal")
            y = low - 3
    show(fig, alt=f"{title} " + "; ".join(f"{name}: {rung}" for name, rung in rungs.items()))


# ---- lesson 01

def backward_graph(result, rows, title="How does the slope find its way back?"):
    """The graph of an expression after backward(): what was computed, gray, left to right, and what came back, red.

    result: its last Value (it needs data, grad, name, parents, slopes). rows: {name: height}, 0 at the bottom.
    """
    depth, nodes = {}, []

    def place(v):
        if v not in depth:
            depth[v] = 1 + max((place(parent) for parent in v.parents), default=-1)
            nodes.append(v)
        return depth[v]

    place(result)
    height = 13 * (max(rows.values()) + 1) + 10
    fig, ax = canvas(104, height, title)
    at = {v: (12 + 80 * depth[v] / depth[result], 10 + 13 * rows[v.name]) for v in nodes}
    for v in nodes:
        x, y = at[v]
        box(ax, x, y, 17, 8.6, v.name, lit=v is result)
        ax.texts[-1].set_y(y + 1.9)
        ax.text(x - 0.5, y - 1.9, f"{v.data:g}", ha="right", va="center", size=11.5, zorder=5)
        ax.text(x + 0.5, y - 1.9, f" grad {v.grad:g}", ha="left", va="center", size=11.5, color=RED, zorder=5)
        ax.plot([x, x], [y - 3.2, y - 0.6], color=EDGE, lw=1, zorder=5)
        for parent, slope in zip(v.parents, v.slopes):
            (x0, y0), (x1, y1) = at[parent], (x, y)
            start, end = (x0 + 8.7, y0 + (y1 - y0) * 0.1), (x1 - 8.7, y1 - (y1 - y0) * 0.14)
            arrow(ax, (start[0], start[1] + 0.8), (end[0], end[1] + 0.8))
            arrow(ax, (end[0], end[1] - 0.8), (start[0], start[1] - 0.8), color=RED)
            ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, f"times {slope:g}", ha="center", va="center",
                    size=10.5, color=RED, zorder=6, bbox=dict(fc="white", ec="none", pad=1.5))
    ax.text(52, 2.4, "gray: the numbers are computed, left to right.   red: gradients come back, each path multiplies "
            "by its slope, and what meets is added", ha="center", va="center", size=10.5, color=QUIET)
    show(fig, alt="The graph of the expression, with each number, its gradient, and the slope of each connection")


# ---- lesson 03

def query_and_keys(words, query, keys, weights, title="Whom does the last word listen to?"):
    """Left: the query of the last word and the keys of all, as arrows in the plane. Right: the sentence, with arcs as
    wide as the weights."""
    fig, (plane, line) = plt.subplots(1, 2, figsize=(10.5, 4.4), width_ratios=(1, 1.35))
    reach = 1.15 * max(abs(number) for vector in [query, *keys] for number in vector)
    plane.axhline(0, color=EDGE, lw=0.8, zorder=0)
    plane.axvline(0, color=EDGE, lw=0.8, zorder=0)
    for word, key in zip(words, keys):
        arrow(plane, (0, 0), key, color=BLUE)
        long = max(1e-9, sum(number ** 2 for number in key) ** 0.5)
        plane.text(*(number * (1 + 0.24 / long) for number in key), f"k {word}", color=BLUE, ha="center", va="center",
                   bbox=dict(fc="white", ec="none", pad=0.6, alpha=0.8), zorder=4)
    arrow(plane, (0, 0), query, color=RED, lw=3, head=20)
    plane.text(query[0], query[1] - 0.26, f"q {words[-1]}", color=RED, ha="center", va="center", weight="bold")
    plane.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[],
              xlabel="is a thing", ylabel="is an action")
    plane.set_title("Which keys point with the query?")

    line.set(xlim=(-0.6, len(words) - 0.4), ylim=(-0.75, 3.2), xticks=[], yticks=[])
    line.spines[:].set_visible(False)
    last = len(words) - 1
    for s, (word, weight) in enumerate(zip(words, weights)):
        mine = s == last
        line.text(s, 0, word, ha="center", va="center", size=13, weight="bold" if mine else "normal",
                  color=RED if mine else INK)
        line.text(s, -0.5, f"{weight:.0%}", ha="center", va="center", size=11, color=QUIET)
        if not mine:
            line.add_patch(FancyArrowPatch((last, 0.3), (s, 0.3), arrowstyle="-|>", color=RED,
                                           mutation_scale=12 + 22 * weight, lw=0.8 + 9 * weight, alpha=0.75,
                                           shrinkA=2, shrinkB=2, connectionstyle=f"arc3,rad={0.22 + 0.1 * (last - s)}"))
    line.set_title(title)
    show(fig, alt="Query and keys as arrows, and the weights: " +
              ", ".join(f"{word} {weight:.0%}" for word, weight in zip(words, weights)))


# ---- lesson 04

def residual_stream(tokens=("the", "cat", "sat"), title="What happens to three tokens in a block?"):
    """Three lanes through a block: attention reads from earlier lanes into later ones, the MLP stays in its lane."""
    fig, ax = canvas(112, 17 * len(tokens) + 6, title)
    lanes = [17 * (len(tokens) - t) - 9.5 for t in range(len(tokens))]           # the first token is on top
    for t, (token, y) in enumerate(zip(tokens, lanes)):
        ax.plot([11, 105], [y, y], color=ROAD, lw=15, solid_capstyle="butt", zorder=1)
        arrow(ax, (104, y), (108.5, y))
        ax.text(10, y, token, ha="right", va="center", size=13)
        for x, ln, part in ((14, "ln_1", "attn"), (62, "ln_2", "mlp")):
            path(ax, [(x, y + 0.7), (x, y + 6.5), (x + 3, y + 6.5)])
            box(ax, x + 7, y + 6.5, 8, 4.4, ln, size=11)
            arrow(ax, (x + 11.1, y + 6.5), (x + 23, y + 6.5))
            box(ax, x + 28.6, y + 6.5, 11, 5, part, lit=True)
            path(ax, [(x + 34.2, y + 6.5), (x + 38, y + 6.5), (x + 38, y + 1.6)])
            plus(ax, x + 38, y)
        for s, earlier in enumerate(lanes[:t]):
            arrow(ax, (25.2, earlier + 5.6), (37, y + 7.6 - 0.9 * (t - s - 1)), color=RED, bend=-0.08, lw=1.5)
    ax.text(31, 2.2, "attn: keys and values of earlier tokens come in", ha="center", size=10.5, color=RED)
    ax.text(85, 2.2, "mlp: each token alone", ha="center", size=10.5, color=QUIET)
    show(fig, alt="Three lanes, one for each token. Attention reads from earlier lanes; the MLP does not")


# ---- lesson 09

def valley(paths):
    """The valley f(a, b) = (50 a^2 + b^2) / 2 from above, a panel for each path. paths: {name: (all a, all b)}."""
    import torch
    a, b = torch.meshgrid(torch.linspace(-1.05, 1.05, 120), torch.linspace(-0.7, 2.9, 120), indexing="ij")
    fig, axes = plt.subplots(len(paths), 1, figsize=(10, 2.4 * len(paths)), sharex=True, sharey=True)
    for ax, (name, (across, along)), color in zip(axes, paths.items(), (BLUE, GREEN, ORANGE)):
        ax.contourf(b, a, (50 * a ** 2 + b ** 2) / 2, [0, 0.1, 0.5, 1.5, 3, 6, 10, 15, 21, 30], cmap="Greys", alpha=0.5)
        ax.plot(along, across, "o-", color=color, ms=3.5, lw=1.4, label=name)
        ax.plot(along[0], across[0], "o", color=INK, ms=7)
        ax.plot(0, 0, "*", color=RED, ms=13)
        ax.set(ylabel="a (steep)", ylim=(-1.05, 1.05))
        ax.legend(loc="upper left", handlelength=1.2, frameon=True, framealpha=0.9, edgecolor="none")
    axes[0].set_title("Which road does each optimizer take to the star?")
    axes[-1].set_xlabel("b (flat)")
    show(fig, alt="A narrow valley seen from above and the paths of: " + ", ".join(paths))


# ---- lesson 10

def ring_rounds(vectors):
    """An all-reduce as a ring, round by round: [(what happens, the vectors after it)], the start first.

    Process r hands its chunk to process r + 1. In the first W - 1 rounds what arrives is added, in the last W - 1 it
    replaces what was there.
    """
    W, rounds = len(vectors), [("start", [list(v) for v in vectors])]
    for k in range(2 * W - 2):
        now = [list(v) for v in rounds[-1][1]]
        for r in range(W):
            chunk, to = ((r - k) if k < W - 1 else (r + 1 - (k - W + 1))) % W, (r + 1) % W
            sent = rounds[-1][1][r][chunk]
            now[to][chunk] = sent + now[to][chunk] if k < W - 1 else sent
        rounds.append((f"round {k + 1}: " + ("add" if k < W - 1 else "pass on"), now))
    return rounds


def ring(vectors):
    """Four processes in a ring with four numbers each, and the six rounds after which all hold the sums."""
    rounds = ring_rounds(vectors)
    total = [sum(column) for column in zip(*vectors)]
    fig, ax = canvas(112, 70, "How do four processes get the sum, if each talks to its neighbor only?")
    places = [(33, 60.5), (79, 60.5), (79, 46), (33, 46)]
    tints = [BLUE, ORANGE, GREEN, VIOLET]
    for r, (x, y) in enumerate(places):
        ax.add_patch(FancyBboxPatch((x - 14, y - 5), 28, 10, boxstyle="round,pad=0,rounding_size=1.2", fc=PALE,
                                    ec=tints[r], lw=2, zorder=3))
        ax.text(x, y + 2.6, f"process {r}", ha="center", va="center", size=12, zorder=4)
        for c, number in enumerate(vectors[r]):
            lit = c == r
            ax.add_patch(FancyBboxPatch((x - 12.4 + 6.4 * c, y - 4), 5.6, 4.4, boxstyle="round,pad=0,rounding_size=0.5",
                                        fc=LIT if lit else "white", ec=LIT_EDGE if lit else EDGE, lw=1.2, zorder=4))
            ax.text(x - 9.6 + 6.4 * c, y - 1.8, number, ha="center", va="center", size=11, zorder=5,
                    weight="bold" if lit else "normal")
    for r, (start, end, offset) in enumerate((((48, 60.5), (64, 60.5), (0, 1.6)), ((79, 55), (79, 51.5), (6.6, 0)),
                                              ((64, 46), (48, 46), (0, -1.8)), ((33, 51.5), (33, 55), (-6.6, 0)))):
        arrow(ax, start, end, f"sends {vectors[r][r]}", color=LIT_EDGE, lw=2.4, offset=offset, size=11, head=18)
    ax.text(56, 53.2, "round 1", ha="center", va="center", size=12, color=QUIET)
    for i, (caption, state) in enumerate(rounds):  # below, a table for each round: a row is a process
        left, top = 1.5 + 28 * (i % 4), 37 - 19.6 * (i // 4)
        ax.text(left + 12.6, top + 1.8, caption, ha="center", va="center", size=11)
        for r, row in enumerate(state):
            for c, number in enumerate(row):
                done, moved = number == total[c], i > 0 and number != rounds[i - 1][1][r][c]
                ax.add_patch(FancyBboxPatch((left + 6.3 * c, top - 3.7 * (r + 1)), 6.2, 3.5, boxstyle="square,pad=0",
                                            fc=LIT if done else "#e3ecf5" if moved else "white",
                                            ec=LIT_EDGE if moved else EDGE, lw=1.8 if moved else 0.8,
                                            zorder=4 if moved else 3))
                ax.text(left + 6.3 * c + 3.1, top - 3.7 * (r + 1) + 1.65, number, ha="center", va="center", size=11,
                        weight="bold" if done else "normal", zorder=5)
    ax.text(86, 9, "A row is a process.\nOrange frame: has just arrived.\nYellow: all four are in it.\n\n"
            "Each process has sent 6 numbers.\nWith its 4 numbers to each of the\n3 others it would have been 12.",
            ha="left", va="center", size=10, color=QUIET, linespacing=1.3)
    show(fig, alt="A ring of four processes with four numbers each; three rounds of adding and three of passing on, "
                  f"after which each holds {total}")


# ---- lesson 11

def data_flow():
    """From documents to shards, to windows, to one shuffled order, to the rows of a step and the processes."""
    from numpy.random import default_rng
    fig, ax = canvas(112, 76, "How does a pile of texts become the batch of step 1?")
    tints = ["#cfe0f1", "#f8dcc0", "#d5ead9"]
    documents = [("the cat sat", 11), ("dogs ran", 8), ("why not, said the owl", 21)]

    def label(y, name, note):
        ax.text(1, y + 1.2, name, ha="left", va="center", size=12, weight="bold")
        ax.text(1, y - 1.8, note, ha="left", va="center", size=9.5, color=QUIET, linespacing=1.25)

    def square(x, y, w, h, color, text="", edge="white", size=9, lw=0.8, weight="normal"):
        ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="square,pad=0", fc=color, ec=edge, lw=lw, zorder=3))
        ax.text(x + w / 2, y + h / 2 - 0.1, text, ha="center", va="center", size=size, zorder=4, weight=weight)

    label(66, "documents", "read one by one")
    x = 19
    for (text, n), tint in zip(documents, tints):
        w = 9 + 1.2 * n
        box(ax, x + w / 2, 66, w, 5.4, text, color=tint, size=12)
        x += w + 4
    label(54.5, "a row of ids", "a mark in front\nof each document")
    unit, row = 2.05, []
    for (text, n), tint in zip(documents, tints):
        for i in range(n + 1):
            row.append((i == 0, tint, "|" if i == 0 else text[i - 1]))
    for i, (mark, tint, letter) in enumerate(row):
        square(19 + unit * i, 53, unit, 4, INK if mark else tint, "" if mark else letter, size=10)
    arrow(ax, (60, 62.6), (60, 58.2), "tokenize", offset=(1, 0), ha="left")
    label(43.5, "shards", "files of 16 ids; for\nFineWeb 100 million")
    x, at = 19, 0
    for length in (16, 16, 11):
        for i, (mark, tint, letter) in enumerate(row[at:at + length]):
            square(x + unit * i, 42, unit, 4, INK if mark else tint, "" if mark else letter, size=10)
        ax.add_patch(FancyBboxPatch((x, 42), unit * length, 4, boxstyle="square,pad=0", fc="none", ec=INK, lw=1.6,
                                    zorder=5))
        x, at = x + unit * length + 1.4, at + length
    arrow(ax, (60, 52.2), (60, 47.2), "cut, wherever it falls", offset=(1, 0), ha="left")
    label(31.5, "windows", "T = 4 inputs each,\nand one id more")
    x, number, at = 19, 0, 0
    for length in (16, 16, 11):
        for w in range((length - 1) // 4):
            left = x + unit * 4 * w
            for i, (mark, tint, letter) in enumerate(row[at + 4 * w:at + 4 * w + 4]):
                square(left + unit * i, 30, unit, 4, INK if mark else tint, "" if mark else letter, size=10)
            ax.add_patch(FancyBboxPatch((left, 30), 4 * unit, 4, boxstyle="square,pad=0", fc="none", ec=INK, lw=1.6,
                                        zorder=5))
            ax.text(left + 2 * unit, 28.3, number, ha="center", va="center", size=11, weight="bold")
            number += 1
        left = x + unit * 4 * ((length - 1) // 4)
        over = length - 4 * ((length - 1) // 4)
        for i, (mark, tint, letter) in enumerate(row[at + length - over:at + length]):
            square(left + unit * i, 30, unit, 4, "#f0f0f0", "" if mark else letter, size=10)
        x, at = x + unit * length + 1.4, at + length
    ax.text(110.5, 25.6, "gray: never an input", ha="right", va="center", size=9.5, color=QUIET)
    arrow(ax, (60, 41.2), (60, 35.2), "cut again, and number", offset=(1, 0), ha="left")
    order = default_rng([1337, 0]).permutation(number).tolist()
    label(19, "one order", "drawn from\n(seed, epoch)")
    arrow(ax, (60, 27), (60, 22.6), "shuffle the numbers", offset=(1, 0), ha="left")
    for i, window in enumerate(order):
        square(31 + 7 * i, 17.4, 6, 4, "white", str(window), edge=INK, size=12, lw=1.2, weight="bold")
    label(6.5, "steps, ranks", "4 windows a step,\n2 for each process")
    for step in range(len(order) // 4):
        left = 31 + 28 * step
        ax.plot([left, left, left + 27, left + 27], [16.4, 15.6, 15.6, 16.4], color=GRAY, lw=1.4)
        ax.text(left + 13.5, 13.6, f"step {step}", ha="center", va="center", size=11)
        for rank, color in enumerate((BLUE, ORANGE)):
            windows = order[4 * step + 2 * rank:4 * step + 2 * rank + 2]
            ax.add_patch(FancyBboxPatch((left + 14 * rank, 4.6), 13, 6.4, boxstyle="round,pad=0,rounding_size=0.9",
                                        fc=PALE, ec=color, lw=2.2, zorder=3))
            ax.text(left + 14 * rank + 6.5, 9.2, f"process {rank}", ha="center", va="center", size=10.5, zorder=4)
            ax.text(left + 14 * rank + 6.5, 6.5, "   ".join(map(str, windows)), ha="center", va="center", size=12,
                    weight="bold", zorder=4)
            arrow(ax, (left + 13.5, 12.6), (left + 14 * rank + 6.5, 11.2), color=color, lw=1.4, head=9)
    rest = order[len(order) // 4 * 4:]
    if rest:
        ax.text(31 + 28 * (len(order) // 4) + 3.5 * len(rest), 13.6, "left over\nthis epoch", ha="center", va="center",
                size=9.5, color=QUIET)
    show(fig, alt="Three documents, the row of their ids with a mark before each, shards of 16 ids, windows of 4, "
                  "their shuffled numbers, and which process reads which of them in steps 0 and 1")


# ---- lesson 12

def log_anatomy(log, levels, warmup):
    """A log {stream: {step: value}}, its parts named. levels: {name: loss} of simpler models; warmup: in steps."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(10, 7), sharex=True, height_ratios=[2, 1])
    train, val = log["train"], log["val"]
    end, first = max(train), val[min(val)]
    top.plot(list(train), list(train.values()), lw=1, color=BLUE, label="train: one batch a point, so it jitters")
    top.plot(list(val), list(val.values()), "o-", color=ORANGE, label="val: the same text each time")
    for name, level in levels.items():
        top.axhline(level, color=GRAY, ls=":", lw=1.2)
        top.text(end, level - 0.05, name, ha="right", va="top", size=10.5, color=QUIET)

    def point(ax, text, xy, at):
        ax.annotate(text, xy, at, size=10.5, va="center", color=INK,
                    arrowprops=dict(arrowstyle="-|>", color=LIT_EDGE, lw=1.6),
                    bbox=dict(boxstyle="round,pad=0.4", fc=LIT, ec="none"))

    kink = next((step for step, loss in train.items() if loss < levels["frequencies"]), end)
    point(top, f"step 0, {first:.2f}: as good as a blind guess", (0, first), (0.12 * end, first + 0.28))
    point(top, f"step {kink}: knows which ids are common", (kink, train[kink]), (0.25 * end, train[kink] + 0.25))
    last = list(val)[-2:]
    point(top, f"from step {last[0]} to {last[1]}: {val[last[0]] - val[last[1]]:.3f} nats", (last[1], val[last[1]]),
          (0.62 * end, val[last[1]] + 0.95))
    top.set(ylabel="loss, nats a token", ylim=(min(min(train.values()), *levels.values()) - 0.5, first + 0.6),
            title="What has the model understood so far?")
    top.legend(loc="lower left")
    rate, norm = log["lr"], log["norm"]
    bottom.plot(list(norm), list(norm.values()), lw=1, color=VIOLET, label="norm of the gradient")
    bottom.plot(list(rate), [value / max(rate.values()) for value in rate.values()], color=GREEN,
                label=f"learning rate (1 is {max(rate.values()):g})")
    bottom.axhline(1.0, color=RED, ls=":", lw=1.2, label="grad_clip: a longer gradient is cut to this")
    point(bottom, f"warm-up ends: step {warmup}", (warmup, 1), (0.12 * end, 2.6))
    bottom.set(xlabel="step", ylim=(0, max(3.2, 1.1 * max(norm.values()))), title="Are the steps of a sane size?")
    bottom.legend(loc="upper right")
    show(fig, alt="A log with its parts named: losses above, norm and learning rate below")


# ---- lesson 13

def circles(matrices, labels, title="What does an update do to a circle?"):
    """What each 2 x 2 matrix makes of the unit circle, and of the two singular directions of the first matrix."""
    import torch
    angle = torch.linspace(0, 2 * torch.pi, 200)
    circle = torch.stack([angle.cos(), angle.sin()])
    directions = torch.linalg.svd(matrices[0]).Vh
    wide, high = (max(1.0, *(matrix[i].norm().item() for matrix in matrices)) + 0.5 for i in (0, 1))
    fig, axes = plt.subplots(1, len(matrices), figsize=(10, 10 / len(matrices) * high / wide + 0.8))
    for ax, matrix, label in zip(axes, matrices, labels):
        ax.plot(*circle, color=EDGE, lw=1.2)
        ax.plot(*(matrix @ circle), color=INK, lw=2)
        for direction, color in zip(directions, (BLUE, ORANGE)):
            end = matrix @ direction
            ax.plot(*direction, "o", mfc="white", mec=color, ms=7, zorder=5)
            ax.annotate("", end, (0, 0), arrowprops=dict(arrowstyle="-|>", color=color, lw=2.4, mutation_scale=16))
            place = end + 0.3 * end / end.norm() if end.norm() > 0.6 else 1.3 * direction
            ax.text(*place, f"{end.norm():.2f}", ha="center", va="center", color=color, size=12)
        ax.set(xlim=(-wide, wide), ylim=(-high, high), aspect="equal", xticks=[], yticks=[])
        ax.set_title(label, size=12)
        ax.spines[:].set_visible(False)
    fig.suptitle(title, size=13)
    show(fig, alt=f"{title} Under each matrix, the unit circle and two directions: {', '.join(labels)}")


# ---- lesson 14

def head_grid(values, title, form="{:.2f}"):
    """A number for each head, (L, nh), as a table whose cells are the darker the larger they are."""
    L, nh = values.shape
    fig, ax = plt.subplots(figsize=(max(8, 0.8 * nh), 0.9 + 0.6 * L))
    limit = values.abs().max()
    ax.imshow(values, vmin=0, vmax=limit, aspect="auto")
    for layer in range(L):
        for head in range(nh):
            value = values[layer, head]
            ax.text(head, layer, form.format(value), ha="center", va="center", size=11 if nh > 8 else 13,
                    color="white" if value > 0.6 * limit else INK)
    ax.set(xticks=range(nh), yticks=range(L), xticklabels=[f"head {i}" if nh < 9 else i for i in range(nh)],
           yticklabels=[f"layer {i}" for i in range(L)], title=title)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    show(fig, alt=title)


def attention_maps(maps, tokens, names, title):
    """Square maps of weights, (n, T, T), side by side: a row looks, a column is looked at."""
    fig, axes = plt.subplots(1, len(maps), figsize=(10, 10 / len(maps) + 0.4))
    for ax, weights, name in zip(axes, maps, names):
        ax.imshow(weights, vmin=0, vmax=1)
        ax.set_xticks(range(len(tokens)), tokens, family="monospace")
        ax.set_yticks(range(len(tokens)), tokens, family="monospace")
        ax.set(xlabel="is looked at", ylabel="looks")
        ax.set_title(name, size=12)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    fig.suptitle(title, size=13)
    show(fig, alt=f"{title} {', '.join(names)}")


def arcs(tokens, looks, title):
    """A line of tokens, and where heads look from some of them. looks: [(position, weights over positions, name)]."""
    fig, ax = canvas(112, 6 + 12 * len(looks), title)
    gap = 104 / len(tokens)
    for row, (at, weights, name) in enumerate(looks):
        y = 12 * (len(looks) - row) - 8
        for i, token in enumerate(tokens):
            ax.text(4 + gap * (i + 0.5), y, token.replace(" ", "␣"), ha="center", va="center", family="monospace",
                    size=12.5, weight="bold" if i == at else "normal", color=INK if i <= at else EDGE)
        for i in range(at + 1):
            if weights[i] > 0.05:
                arrow(ax, (4 + gap * (at + 0.5), y + 1.6), (4 + gap * (i + 0.5), y + 1.6), color=(GREEN, RED)[row % 2],
                      lw=0.6 + 5 * float(weights[i]), bend=0.9 if at - i < 3 else 0.12, head=12)
        ax.text(2, y + 6.6, name, ha="left", va="center", size=11, color=(GREEN, RED)[row % 2])
    show(fig, alt=f"{title} {', '.join(name for _, _, name in looks)}")


def lens_table(tokens, rows, title):
    """The best guess at each position after each layer, the darker the likelier was what really came.

    rows: [(name, guesses, probabilities of the right token)], the last layer first.
    """
    fig, ax = plt.subplots(figsize=(10.5, 1.3 + 0.52 * len(rows)))
    ax.imshow([chances for _, _, chances in rows], vmin=0, vmax=1, aspect="auto")
    for y, (_, guesses, chances) in enumerate(rows):
        for x, (guess, chance) in enumerate(zip(guesses, chances)):
            ax.text(x, y, guess, ha="center", va="center", family="monospace", size=12,
                    color="white" if chance > 0.55 else INK)
    ax.set_xticks(range(len(tokens)), tokens, family="monospace", size=12)
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    ax.set(xlabel="the text it has read up to here", title=title)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    show(fig, alt=title)
