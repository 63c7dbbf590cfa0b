"""The data sets of TensorFlow Federated's simulations: where they are published, and what their fields mean.

Source of the addresses, the checksums and the facts: `tff.simulation.datasets`
(github.com/google-parfait/tensorflow-federated), in its versions that read HDF5 files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flow_pl.data.encodings.encoding import Encoding, Images
from flow_pl.data.encodings.tags import TagPrediction
from flow_pl.data.encodings.text import NextCharacter, NextWord
from flow_pl.data.readers.download import Archive
from flow_pl.data.readers.hdf5 import HDF5Data

_PUBLISHED = "https://storage.googleapis.com/tff-datasets-public/"

EMNIST = Archive(f"{_PUBLISHED}fed_emnist.tar.bz2", "fe1ed5a502cea3a952eb105920bff8cffb32836b5173cb18a57a32c3606f3ea0")
EMNIST_DIGITS = Archive(
    f"{_PUBLISHED}fed_emnist_digitsonly.tar.bz2", "55333deb8546765427c385710ca5e7301e16f4ed8b60c1dc5ae224b42bd5b14b"
)
CIFAR100 = Archive(
    f"{_PUBLISHED}fed_cifar100.tar.bz2", "e8575e22c038ecef1ce6c7d492d7abee7da13b1e1ba9b70a7fc18531ba7590de"
)
SHAKESPEARE = Archive(
    f"{_PUBLISHED}shakespeare.tar.bz2", "0285be9906cb5f268092eee4edeeacfc2af4574f2941f7cc2f08a321d7f5c707"
)
STACK_OVERFLOW = Archive(
    f"{_PUBLISHED}stackoverflow.tar.bz2", "99eca2f8b8327a09e5fc123979df2d237acbc5e52322f6d86bf523ee47b961a2"
)


class ReleasedData(HDF5Data):
    """The files `<name>_train.h5` and `<name>_test.h5` of a folder, and others of that name.

    Args:
        folder: where the files are, or are to be unpacked.
        name: what their names begin with.
        archive: where they are published.
        encoding: how a client's examples become rows, see `EncodedData`.
        heldout: what comes before `.h5` in the name of the file of new clients, behind `name` and `_`; null = none.
        download: whether the archive may be fetched, where a file is not there.
        **kwargs: settings of every published data set, see `EncodedData`, and of every data set, see
            `FederatedDataModule`.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        archive: Archive,
        encoding: Encoding,
        heldout: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        files = {part: str(Path(folder) / f"{name}_{part}.h5") for part in ("train", "test", heldout) if part}
        super().__init__(
            train=files["train"],
            encoding=encoding,
            test=files["test"],
            heldout=files[heldout] if heldout else None,
            archive=archive,
            download=download,
            **kwargs,
        )


class EmnistData(ReleasedData):
    """EMNIST by writer: 3,400 writers of 62 characters, or 3,383 writers of the ten digits; images are [1, 28, 28].

    Paper is 1 and ink 0, as published. Every writer has training and test examples.

    Args:
        folder: where `fed_emnist_train.h5` and `fed_emnist_test.h5` are, or are to be unpacked; with `only_digits`,
            `fed_emnist_digitsonly_train.h5` and `fed_emnist_digitsonly_test.h5`.
        only_digits: whether the data are the digits alone.
        download: whether the archive may be fetched, where a file is not there.
        **kwargs: settings of every published data set, see `EncodedData`, and of every data set, see
            `FederatedDataModule`.
    """

    def __init__(self, folder: str, only_digits: bool = False, download: bool = False, **kwargs: Any) -> None:
        super().__init__(
            folder=folder,
            name="fed_emnist_digitsonly" if only_digits else "fed_emnist",
            archive=EMNIST_DIGITS if only_digits else EMNIST,
            encoding=Images("pixels", "label", num_classes=10 if only_digits else 62),
            download=download,
            **kwargs,
        )


