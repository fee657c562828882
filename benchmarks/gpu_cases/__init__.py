"""The cases of `python -m benchmarks.gpu_measure`, one file per op, one for whole models: `measure(bench)` runs them."""
