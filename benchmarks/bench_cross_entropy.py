"""Cases of cross-entropy under pytest-benchmark."""

GROUPS = ("cross_entropy",)


def test_time(benchmark, step):
    benchmark(step)
