"""Compute the coefficients of banded matrix factorization by `jax-privacy`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np

from flow_pl.errors import ConfigurationError
from flow_pl.utils.optional import require_installed

SCRIPT = """
import json, sys
from jax_privacy.matrix_factorization import toeplitz
rounds, bands = map(int, sys.argv[1:])
print(json.dumps(toeplitz.optimize_banded_toeplitz(n=rounds, bands=bands).tolist()))
"""


def optimal_coefficients(rounds: int, bands: int) -> list[float]:
    """Find the banded Toeplitz matrix C with the least error of the sums over rounds, at a given guarantee.

    It runs in a process of its own, on the CPU: JAX would otherwise reserve most of the memory of a GPU, and its
    threads do not go with the forks of a data loader.

    Args:
        rounds: number of rounds whose running sums are released.
        bands: number of bands of C.

    Returns:
        The first column of C down to its last band, of L2 norm 1.

    Raises:
        ConfigurationError: jax-privacy is not installed, or does not run.
    """
    require_installed("jax_privacy", "matrix-factorization", "BandedMatrixFactorization (Python 3.11 or newer)")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rounds), str(bands)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigurationError(
            f"jax-privacy found no matrix for {rounds} rounds and {bands} bands ({done.stderr.strip().splitlines()[-1]}"
            "): check the installation of jax and jax-privacy, or use GaussianMechanism."
        )
    coefficients = np.array(json.loads(done.stdout.splitlines()[-1]))
    # JAX computes in float32, and the accountant relies on a norm of 1
    return list(map(float, coefficients / np.linalg.norm(coefficients)))
