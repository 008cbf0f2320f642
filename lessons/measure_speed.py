"""Speed, measured where you are: each benchmark does one thing in two ways, in turn, on the same machine.

    python lessons/measure_speed.py                               # all benchmarks
    python lessons/measure_speed.py tokenising --text web.txt     # one of them, on a text of your own

Other programs slow a machine down from one second to the next. So the ways take turns for several rounds, and
what counts is the median of the ratios, not the megabytes per second. Results are kept in
lessons/measured/speed_<device>.json, with the machine, the versions and the commit that they belong to.
"""
import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fineweb    # noqa: E402  (found through the line above)
import hellaswag  # noqa: E402

SHARD = 5_000_000       # tokens in a shard of the tokenising benchmark
WORKER = {}             # what a worker process keeps


def in_turn(ways, rounds):
    """Seconds of each way, by the clock and on the processors: two {name: [round 1, round 2 ...]}.

    The ways go A, B, A, B ... so that both meet the same disturbances. Processor time, children included,
    hardly feels them: with all cores busy throughout, its ratio is what the clock would show on a machine of
    one's own.
    """
    clock, work = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin, before = time.perf_counter(), sum(os.times()[:4])
            way()
            clock[name].append(time.perf_counter() - begin)
            work[name].append(sum(os.times()[:4]) - before)
    return clock, work


def median_ratio(first, second):
    return round(statistics.median(a / b for a, b in zip(first, second)), 2)


# ------------------------------------------------------------------------------------------------------------
# tokenising: documents to shards on the disk

def start_usual(encoding):
    WORKER["encoding"] = encoding


def tokenise_usual(text):
    """What most preparation scripts do: a Python list of tokens, then an array, document by document."""
    encoding = WORKER["encoding"]
    return np.array([encoding.eot_token] + encoding.encode_ordinary(text)).astype(np.uint16)


def write_usual(documents, out, encoding, workers):
    """The usual way, end to end: `Pool.imap` in chunks of 16 documents, an array that fills up, `np.save`."""
    shard, filled, number = np.empty(SHARD, np.uint16), 0, 0
    with multiprocessing.Pool(workers, start_usual, (encoding,)) as pool:
        for tokens in pool.imap(tokenise_usual, documents, chunksize=16):
            while len(tokens):
                piece, tokens = np.split(tokens, [SHARD - filled])
                shard[filled:filled + len(piece)] = piece
                filled += len(piece)
                if filled == SHARD:
                    np.save(Path(out, f"{number}.npy"), shard)
                    filled, number = 0, number + 1
    np.save(Path(out, f"{number}.npy"), shard[:filled])


def bench_tokenising(text=None, workers=2, rounds=5, megabytes=60):
    """`fineweb.write_shards` against the usual way, on documents of 4,500 characters.

    Returns MB/s of each (median), how many times faster ours is (median of the rounds; by processor time
    too), and where the time goes: the share of it in which the main process waits for the workers. While it
    waits, tokenising is what holds the job up, and more workers would help. """
    encoding = fineweb.load_tokenizer("gpt2")
    source = "a text file" if text else "builtin"
    text = Path(text).read_text(encoding="utf-8") if text else "\n\n".join(fineweb.builtin_documents())
    documents = [text[i:i + 4500] for i in range(0, len(text), 4500)]
    documents *= max(1, round(megabytes * 1e6 / len(text.encode())))
    size = sum(len(document.encode()) for document in documents)
    waited = []

    def usual():
        with tempfile.TemporaryDirectory() as out:
            write_usual(documents, out, encoding, workers)

    def ours():
        with tempfile.TemporaryDirectory() as out:
            cpu = time.process_time()
            begin = time.perf_counter()
            fineweb.write_shards(documents, out, encoding, shard_size=SHARD, workers=workers)
            waited.append(1 - (time.process_time() - cpu) / (time.perf_counter() - begin))

    clock, work = in_turn({"usual": usual, "ours": ours}, rounds)
    rate = {name: round(size / statistics.median(times) / 1e6, 1) for name, times in clock.items()}
    return {"usual_MB_per_s": rate["usual"], "ours_MB_per_s": rate["ours"],
            "times_faster": median_ratio(clock["usual"], clock["ours"]),
            "each_round": [round(a / b, 2) for a, b in zip(clock["usual"], clock["ours"])],
            "times_faster_by_processor_time": median_ratio(work["usual"], work["ours"]),
            "main_process_waits": round(statistics.median(waited), 2),
            "workers": workers, "megabytes": round(size / 1e6, 1), "text": source}


