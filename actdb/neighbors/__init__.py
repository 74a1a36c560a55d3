"""Nearest neighbours among stored rows: exact by blocks streamed from the store, or through FAISS indexes.

`row` reads and maps rows, `map` and `metric` say what is compared, `exact` searches and joins, `index` builds, keeps
and searches FAISS indexes, `query` finds the vector asked for, `result` makes tables of what was found.
"""
