"""The order of the data: a function of seed and step, the same for any number of processes and any batch.

Every id of the hand-made shards below is unique, so that a window tells where it was cut from.
"""
import numpy as np
import pytest
import torch

from helpers import FakeWorld, tiny_config, write_shards
from train_gpt2 import Corpus, DataLoaderLite, TrainConfig, UserError, permutation, rows_of_step

T = 11  # block_size of the tiny config


def unique_shards(*lengths):
    """Shards of these lengths, holding 0, 1, 2 ... on from one shard to the next."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) for n, end in zip(lengths, ends)]


def windows_by_hand(shards, size=T):
    """Every window of every shard, in order: lists of size + 1 ids."""
    return [list(s[i:i + size + 1]) for s in shards for i in range(0, len(s), size) if i + size < len(s)]


@pytest.fixture
def shards():
    # 120 = 10 windows and 10 ids left; 11 ids are one too few for a window and its last target.
    return unique_shards(120, 5, 11, 12, 5000, 0, 1453)


@pytest.fixture
def corpus(tmp_path, shards):
    return Corpus(write_shards(tmp_path, shards), "train", T, 50257)


# ---- windows

def test_windows_are_consecutive_cuts_of_each_shard(corpus, shards):
    want = windows_by_hand(shards)
    assert corpus.n_windows == len(want) == 10 + 0 + 0 + 1 + 454 + 0 + 132
    assert corpus.n_tokens == sum(map(len, shards))
    got = corpus.windows(np.arange(len(want)))
    assert got.dtype == torch.int64 and got.shape == (len(want), T + 1)
    assert got.tolist() == want


def test_each_token_is_an_input_at_most_once(corpus):
    inputs = corpus.windows(np.arange(corpus.n_windows))[:, :-1].flatten()
    assert len(inputs.unique()) == len(inputs)


def test_what_is_left_over_is_less_than_a_window_and_a_target_per_shard(corpus, shards):
    assert corpus.n_tokens - corpus.n_windows * T <= len(shards) * T


def test_windows_come_in_the_order_asked_for(corpus, shards):
    numbers = np.array([11, 0, 10, 596, 9, 10])  # to and fro over the borders between shards, and one twice
    assert corpus.windows(numbers).tolist() == [windows_by_hand(shards)[i] for i in numbers]


def test_both_layouts_of_shards_are_read_alike(tmp_path, shards):
    shards = [s for s in shards if len(s)]
    npy = Corpus(write_shards(tmp_path / "npy", shards), "train", T, 50257)
    bin = Corpus(write_shards(tmp_path / "bin", shards, suffix=".bin"), "train", T, 50257)
    assert bin.n_tokens == npy.n_tokens and bin.n_windows == npy.n_windows
    everything = np.arange(npy.n_windows)
    assert torch.equal(bin.windows(everything), npy.windows(everything))


def test_shards_stay_on_disk(corpus):
    assert all(isinstance(s, np.memmap) for s in corpus.shards if len(s))


def test_splits_are_told_apart_and_shards_are_read_by_number(tmp_path):
    write_shards(tmp_path, [np.arange(100, 112)], split="val")
    write_shards(tmp_path, [np.arange(12 * i, 12 * i + 12) for i in range(12)])
    (tmp_path / "meta.json").write_text("{}")
    train, val = (Corpus(tmp_path, split, T, 50257) for split in ("train", "val"))
    assert val.windows([0])[0, 0] == 100 and val.n_windows == 1
    assert train.windows(range(12))[:, 0].tolist() == list(range(0, 144, 12))  # 000002 before 000010


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    """At once if they stand at the beginning of a shard, else when their window is read: never embedded."""
    foreign = np.zeros(50 * T)
    foreign[3] = 37
    with pytest.raises(UserError, match="text_train_000001.npy holds the id 37.*vocab_size"):
        Corpus(write_shards(tmp_path / "a", [np.zeros(50), foreign]), "train", T, 37)
    foreign[3], foreign[40 * T] = 0, 37  # the last target of window 39, and the first input of window 40
    corpus = Corpus(write_shards(tmp_path / "b", [np.zeros(50), foreign]), "train", T, 37)
    corpus.windows([0, 4 + 38, 4 + 41])  # the first shard has four windows
    for window in (4 + 39, 4 + 40):
        with pytest.raises(UserError, match="text_train_000001.npy holds the id 37"):
            corpus.windows([window])
    assert Corpus(tmp_path / "b", "train", T, 38).windows([4 + 39]).max() == 37


def test_no_shards_and_damaged_shards_are_refused(tmp_path):
    with pytest.raises(UserError, match="no train shards.*fineweb.py"):
        Corpus(tmp_path, "train", T, 50257)
    folder = write_shards(tmp_path, unique_shards(100), suffix=".bin")
    file = folder / "text_train_000000.bin"
    whole = file.read_bytes()
    for damage in (whole[:-2], whole + b"\0\0", b"\0" * len(whole), whole[:100], b""):
        file.write_bytes(damage)
        with pytest.raises(UserError, match="damaged"):
            Corpus(folder, "train", T, 50257)
    file.unlink()
    file = file.with_suffix(".npy")
    np.save(file, np.arange(100, dtype=np.uint16))
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match="damaged"):
        Corpus(folder, "train", T, 50257)
    for wrong in (np.zeros((10, 10), np.uint16), np.zeros(100, np.int64)):
        np.save(file, wrong)
        with pytest.raises(UserError, match="row of uint16"):
            Corpus(folder, "train", T, 50257)


# ---- the order

def rows(step, n_windows=50, n=4, **changes):
    return rows_of_step(step, n_windows, n, TrainConfig(**changes)).tolist()


def test_an_epoch_visits_every_window_once():
    """50 windows in steps of 4: twelve steps, and two windows that wait for another epoch."""
    for epoch in range(3):
        visited = [w for step in range(12 * epoch, 12 * epoch + 12) for w in rows(step)]
        assert len(visited) == 48 and len(set(visited)) == 48 and set(visited) <= set(range(50))


def test_another_epoch_or_seed_is_another_order():
    def epoch(number, **changes):
        return [w for step in range(12 * number, 12 * number + 12) for w in rows(step, **changes)]

    assert epoch(0) == epoch(0) and epoch(1) == epoch(1)
    assert len({tuple(epoch(e, seed=s)) for e in range(3) for s in (1337, 1338)}) == 6
    left_out = {tuple(set(range(50)) - set(epoch(e))) for e in range(8)}
    assert len(left_out) > 1  # no window is left out for good


def test_the_order_is_the_seeds_and_the_epochs_alone():
    permutation.cache_clear()
    late = rows(30)
    permutation.cache_clear()
    np.random.seed(5)
    torch.manual_seed(5)
    assert [rows(s) for s in range(31)][30] == late == rows(30, max_lr=1.0, block_size=7, max_steps=99)
    # Steps of 8 rows are those of 4 rows two by two, wherever an epoch has room for both.
    assert rows(3, n=8) == rows(6) + rows(7)


def test_without_shuffling_windows_come_in_order():
    assert [rows(s, shuffle=False) for s in (0, 1, 11)] == [[0, 1, 2, 3], [4, 5, 6, 7], [44, 45, 46, 47]]
    assert rows(12, shuffle=False) == [0, 1, 2, 3]


# ---- who reads what

def loader(corpus, B, rank=0, size=1, **changes):
    cfg = tiny_config(total_batch_size=16 * T, **changes)
    return DataLoaderLite(corpus, B, cfg, FakeWorld(rank, size))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size, B", [(1, 16), (1, 1), (1, 4), (2, 8), (2, 1), (2, 2), (4, 4), (4, 2), (8, 2),
                                     (8, 1)])
def test_any_number_of_processes_and_rows_reads_the_same_steps(corpus, shards, size, B, shuffle):
    """597 windows in steps of 16, 37 steps an epoch: the steps below cross borders of shards and epochs."""
    every = windows_by_hand(shards)
    parts = [loader(corpus, B, rank, size, shuffle=shuffle) for rank in range(size)]
    for step in (0, 1, 28, 29, 36, 37, 38, 100):
        want = [every[i] for i in rows_of_step(step, 597, 16, parts[0].cfg)]
        assert len({row[0] for row in want}) == 16
        batches = [part.batch(step) for part in parts]
        for rank, (x, y) in enumerate(batches):
            assert x.shape == y.shape == (16 // (size * B), B, T)
            for i in range(len(x)):  # micro-step i of process r takes rows (i*W + r)*B and on
                at = (i * size + rank) * B
                assert x[i].tolist() == [row[:-1] for row in want[at:at + B]]
                assert y[i].tolist() == [row[1:] for row in want[at:at + B]]
        read = [row[0] for x, _ in batches for row in x.flatten(0, 1).tolist()]
        assert sorted(read) == sorted(row[0] for row in want)


def test_targets_are_the_ids_that_follow(corpus):
    x, y = loader(corpus, 4).batch(5)
    assert torch.equal(y, x + 1)  # the shards count upwards
    assert torch.equal(x[:, :, 1:], y[:, :, :-1])


def test_an_epoch_reads_each_token_at_most_once(corpus):
    part = loader(corpus, 8)
    inputs = torch.cat([part.batch(step)[0].flatten() for step in range(37)])
    assert len(inputs.unique()) == len(inputs) == 37 * 16 * T
    unused = corpus.n_tokens - len(inputs)
    assert unused < 16 * T + (T + 1) * len(corpus.files)


def test_reading_ahead_changes_nothing(corpus):
    """Batches that were read ahead, or asked for out of turn, or read afresh are equal."""
    part = loader(corpus, 4, max_steps=50)
    for step in (0, 1, 2, 7, 8, 3, 3, 48, 49):
        got, fresh = part.batch(step), loader(corpus, 4, max_steps=50).read(step)
        assert torch.equal(got[0], fresh[:, :, :-1]) and torch.equal(got[1], fresh[:, :, 1:])
        assert list(part.ahead) == ([step + 1] if step < 49 else [])  # nothing for nobody


def test_the_next_step_is_read_only_once(corpus, monkeypatch):
    part, read = loader(corpus, 4), []
    original = part.read
    monkeypatch.setattr(part, "read", lambda step: read.append(step) or original(step))
    for step in range(4):
        part.batch(step)
    part.ahead[4].result()
    assert read == [0, 1, 2, 3, 4]


def test_a_wrong_id_read_ahead_is_told_when_its_step_comes(tmp_path):
    ids = np.zeros(T * 40 + 1)
    ids[T * 20] = 37
    corpus = Corpus(write_shards(tmp_path, [ids]), "train", T, 37)
    part = loader(corpus, 16, shuffle=False)
    part.batch(0)
    with pytest.raises(UserError, match="holds the id 37"):
        part.batch(1)
