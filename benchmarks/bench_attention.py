"""Attention cases under pytest-benchmark."""

GROUPS = ("attention",)


def test_time(benchmark, step):
    benchmark(step)