class Cifar100Data(ReleasedData):
    """CIFAR-100 on 500 training and 100 new clients of 100 images, by Pachinko allocation; images are [3, 32, 32].

    Args:
        folder: where `fed_cifar100_train.h5` and `fed_cifar100_test.h5` are, or are to be unpacked.
        coarse_labels: whether the labels are the 20 superclasses.
        download: whether the archive may be fetched, where a file is not there.
        **kwargs: settings of every published data set, see `EncodedData`, and of every data set, see
            `FederatedDataModule`.
    """

    def __init__(self, folder: str, coarse_labels: bool = False, download: bool = False, **kwargs: Any) -> None:
        label, num_classes = ("coarse_label", 20) if coarse_labels else ("label", 100)
        super().__init__(
            folder=folder,
            name="fed_cifar100",
            archive=CIFAR100,
            encoding=Images("image", label, height=32, width=32, channels=3, num_classes=num_classes),
            download=download,
            same_clients=False,  # both files number their clients from 0
            **kwargs,
        )


class ShakespeareData(ReleasedData):
    """The plays of Shakespeare by role, for the next character: 715 roles, each with training and test examples.

    Args:
        folder: where `shakespeare_train.h5` and `shakespeare_test.h5` are, or are to be unpacked.
        length: number of characters of a row.
        download: whether the archive may be fetched, where a file is not there.
        **kwargs: settings of every published data set, see `EncodedData`, and of every data set, see
            `FederatedDataModule`.
    """

    def __init__(self, folder: str, length: int = 80, download: bool = False, **kwargs: Any) -> None:
        super().__init__(
            folder=folder,
            name="shakespeare",
            archive=SHAKESPEARE,
            encoding=NextCharacter("snippets", length),
            download=download,
            **kwargs,
        )


class _StackOverflow(ReleasedData):
    """The files of Stack Overflow, whatever is predicted from them."""

    def __init__(self, folder: str, encoding: Encoding, download: bool = False, **kwargs: Any) -> None:
        super().__init__(
            folder=folder,
            name="stackoverflow",
            archive=STACK_OVERFLOW,
            encoding=encoding,
            heldout="held_out",
            download=download,
            **kwargs,
        )


class StackOverflowData(_StackOverflow):
    """Questions and answers of Stack Overflow by user, for the next word.

    342,477 users are trained on, and tested on what they wrote later (204,088 users wrote later, some of them for the
    first time: those are new); 38,758 further users are held out and new.

    Args:
        folder: where `stackoverflow_train.h5`, `stackoverflow_test.h5` and `stackoverflow_held_out.h5` are, or are to
            be unpacked.
        vocab_size: number of words that have a number of their own.
        length: number of words of a sentence that are kept.
        vocabulary: the published file `stackoverflow.word_count`, or another list of words; null = the most frequent
            words of the training part.
        max_examples: largest number of sentences of a user that are read, in each part of the data.
        download: whether the archive may be fetched, where a file is not there.
        **kwargs: settings of every published data set, see `EncodedData`, and of every data set, see
            `FederatedDataModule`.
    """

    def __init__(
        self,
        folder: str,
        vocab_size: int = 10_000,
        length: int = 20,
        vocabulary: str | None = None,
        max_examples: int | None = 1000,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            folder=folder,
            encoding=NextWord("tokens", vocab_size, length, vocabulary),
            max_examples=max_examples,
            download=download,
            **kwargs,
        )


class StackOverflowTagsData(_StackOverflow):
    """Questions and answers of Stack Overflow by user, for the tags of the question; see `StackOverflowData`.

    Args:
        folder: where `stackoverflow_train.h5`, `stackoverflow_test.h5` and `stackoverflow_held_out.h5` are, or are to
            be unpacked.
        vocab_size: number of words that have a column of their own.
        num_tags: number of tags to be predicted.
        vocabulary: the published file `stackoverflow.word_count`, or another list of words; null = the most frequent
            words of the training part.
        tag_vocabulary: the published file `stackoverflow.tag_count`, or another list of tags; null = the most frequent
            tags of the training part.
        max_examples: largest number of sentences of a user that are read, in each part of the data.
        download: whether the archive may be fetched, where a file is not there.
        **kwargs: settings of every published data set, see `EncodedData`, and of every data set, see
            `FederatedDataModule`.
    """

    def __init__(
        self,
        folder: str,
        vocab_size: int = 10_000,
        num_tags: int = 500,
        vocabulary: str | None = None,
        tag_vocabulary: str | None = None,
        max_examples: int | None = 1000,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            folder=folder,
            encoding=TagPrediction(
                vocab_size=vocab_size, num_tags=num_tags, vocabulary=vocabulary, tag_vocabulary=tag_vocabulary
            ),
            max_examples=max_examples,
            download=download,
            **kwargs,
        )
