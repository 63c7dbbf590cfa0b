"""Contenders in their own processes, each run by the interpreter of an environment with its packages.

A contender is started with the path of an `.npz` file as its argument, see `handover`, and waits at its `Gate` for its
turns. These modules import only numpy and the contender's packages, since a peer's environment lacks `flow_pl`.
"""
