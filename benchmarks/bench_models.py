"""Whole models under pytest-benchmark."""

from benchmarks.cases import MODELS

GROUPS = MODELS


def test_time(benchmark, step):
    benchmark(step)
