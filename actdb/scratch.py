"""Memory that is filled again and again."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class Scratch:
    """Memory for arrays that are needed one at a time.

    Many fresh megabytes cost about as much as to fill them, since the system clears each page when it is first touched.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of any content, valid until the next is asked for."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if len(self._bytes) < n_bytes:
            self._bytes = np.empty(n_bytes, np.uint8)
        return self._bytes[:n_bytes].view(dtype).reshape(shape)
