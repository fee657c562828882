"""What every test shares: the cores are divided among the workers, and each test starts from the same seed."""

import os

import pytest
import torch


def pytest_configure():
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
