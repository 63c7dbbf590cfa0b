"""Kernels that torch lacks: linear layers, LSTMs and attention of many clients, and calls with given parameters."""
