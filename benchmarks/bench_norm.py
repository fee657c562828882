"""Cases of normalisation under pytest-benchmark."""

GROUPS = ("norm",)


def test_time(benchmark, step):
    benchmark(step)
