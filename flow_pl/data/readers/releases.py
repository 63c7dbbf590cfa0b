"""Read the data sets of TensorFlow Federated's simulations: their addresses and the meaning of their fields.

Source of addresses, checksums and facts: `tff.simulation.datasets`
(github.com/google-parfait/tensorflow-federated), in its versions that read HDF5 files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flow_pl.data.encodings.encoding import Encoding
from flow_pl.data.encodings.images import Images
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
    """Provides clients from the files `<name>_train.h5` and `<name>_test.h5` of a folder, and others with this name.

    Args:
        folder: folder of the files, into which the archive is unpacked.
        name: start of their names.
        archive: their published archive.
        encoding: how a client's examples become rows, see `EncodedData`.
        heldout: part of the name of the file of new clients between `<name>_` and `.h5`; null = no such file.
        download: whether the archive may be fetched if a file is missing.
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
    """Provides EMNIST by writer: 3,400 writers of 62 characters, or 3,383 writers of digits; images are [1, 28, 28].

    Paper is 1 and ink 0, as published. Every writer has training and test examples.

    Args:
        folder: folder of `fed_emnist_train.h5` and `fed_emnist_test.h5`, into which the archive is unpacked; with
            `only_digits`, of `fed_emnist_digitsonly_train.h5` and `fed_emnist_digitsonly_test.h5`.
        only_digits: whether to use only the digits.
        download: whether the archive may be fetched if a file is missing.
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
    """Provides CIFAR-100 for 500 training and 100 new clients with 100 images each; images are [3, 32, 32].

    The images were divided by Pachinko allocation.

    Args:
        folder: folder of `fed_cifar100_train.h5` and `fed_cifar100_test.h5`, into which the archive is unpacked.
        coarse_labels: whether to use the 20 superclasses as labels.
        download: whether the archive may be fetched if a file is missing.
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
    """Provides the plays of Shakespeare by role, to predict the next character; 715 roles.

    Each role has training and test examples.

    Args:
        folder: folder of `shakespeare_train.h5` and `shakespeare_test.h5`, into which the archive is unpacked.
        length: number of characters of a row.
        download: whether the archive may be fetched if a file is missing.
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
    """Provides the files of Stack Overflow, for any task."""

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
    """Provides questions and answers of Stack Overflow by user, to predict the next word.

    342,477 users are trained on, and tested on their later posts (204,088 users have some; users without earlier posts
    are new); 38,758 further users are held out and new.

    Args:
        folder: folder of `stackoverflow_train.h5`, `stackoverflow_test.h5` and `stackoverflow_held_out.h5`, into which
            the archive is unpacked.
        vocab_size: number of words in the vocabulary.
        length: largest number of words of a sentence; the rest is cut.
        vocabulary: the published file `stackoverflow.word_count`, or another list of words; null = the most frequent
            words of the training part.
        max_examples: largest number of sentences read of a user in each part of the data.
        download: whether the archive may be fetched if a file is missing.
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
    """Provides questions and answers of Stack Overflow by user, to predict tags; see `StackOverflowData`.

    Args:
        folder: folder of `stackoverflow_train.h5`, `stackoverflow_test.h5` and `stackoverflow_held_out.h5`, into which
            the archive is unpacked.
        vocab_size: number of words in the vocabulary.
        num_tags: number of tags to predict.
        vocabulary: the published file `stackoverflow.word_count`, or another list of words; null = the most frequent
            words of the training part.
        tag_vocabulary: the published file `stackoverflow.tag_count`, or another list of tags; null = the most frequent
            tags of the training part.
        max_examples: largest number of sentences read of a user in each part of the data.
        download: whether the archive may be fetched if a file is missing.
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
