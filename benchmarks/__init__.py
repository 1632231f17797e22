"""Benchmarks: ours against the alternatives, on real weights and real text. See README.md beside this file."""
