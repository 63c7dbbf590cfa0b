"""Prepare sentences of posts as token ids, labelled by kind of post and place in it: four labels per user.

python -m tools.discourse stackexchange_posts.json.gz data.npz --model FOLDER

Reads a LEAF file with the lists x (sentences), post (the post of each) and kind (q or a) of every user. Takes the first
and the last sentence of each post with at least two; users are drawn from those with enough posts.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

PLACES = ("opening", "closing")
NAMES = [f"{kind}, {place}" for kind in ("question", "answer") for place in PLACES]


def sentences(user: dict[str, list[Any]], posts: int) -> list[tuple[str, int]]:
    """Return the first and last sentence of a user's first posts, with labels; none if there are too few posts."""
    rows: dict[Any, list[int]] = {}
    for row, post in enumerate(user["post"]):
        rows.setdefault(post, []).append(row)
    usable = [of_post for of_post in rows.values() if len(of_post) >= len(PLACES)]
    found = []
    for of_post in usable[:posts] if len(usable) >= posts else []:
        kind = 0 if user["kind"][of_post[0]] == "q" else len(PLACES)
        found += [(user["x"][of_post[0]], kind), (user["x"][of_post[-1]], kind + 1)]
    return found


def write(source: Path, target: Path, model: str, users: int, posts: int, length: int) -> None:
    """Write the arrays x [rows, length] of token ids, y [rows] and client [rows]."""
    from transformers import AutoTokenizer

    with gzip.open(source, "rt", encoding="utf-8") as file:
        everyone = json.load(file)["user_data"]
    taken = {name: sentences(user, posts) for name, user in sorted(everyone.items())}
    enough = [name for name, found in taken.items() if found]
    chosen = sorted(np.random.default_rng(0).permutation(enough)[:users])
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [(client, *row) for client, name in enumerate(chosen) for row in taken[name]]
    options = {"padding": "max_length", "truncation": True, "max_length": length}
    ids = tokenizer([text for _, text, _ in rows], **options)["input_ids"]
    clients, labels = ([row[i] for row in rows] for i in (0, 2))
    np.savez_compressed(target, x=np.array(ids), y=np.array(labels), client=np.array(clients))
    print(
        f"{target}: {len(rows)} sentences of {len(chosen)} users, {np.bincount(labels).tolist()} of {', '.join(NAMES)}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="LEAF file of posts (.json.gz)")
    parser.add_argument("target", type=Path, help=".npz file to write")
    parser.add_argument("--model", required=True, help="folder, or name on the hub, of the tokenizer")
    parser.add_argument("--users", type=int, default=60, help="users that are taken")
    parser.add_argument("--posts", type=int, default=20, help="posts of a user that are taken")
    parser.add_argument("--length", type=int, default=24, help="tokens of a sentence that are kept")
    given = parser.parse_args()
    write(given.source, given.target, given.model, given.users, given.posts, given.length)
