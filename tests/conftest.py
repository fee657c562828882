"""What every test shares: the cores are divided among the workers, and each test starts from the same seed
and number of threads."""

import os

import pytest
import torch


def pytest_configure():
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        # Of the processes that tests start, too: threads that wait for a core spin, and a rerun took five times as long.
        os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_modifyitems(items):
    """What is slow begins first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _start_and_end():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:  # a command that was run in this process chose its own
        torch.set_num_threads(threads)
