"""Random calls of each family on the GPU: BIGMODEL_RANDOM_CASES of them (200 by default), BIGMODEL_RANDOM_SEED or a seed of the
clock, which is printed, BIGMODEL_RANDOM_SECONDS at most."""

import os
import time

import pytest
import torch

from tests.cuda import random_cases

COUNT = int(os.environ.get("BIGMODEL_RANDOM_CASES", "200"))
SECONDS = float(os.environ.get("BIGMODEL_RANDOM_SECONDS", "60"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("family", random_cases.FAMILIES)
def test_random(family, capsys):
    seed = int(os.environ.get("BIGMODEL_RANDOM_SEED", time.time_ns() % (1 << 31)))
    outcome = random_cases.run(
        family, COUNT, seed=seed, device="cuda", backends=("cuda", "triton"), dtypes=DTYPES, seconds=SECONDS
    )
    with capsys.disabled():
        print(f"\n{family}: {outcome}")
    assert not outcome.failures, str(outcome)
    assert outcome.ran["cuda"] + outcome.ran["triton"] > 0, str(outcome)
