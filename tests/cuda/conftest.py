"""Everything in this folder runs on a GPU, and is left out where there is none or the binary has no CUDA kernels."""

import pytest
import torch

from bigmodel_kernels import _extension
from bigmodel_kernels.testing import tf32


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        why = "no GPU was found"
    elif not _extension.has_kernel("lstm_sequence_fwd", "CUDA"):
        why = "the binary was built without CUDA kernels: make cuda"
    else:
        return
    for item in items:
        if "tests/cuda/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def _device_left_clean():
    """float32 means IEEE float32 here, in PyTorch's own ops as in ours; tests of TF32 ask for it."""
    with tf32(False):
        yield
    torch.cuda.synchronize()  # an error of a kernel is reported by the test that ran it
