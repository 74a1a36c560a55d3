"""Nearest neighbours among stored rows: exact by blocks streamed from the store, or through FAISS indexes.

`row` reads and maps rows; `map`, `metric` and `partition` say what is compared. `exact` searches and joins by products
that `device` computes, of which `best` keeps the largest. `build` makes indexes, `index` keeps and asks them, `library`
is the boundary to FAISS. `query` and `text` find the vector asked for, `nearest` answers, `result` makes tables.
"""
