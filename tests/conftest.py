"""What every test file shares: the import path, one quiet thread policy, and real data where a machine has it."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Tiny tensors: on a machine that others use too, threads that wait by spinning take longer than what they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Nothing in the tests may reach the network; a hub that is asked all the same must fail at once, not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds (training runs, several processes)")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with `data`, the shards that the runs of launch.py read."""
    import launch
    folder = tmp_path_factory.mktemp("base")
    launch.write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def whole(base):
    """The log folder of launch.py's run, undisturbed, by one process."""
    import launch
    launch.run(launch.command(base, "whole"), base)
    return base / "whole"


@pytest.fixture(scope="session")
def whole_of_two(base):
    """The same by two processes; their sums are rounded in another order."""
    import launch
    launch.run_many(2, launch.command(base, "whole_of_two"), base)
    return base / "whole_of_two"


@pytest.fixture
def real_data():
    """Folder with fineweb-edu/, tinystories/, wikitext-2/, hellaswag/, logs/ (see README, "Tests"), or a skip."""
    folder = os.environ.get("GPT2_TEST_DATA")
    if not folder:
        pytest.skip("GPT2_TEST_DATA names no folder with real text")
    return Path(folder).resolve()


@pytest.fixture
def gpt2_tokenizer():
    """OpenAI's GPT-2 vocabulary through tiktoken, or a skip where neither a cache nor a network has it."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: no GPT-2 vocabulary offline")
    import tiktoken
    return tiktoken.get_encoding("gpt2")
