"""The federated loop: clients of a chunk trained side by side, and what the server makes of their updates."""
