"""Tiny files in the exact formats that are published, written without the project's own code."""

import gzip
import json

import h5py
import numpy as np


def write_tff(path, clients):
    """A file of TensorFlow Federated's simulations: as its own tests make them, fields of `examples/<client>`.

    Texts are variable-length byte strings, as in `stackoverflow_train.h5` and `shakespeare_train.h5`.
    """
    with h5py.File(path, "w") as file:
        examples = file.create_group("examples")
        for client, fields in clients.items():
            group = examples.create_group(client)
            for field, values in fields.items():
                if len(values) and isinstance(values[0], str):
                    group.create_dataset(field, data=values, dtype=h5py.string_dtype())
                else:
                    group.create_dataset(field, data=values)
    return str(path)


def emnist(*labels):
    """Fields of EMNIST: pixels [28, 28] float32, 1 = paper, in steps of 1/255, and int32 labels."""
    pixels = np.ones((len(labels), 28, 28), dtype=np.float32)
    for image, label in zip(pixels, labels, strict=True):
        image[label % 28, 3] = np.float32(label / 255)
    return {"label": np.array(labels, dtype=np.int32), "pixels": pixels}


def cifar(*labels):
    """Fields of CIFAR-100: images [32, 32, 3] of bytes, whose channels hold label, label + 1 and label + 2."""
    channels = np.array(labels, dtype=np.uint8)[:, None] + np.arange(3, dtype=np.uint8)
    images = np.broadcast_to(channels[:, None, None, :], (len(labels), 32, 32, 3))
    coarse = np.array(labels, dtype=np.int64) // 5
    return {"coarse_label": coarse, "image": images, "label": np.array(labels, dtype=np.int64)}


def posts(*sentences, tags="python|pandas", title="how to"):
    """Fields of Stack Overflow."""
    count = len(sentences)
    return {
        "creation_date": ["2015-01-01 00:00:00.0 UTC"] * count,
        "score": np.arange(count, dtype=np.int64),
        "tags": [tags] * count,
        "title": [title] * count,
        "tokens": list(sentences),
        "type": ["question"] * count,
    }


def write_leaf(path, user_data, users=None, num_samples=None, hierarchies=None):
    """A shard as LEAF's scripts write it: `users` first, `user_data` last."""
    shard = {"users": list(user_data) if users is None else users}
    if hierarchies is not None:
        shard["hierarchies"] = hierarchies
    lengths = [len(data[min(data)]) for data in user_data.values()]
    shard["num_samples"] = lengths if num_samples is None else num_samples
    shard["user_data"] = user_data
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        json.dump(shard, file)
    return str(path)


def reddit(*comments, length=10):
    """A user of LEAF's Reddit: comments cut into sequences, with the targets and the counted positions of each."""

    def cut(tokens, fill):
        tokens = tokens + [fill] * (-len(tokens) % length)
        return [tokens[start : start + length] for start in range(0, len(tokens), length)]

    x, y = [], []
    for comment in comments:
        words = comment.split()
        inputs, targets = ["<BOS>", *words, "<EOS>"], [*words, "<EOS>", "<PAD>"]
        x.append(cut(inputs, "<PAD>"))
        counted = cut([1.0] * len(inputs), 0.0)
        meta = {"subreddit": "a", "created_utc": 1512086400, "score": 1}
        y.append({**meta, "target_tokens": cut(targets, "<PAD>"), "count_tokens": counted})
    return {"x": x, "y": y}
