"""The Flower app: the round of `FederatedModule` over a network, with clients that keep their data."""
