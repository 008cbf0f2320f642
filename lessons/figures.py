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
