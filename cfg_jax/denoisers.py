"""Denoisers that are more than a function (z, λ) -> `Prediction`: with a memory, or switched at some λ.

Both are called as any denoiser is. Samplers see what else there is: they carry the memory from step to step, and split
their scan where a denoiser switches, so that the part that is not used is not computed.
"""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import diffusion
from cfg_jax.diffusion import Denoiser, Prediction
from cfg_jax.typing import Array, Bool, Float

_CLOSE = 1e-3  # a grid's λ in float32 miss the ends of an interval by less


@dataclasses.dataclass(frozen=True)
class Stateful:
    """A denoiser with a state.

    start: z [B, ...] -> the first state, any tree of arrays. step: (z, λ [B], state) -> (`Prediction`, next state). A
    call without a sampler is one step from the first state.
    """

    start: Callable[[Array], Any]
    step: Callable[[Array, Array, Any], tuple[Prediction, Any]]

    def __call__(self, z: Float[Array, ' B *D'], logsnr: Float[Array, ' B']) -> Prediction:
        return self.step(z, logsnr, self.start(z))[0]


@dataclasses.dataclass(frozen=True)
class Switched:
    """The denoiser `inside` for λ in [low, high], `outside` elsewhere.

    Called with λ of both kinds it computes both denoisers for all images. A sampler that is given it, with a grid of
    known values (not traced by jit), computes only the one that it needs.
    """

    inside: Denoiser
    outside: Denoiser
    low: float
    high: float

    def __call__(self, z: Float[Array, ' B *D'], logsnr: Float[Array, ' B']) -> Prediction:
        return stateful(self)(z, logsnr)


def within(logsnr: Float[Array, '*S'], low: float, high: float) -> Bool[Array, '*S']:
    """Return which λ lie in [low, high], of λ's shape, to the digits of float32; numpy stays numpy."""
    return (logsnr >= low - _CLOSE) & (logsnr <= high + _CLOSE)


def stateful(denoise: Denoiser) -> Stateful:
    """Return any denoiser as a `Stateful`; the state of one without memory is empty."""
    if isinstance(denoise, Stateful):
        return denoise
    if not isinstance(denoise, Switched):
        return Stateful(lambda z: (), lambda z, logsnr, state: (denoise(z, logsnr), state))
    inside, outside = stateful(denoise.inside), stateful(denoise.outside)

    def step(z, logsnr, states):
        (here, state), (there, other) = inside.step(z, logsnr, states[0]), outside.step(z, logsnr, states[1])
        inside_it = within(logsnr, denoise.low, denoise.high)

        def select(a, b):
            return jnp.where(diffusion.broadcast_to_images(inside_it, a), a, b)

        def kept(used, new, old):
            """Return the new state of the images of one side; a state that is not one per image, if any image is."""
            of_images = jnp.ndim(new) and len(new) == len(z)
            return jnp.where(diffusion.broadcast_to_images(used, new) if of_images else used.any(), new, old)

        renoise_eps = None
        if here.renoise_eps is not None or there.renoise_eps is not None:
            renoise_eps = select(_renoise(here), _renoise(there))
        v = None if here.v is None else select(here.v, there.v)
        sides = (inside_it, state, states[0]), (~inside_it, other, states[1])
        states = tuple(jax.tree.map(lambda a, b, used=used: kept(used, a, b), new, old) for used, new, old in sides)
        return Prediction(select(here.eps, there.eps), v, renoise_eps), states

    return Stateful(lambda z: (inside.start(z), outside.start(z)), step)


def _renoise(prediction):
    """Return the eps that a sampler adds back."""
    return prediction.eps if prediction.renoise_eps is None else prediction.renoise_eps


def mapped(denoise: Denoiser, change: Callable[[Prediction, Array, Array], Prediction]) -> Denoiser:
    """Return the denoiser of change(prediction, z, λ), with the memory and the switch that `denoise` has."""
    if isinstance(denoise, Switched):
        inside, outside = mapped(denoise.inside, change), mapped(denoise.outside, change)
        return dataclasses.replace(denoise, inside=inside, outside=outside)
    if not isinstance(denoise, Stateful):
        return lambda z, logsnr: change(diffusion.check_prediction(denoise(z, logsnr), z), z, logsnr)

    def step(z, logsnr, state):
        prediction, state = denoise.step(z, logsnr, state)
        return change(diffusion.check_prediction(prediction, z), z, logsnr), state

    return Stateful(denoise.start, step)


def parts(
    denoise: Denoiser, logsnrs: Float[Array, ' T']
) -> tuple[Callable[[Array], Any], list[tuple[slice, Callable]]]:
    """Return (start, [(the part of the grid, step)]): one part unless the denoiser switches within the grid.

    start: z -> the first state. step: (z, λ [B], state) -> (`Prediction`, state).
    """
    whole = stateful(denoise)
    if not isinstance(denoise, Switched) or isinstance(logsnrs, jax.core.Tracer):
        return whole.start, [(slice(0, len(logsnrs)), whole.step)]
    guided = within(np.asarray(logsnrs), denoise.low, denoise.high)
    bounds = [0, *(np.flatnonzero(guided[1:] != guided[:-1]) + 1).tolist(), len(guided)]
    sides = stateful(denoise.outside), stateful(denoise.inside)

    def step_of(place):
        """Return the step of one side, whose state stands at `place` of both."""

        def step(z, logsnr, states):
            prediction, state = sides[1 - place].step(z, logsnr, states[place])
            return prediction, tuple(state if index == place else each for index, each in enumerate(states))

        return step

    pieces = [slice(a, b) for a, b in pairwise(bounds)]
    return whole.start, [(piece, step_of(0 if guided[piece.start] else 1)) for piece in pieces]


def count_evaluations(
    guided: Callable[[Callable[..., Prediction]], Denoiser], logsnrs: Float[Array, ' T'], image_shape: tuple[int, ...]
) -> int:
    """Return how many images the network sees for one image drawn, when its denoiser is called at these λ.

    guided: a model -> the denoiser of one image. Each part of the scan is traced once, with a model that only counts.
    """
    seen = []

    def counting(z, logsnr, labels, **_):
        seen.append(len(z))
        return Prediction(z)

    start, pieces = parts(guided(counting), logsnrs)
    z, logsnr = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (image_shape, ()))
    total = 0
    for piece, step in pieces:
        seen.clear()
        jax.eval_shape(lambda z, logsnr, step=step: step(z, logsnr, start(z))[0], z, logsnr)
        total += (piece.stop - piece.start) * sum(seen)
    return total
