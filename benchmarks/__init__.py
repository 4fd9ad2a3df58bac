"""Measurements, one a module; `make bench` runs those that need no GPU."""
