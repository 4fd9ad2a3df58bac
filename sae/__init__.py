"""Sparse autoencoders as a data lake."""
