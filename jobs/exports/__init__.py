"""Formats that an autoencoder's atoms are exported in, one a module, and the folder that most of them write."""
