"""LSTM cases under pytest-benchmark."""

GROUPS = ("lstm",)


def test_time(benchmark, step):
    benchmark(step)
