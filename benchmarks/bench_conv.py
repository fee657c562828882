"""Convolution cases under pytest-benchmark."""

GROUPS = ("conv",)


def test_time(benchmark, step):
    benchmark(step)
