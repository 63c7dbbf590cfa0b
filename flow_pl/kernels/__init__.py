"""Fast pieces that torch lacks: linear layers and LSTMs of many clients, calls of modules under given parameters."""
