"""The picture of a log: losses and HellaSwag against GPT-2, below them learning rate, norm and speed.

    python lessons/plot_log.py log                     draws log/log.png
    python lessons/plot_log.py log log/earlier-1       several runs in one picture
    python lessons/plot_log.py log --out curves.svg    somewhere else, in any format that matplotlib writes

It reads the log.txt of a folder, or any file with lines `step stream value`, build-nanogpt's logs among them.
"""
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fineweb import Parser, UserError, read_json  # noqa: E402

# GPT-2 (124M) on FineWeb-Edu's val shard and on HellaSwag (build-nanogpt's figures), and two public runs of
# the paper run's recipe on the same text, {step: value}. The first of them had twice our max_lr.
GPT2_124M = dict(loss=3.2924, hella=0.294463)
PUBLIC_RUNS = {
    "sukhvir-notra/gpt2": dict(
        loss={0: 10.952, 250: 5.934, 500: 5.039, 1000: 3.984, 2000: 3.580, 5000: 3.322, 10000: 3.174, 15000: 3.084,
              19072: 3.041},
        hella={0: 0.2495, 1000: 0.2627, 2000: 0.2682, 5000: 0.2767, 10000: 0.2900, 15000: 0.3007, 19072: 0.3073}),
    "logbob0401/build-nanogpt": dict(
        loss={0: 10.951, 250: 6.144, 500: 5.274, 1000: 4.137, 2000: 3.646, 5000: 3.335, 10000: 3.176, 15000: 3.086,
              19072: 3.053},
        hella={0: 0.2490, 1000: 0.2566, 2000: 0.2614, 5000: 0.2769, 10000: 0.2917, 15000: 0.2979, 19072: 0.3022}),
}
TITLES = {"loss": "loss: train (thin), val (dots)", "hella": "HellaSwag, acc_norm", "lr": "learning rate",
          "norm": "norm of the gradient", "tok/s": "tokens a second"}


def read_log(source):
    """A log folder or a log file -> ({stream: {step: value}}, the config.json beside it or {}).

    "7 val 3.5\\n" gives {"val": {7: 3.5}}. The last value of a step counts, since a resumed run repeats steps;
    half a line, which a killed run may leave at the end, does not.
    """
    path, values = Path(source), {}
    files = [path] if path.is_file() else sorted(path.glob("*log.txt"), key=lambda file: len(file.name))
    for line in files[0].read_text(errors="replace").splitlines(keepends=True) if files else []:
        if found := re.fullmatch(r"(\d+) (\S+) (-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|-?inf)\n", line):
            values.setdefault(found[2], {})[int(found[1])] = float(found[3])
    if not values:
        raise UserError(f"{source}: no log.txt with lines `step stream value` is here")
    config = files[0].with_name("config.json")
    return values, read_json(config) if config.exists() else {}


def draw_logs(logs):
    """{name: what read_log returned} -> a matplotlib figure.

    GPT-2's lines and the public runs are drawn only beside runs on their text in their vocabulary, since other
    losses do not compare. A log without a config.json is taken to be build-nanogpt's, which is one of them.
    """
    from matplotlib.figure import Figure  # pyplot would keep every figure, and may look for a screen
    streams = {stream for values, _ in logs.values() for stream in values}
    rows = [name for name in ("lr", "norm", "tok/s") if name in streams]
    rows = [["loss", "hella"] if "hella" in streams else ["loss"]] + ([rows] if rows else [])
    figure = Figure(figsize=(10, 1.5 + 2.5 * len(rows)), layout="constrained")
    panels = figure.subplot_mosaic([[name for name in row for _ in range(6 // len(row))] for row in rows],
                                   height_ratios=[2, 1][:len(rows)])
    for number, (name, (values, config)) in enumerate(logs.items()):
        text = f" on {Path(config['data_dir']).name}" if "data_dir" in config else ""
        for stream in sorted(values.keys() & {"train", "val", *panels}):  # val after train, so it lies on top
            points = sorted((step, value) for step, value in values[stream].items() if math.isfinite(value))
            look = dict(linewidth=0.7, alpha=0.7)
            if points and stream in ("val", "hella"):
                look = dict(marker=".", label=f"{name}: {points[-1][1]:.4f}" + (text if stream == "val" else ""))
            panels["loss" if stream in ("train", "val") else stream].plot(*zip(*points), color=f"C{number}", **look)
    # The folder's name tells which text it is: fineweb.py calls FineWeb-Edu's data/edu_fineweb10B.
    comparable = [values for values, config in logs.values() if "edu" in Path(config.get("data_dir", "edu")).name
                  and config.get("vocab_size", 50304) in (50257, 50304)]
    end = max((step for values in comparable for points in values.values() for step in points), default=0)
    for name in panels.keys() & GPT2_124M.keys() if comparable else ():
        panels[name].axhline(GPT2_124M[name], color="red", label=f"GPT-2 (124M): {GPT2_124M[name]:.4f}")
        for marker, (run, points) in zip("xd", PUBLIC_RUNS.items()):
            if run in logs:  # drawn as a log already
                continue
            steps = [step for step in points[name] if step <= end]
            panels[name].scatter(steps, [points[name][step] for step in steps], marker=marker, c="gray", label=run,
                                 zorder=3)  # above the curves
    if comparable and "hella" in panels:
        panels["hella"].axhline(0.337, color="green", label="GPT-3 (125M): 0.337")
    for name, panel in panels.items():
        panel.set(title=TITLES[name], xlabel="step")
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", nbins=6)
        if name in ("loss", "hella") and panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    panels["loss"].set_yscale("log")  # the end of a run, where little moves, deserves room too
    panels["loss"].yaxis.set_major_formatter("{x:g}")
    panels["loss"].yaxis.set_minor_formatter("{x:g}")
    return figure


def main(argv=None):
    """Draw the logs that a command line names -> the picture's file. UserError on wrong input."""
    parser = Parser(prog="plot_log.py", description="draw one or more logs as one picture")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="a log folder, or a file like its log.txt")
    parser.add_argument("--out", help="the picture, .png or .svg; without it log.png beside the first log")
    args = parser.parse_args(argv)
    logs = {source: read_log(source) for source in args.logs}
    first = Path(args.logs[0])
    path = Path(args.out or (first.parent if first.is_file() else first) / "log.png")
    try:
        draw_logs(logs).savefig(path, dpi=160)
    except ImportError:
        raise UserError("the picture needs a package that is not here: pip install matplotlib") from None
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise UserError(f"{path} can't be written: {error}") from error
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"plot_log.py: {error}", file=sys.stderr)
        sys.exit(2)
