"""Research programmes on top of actdb, one package each; `common` is the toolkit that they share.

They import the public API of `actdb` alone, and read activations through it; each runs by `python -m analyses.NAME`.
"""
