"""Run FedJAX's federated averaging with its `jit` backend."""

from __future__ import annotations

import fedjax
import jax
import numpy as np
from fedjax.algorithms import fed_avg
from jax import numpy as jnp

from tools.benchmarks.peers.gate import Gate
from tools.benchmarks.peers.handover import Handover, load

jax.tree_map = jax.tree_util.tree_map  # FedJAX 0.0.17 uses a name that jax has dropped


def linear(p, i, x):
    return x @ p[i].T + p[i + 1]


def convolution(p, i, x):
    order = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, p[i], (1, 1), "VALID", dimension_numbers=order) + p[i + 1]


def mlp(p, x):
    return linear(p, 2, jax.nn.relu(linear(p, 0, x)))


def cnn(p, x):
    x = jax.nn.relu(convolution(p, 2, jax.nn.relu(convolution(p, 0, x))))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # torch flattens with the channels first
    return linear(p, 6, jax.nn.relu(linear(p, 4, x)))


def lstm(p, x):
    embedding, of_input, of_state, bias, bias_too = p[:5]
    gates = embedding[x] @ of_input.T + (bias + bias_too)

    def step(state, now):
        h, c = state
        i, f, g, o = jnp.split(now + h @ of_state.T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((len(x), of_state.shape[1]))
    _, hidden = jax.lax.scan(step, (zeros, zeros), gates.transpose(1, 0, 2))
    return linear(p, 7, linear(p, 5, hidden.transpose(1, 0, 2)))


FORWARD = {"mlp": mlp, "cnn": cnn, "lstm": lstm}


def from_torch(p: np.ndarray) -> jnp.ndarray:
    """Convert a parameter to the layout that is fastest with XLA."""
    return jnp.asarray(p.transpose(2, 3, 1, 0) if p.ndim == 4 else p)


def to_torch(p: jnp.ndarray) -> np.ndarray:
    values = np.asarray(p)
    return values.transpose(3, 2, 0, 1) if values.ndim == 4 else values


def client_data(handover: Handover) -> list[fedjax.ClientDataset]:
    """Return the clients' examples, images with channels last."""
    images = handover.kind == "cnn"
    return [
        fedjax.ClientDataset({"x": x.transpose(0, 2, 3, 1) if images else x, "y": y.astype(np.int32)})
        for x, y in handover.clients
    ]


def main() -> None:
    handover = load()
    forward = FORWARD[handover.kind]

    def loss(p, batch, _):
        scores = jax.nn.log_softmax(forward(p, batch["x"]))
        return -jnp.take_along_axis(scores, batch["y"][..., None], axis=-1).mean()

    algorithm = fed_avg.federated_averaging(
        jax.jit(jax.grad(loss)),
        fedjax.optimizers.sgd(handover.lr, momentum=handover.momentum or None),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=handover.batch_size, skip_shuffle=True),
    )
    data = client_data(handover)
    keys = jax.random.split(jax.random.PRNGKey(0), len(data))
    clients = [(str(i).encode(), *client) for i, client in enumerate(zip(data, keys, strict=True))]
    state = algorithm.init([from_torch(p) for p in handover.parameters])
    gate = Gate()
    while gate.next(lambda state=state: np.concatenate([to_torch(p).reshape(-1) for p in state.params])):
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)


if __name__ == "__main__":
    main()
