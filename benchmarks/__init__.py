"""Measurements, one a module; `make bench` runs them all; those for a GPU end at once where there is none."""
