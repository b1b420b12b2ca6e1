"""Measured claims: each script prints what README and BENCHMARKS.md say."""
