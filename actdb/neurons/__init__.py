"""Exact queries by neuron: the rows where a neuron or a group is highest, and those most like a given row."""
