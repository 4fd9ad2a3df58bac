"""Measurements: `make bench` runs every bench_*.py that needs no GPU."""