# ------------------------------------------------------------------------------------------------------------
# HellaSwag: from questions to the log p of every ending

def hellaswag_usual(model, examples, encode, autocast):
    """The usual way: a forward a question, its four rows padded, all logits -> sums of log p (n, 4)."""
    import torch
    sums, device = [], next(model.parameters()).device
    with torch.no_grad():
        for example in examples:
            _, tokens, mask, _ = hellaswag.render_example(example, encode)
            tokens, mask = tokens.to(device), mask.to(device)
            with autocast:
                logits, _ = model(tokens)
            losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(),
                                                       tokens[:, 1:].flatten(), reduction="none").view(4, -1)
            sums.append(-(losses * mask[:, 1:]).sum(1))
        return torch.stack(sums).double().cpu()


def bench_hellaswag(n=None, rounds=5):
    """`hellaswag.score` against the usual way: the 124M model, random weights, in float32 and in bfloat16.

    n questions (40; on a GPU 1,000), spread evenly over the file that HELLASWAG_DIR names or that is
    downloaded, or else the twelve of the tests. Returns for each dtype examples/s of each way (median), how
    many times faster ours is (median of the rounds; by processor time too), and by how much their sums of
    log p differ at most. """
    import torch
    import train_gpt2
    device = train_gpt2.pick_device("auto")
    try:
        examples = list(hellaswag.iterate_examples())
    except fineweb.UserError:
        examples = list(hellaswag.iterate_examples(path=ROOT / "tests" / "hellaswag_fixture.jsonl")) * 4
    n = min(n or (40 if device.type == "cpu" else 1000), len(examples))
    examples = examples[::len(examples) // n][:n]
    tokenizer = fineweb.load_tokenizer("gpt2")
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.TrainConfig()).to(device).eval()
    results = {"questions": n, "device": str(device), "threads": torch.get_num_threads()}
    for dtype in (torch.float32, torch.bfloat16):
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        sums = {}

        def usual():
            sums["usual"] = hellaswag_usual(model, examples, tokenizer.encode_ordinary, autocast)

        def ours():
            # packed: without the trial on one question, which is little beside 10,042 of them but much beside 40
            sums["ours"], _ = hellaswag.score(model, examples, tokenizer, dtype=dtype, packed=True)

        usual(), ours()  # once unmeasured: the first calls pick kernels and fill caches
        clock, work = in_turn({"usual": usual, "ours": ours}, rounds)
        name = str(dtype).removeprefix("torch.")
        for way, times in clock.items():
            results[f"{way}_per_s_{name}"] = round(n / statistics.median(times), 2)
        results[f"times_faster_{name}"] = median_ratio(clock["usual"], clock["ours"])
        results[f"times_faster_by_processor_time_{name}"] = median_ratio(work["usual"], work["ours"])
        results[f"each_round_{name}"] = [round(a / b, 2) for a, b in zip(clock["usual"], clock["ours"])]
        results[f"largest_difference_{name}"] = round((sums["usual"] - sums["ours"]).abs().max().item(), 5)
    return results


BENCHES = {"tokenising": bench_tokenising, "hellaswag": bench_hellaswag}


# ------------------------------------------------------------------------------------------------------------
# running and keeping

def machine():
    """What a number belongs to: processor, versions, commit, date."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    names = {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "tiktoken")}
    return {"date": datetime.date.today().isoformat(), "commit": commit or None, "versions": names,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"which ones: {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--text", help="a text file for the tokenising benchmark (default: the builtin text)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="names the file that keeps the results")
    parser.add_argument("--out", type=Path, default=ROOT / "lessons" / "measured")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    path = args.out / f"speed_{args.device}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    for name in args.names or BENCHES:
        options = {"text": args.text, "workers": args.workers} if name == "tokenising" else {}
        kept[name] = BENCHES[name](**options) | machine()
        print(name)
        for key, value in kept[name].items():
            print(f"    {key:32} {value}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
