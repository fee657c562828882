"""Cases of linear layers under pytest-benchmark."""

GROUPS = ("linear",)


def test_time(benchmark, step):
    benchmark(step)
