"""A backend of one's own: the whole suite on Dask, ``pytest examples/test_dask.py``. docs/testing.md explains it."""

from typing import ClassVar

import array_api_compat.dask.array as xp
import dask.array
import numpy as np

from clora import testing

DASK = testing.Backend(
    "dask",
    xp,  # its namespace of the Array API
    put=lambda master: dask.array.from_array(np.array(master), chunks=-1),  # a NumPy array to it
    get=lambda array: np.asarray(array.compute()),  # and back
    kind=dask.array.Array,  # results of another type have left the library
)


class TestFunctions(testing.FunctionSuite):
    """Every function of the core."""

    backend = DASK
    examples = 100
    unsupported: ClassVar = {
        "compress": "its QR decomposition takes two axes",
        "init_adapter": "its singular values, for scheme='svd', take two axes",
        "orthogonality": "its singular values, for form='basis', take two axes",
        "orthogonality_vjp": "its singular values, for form='basis', take two axes",
        "orthonormalize": "its QR decomposition takes two axes",
        "protected_basis": "it has no symmetric eigenvalues (linalg.eigh)",
        "validate": "it has no symmetric eigenvalues (linalg.eigvalsh), by which moments are checked",
    }


class TestLife(testing.LifeSuite):
    """Training, by clora_numpy's code."""

    driver = testing.ArrayDriver(DASK)
    examples = 10
    protects = False  # no linalg.eigh
