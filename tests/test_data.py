"""The order of the data: a function of seed and step, the same for any number of processes and any batch.

Every id of the hand-made shards below is unique, so that a window tells where it was cut from.
"""
import numpy as np
import pytest
import torch

from helpers import FakeWorld, tiny_config, write_shards
from train_gpt2 import Corpus, DataLoaderLite, TrainConfig, UserError, permutation, rows_of_step

T = 11  # block_size of the tiny config


@pytest.fixture
def shards():
    """They hold 0, 1, 2 ... on from one shard to the next."""
    # 120 = 10 windows and 10 ids left; 11 ids are one too few for a window and its last target.
    return np.split(np.arange(6601), np.cumsum([120, 5, 11, 12, 5000, 0]))


@pytest.fixture
def every(shards):
    """All windows by hand, in order: lists of T + 1 ids."""
    return [list(s[i:i + T + 1]) for s in shards for i in range(0, len(s), T) if i + T < len(s)]


@pytest.fixture
def corpus(tmp_path, shards):
    return Corpus(write_shards(tmp_path, shards), "train", T, 50257)


# ---- windows

def test_windows_are_consecutive_cuts_of_each_shard(corpus, every):
    assert corpus.n_windows == len(every) == 10 + 0 + 0 + 1 + 454 + 0 + 132 and corpus.n_tokens == 6601
    got = corpus.windows(np.arange(len(every)))
    assert got.dtype == torch.int64 and got.tolist() == every
    numbers = [11, 0, 10, 596, 9, 10]  # to and fro over the borders between shards, and one twice
    assert corpus.windows(numbers).tolist() == [every[i] for i in numbers]


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_both_layouts_of_shards_are_read_in_the_order_of_their_numbers(tmp_path, suffix):
    """And splits are told apart."""
    ids = np.arange(144).reshape(12, 12)
    folder = write_shards(tmp_path, ids, suffix=suffix)
    write_shards(folder, [np.arange(200, 212)], split="val", suffix=suffix)
    train, val = (Corpus(folder, split, T, 50257) for split in ("train", "val"))
    assert train.windows(range(12)).tolist() == ids.tolist()  # 000002 before 000010
    assert val.windows([0]).tolist() == [list(range(200, 212))] and val.n_windows == 1


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
    part = DataLoaderLite(corpus, 2, tiny_config(total_batch_size=22 * T, shuffle=False), FakeWorld())
    part.batch(0)  # reads windows 22 to 43 ahead, and says nothing until their step comes
    with pytest.raises(UserError, match="holds the id 37"):
        part.batch(1)


# ---- the order

def rows(step, n=4, **changes):
    """50 windows in steps of 4: twelve steps are an epoch, and two windows wait for another."""
    return rows_of_step(step, 50, n, TrainConfig(**changes)).tolist()


def test_each_epoch_visits_every_window_once_in_an_order_of_its_own():
    """Of the seed and the epoch alone, whatever was drawn or asked for before."""
    orders = {}
    for seed in (1337, 1338):
        for epoch in range(4):
            visited = [w for step in range(12 * epoch, 12 * epoch + 12) for w in rows(step, seed=seed)]
            assert len(visited) == len(set(visited)) == 48 and set(visited) <= set(range(50))
            orders[seed, epoch] = visited
    assert len(set(map(tuple, orders.values()))) == 8
    assert len({tuple(set(range(50)) - set(visited)) for visited in orders.values()}) > 1  # none waits for good
    permutation.cache_clear()
    np.random.seed(5)
    torch.manual_seed(5)
    assert rows(30, max_lr=1.0, block_size=7, max_steps=99) == orders[1337, 2][24:28]
    assert rows(3, n=8) == orders[1337, 0][24:32]  # steps of 8 rows are those of 4 rows, two by two


def test_without_shuffling_windows_come_in_order():
    assert [rows(s, shuffle=False) for s in (0, 1, 11, 12)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [44, 45, 46, 47], [0, 1, 2, 3]]


# ---- who reads what

def loader(corpus, B, rank=0, size=1, **changes):
    """597 windows in steps of 16: 37 steps are an epoch."""
    cfg = tiny_config(total_batch_size=16 * T, **changes)
    return DataLoaderLite(corpus, B, cfg, FakeWorld(rank, size))


@pytest.mark.parametrize("size, B", [(1, 16), (1, 4), (2, 8), (4, 2), (8, 1)])
def test_any_number_of_processes_and_rows_reads_the_same_steps(corpus, every, size, B):
    """Steps on both sides of borders between shards and epochs."""
    parts = [loader(corpus, B, rank, size) for rank in range(size)]
    for step in (0, 28, 29, 36, 37, 38, 100):
        want = torch.tensor([every[i] for i in rows_of_step(step, 597, 16, parts[0].cfg)])
        assert len(want.unique(dim=0)) == 16
        for rank, part in enumerate(parts):
            x, y = part.batch(step)
            # Micro-step i of process r takes rows (i*W + r)*B and on.
            mine = torch.cat([want[at + rank * B:at + rank * B + B] for at in range(0, 16, size * B)])
            assert x.shape == y.shape == (16 // (size * B), B, T)
            assert torch.equal(x.flatten(0, 1), mine[:, :-1]) and torch.equal(y.flatten(0, 1), mine[:, 1:])


def test_an_epoch_reads_each_token_at_most_once(corpus):
    part = loader(corpus, 8)
    inputs = torch.cat([part.batch(step)[0].flatten() for step in range(37)])
    assert len(inputs.unique()) == len(inputs) == 37 * 16 * T


def test_reading_ahead_changes_nothing_and_reads_no_step_twice(corpus, monkeypatch):
    """Batches that were read ahead, or asked for out of turn, or read afresh are equal."""
    part, read = loader(corpus, 4, max_steps=50), []
    original = part.read
    monkeypatch.setattr(part, "read", lambda step: read.append(step) or original(step))
    for step in (0, 1, 2, 7, 8, 3, 3, 48, 49):
        (x, y), fresh = part.batch(step), loader(corpus, 4, max_steps=50).read(step)
        assert torch.equal(x, fresh[:, :, :-1]) and torch.equal(y, fresh[:, :, 1:])
        assert list(part.ahead) == ([step + 1] if step < 49 else [])  # none past the last
    part.thread.shutdown()  # waits for what it still reads
    assert read == [0, 1, 2, 3, 7, 8, 9, 3, 4, 3, 4, 48, 49]
