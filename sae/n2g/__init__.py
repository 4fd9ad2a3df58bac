"""N2G: what an atom fires on, as patterns of tokens (Foote et al. 2023; as Gao et al. 2024 use it, section 4.5).

Every example of an atom is cut to the shortest end that still activates it, and each token that can be replaced without
harm becomes a wildcard. The patterns of all examples are one trie, which is read from a position backwards and predicts
the atom's activation there.
"""
