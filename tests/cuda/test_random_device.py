"""Random calls of each family on the GPU. `python -m tests.cuda.random_cases FAMILY` runs thousands of them."""

import time

import pytest

from tests.cuda import random_cases


@pytest.mark.parametrize("family", random_cases.FAMILIES)
def test_random(family, capsys):
    seed = time.time_ns() % (1 << 31)
    outcome = random_cases.run(family, range(100), seed=seed, device="cuda", backends=("cuda", "triton"), seconds=60)
    with capsys.disabled():
        print(f"\n{family}: {outcome}")
    assert not outcome.failures, str(outcome)
    assert outcome.ran["cuda"] + outcome.ran["triton"] > 0, str(outcome)
