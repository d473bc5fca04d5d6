"""Types of arrays: jaxtyping's, or stand-ins that check nothing where jaxtyping is not installed.

`Float[Array, 'B H W C']` is an array of floating-point numbers with four axes; `*D` stands for any number of axes.
Within a call, an axis has one size wherever its name appears. The tests check this at run time (tests/conftest.py); the
product does not. A shape of one name or with a star has a leading space, for linters.
"""

import jax
import numpy as np

try:
    from jaxtyping import Bool, Float, Float32, Float64, Int, Integer, Key, Real, UInt8
except ImportError:

    class Bool:
        """A stand-in: `Bool[Array, 'B']` is `Array`."""

        def __class_getitem__(cls, item):
            return item[0]

    Float = Float32 = Float64 = Int = Integer = Key = Real = UInt8 = Bool

Array = jax.Array | np.ndarray | np.generic
Scalar = float | Real[Array, '']
PerImage = Scalar | Float[Array, ' B']  # one number for all images, or one for each
