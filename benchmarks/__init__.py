"""Benchmarks: one module a claim, peers beside, equality asserted before anything is timed.

    python -m benchmarks [NAME ...] [--size full|quick|tiny] [--out FOLDER]

A claim's module has `run(size, folder) -> Table`. Candidates take turns within one run (A B A B), medians are compared
as ratios, and machine and versions are written beside them: timings of different runs are never compared.
"""
