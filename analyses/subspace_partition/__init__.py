"""Subspace partition: neighbour distance minimisation, and the circuits between subspaces; see README.md."""
