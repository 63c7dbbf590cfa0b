"""Contenders in processes of their own, each run by the interpreter that has its packages.

A contender is started with the path of an `.npz` as its argument, see `handover`, and waits at its
`Gate` for its turns. These modules import nothing but numpy and the contender's own packages: an environment made for
a peer has no `flow_pl` in it.
"""
