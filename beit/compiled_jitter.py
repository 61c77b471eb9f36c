"""`beit.jitter.fast_jitter` in one pass, compiled by numba (the `fast` extra): the same bits.

Row by row, so that four lines of floats are all that is worked on. Sums are neither reordered nor
contracted: what LLVM makes vectors of stays equal to numpy's float32.
"""

import numba
import numpy as np
from numba import types

# Pillow's weights of red, green and blue in grey (`beit.jitter`): here, because a compiled function
# from the cache does not see what changes in other files.
_RED, _GREEN, _BLUE = np.float32(19595), np.float32(38470), np.float32(7471)
_HALF, _SCALE = np.float32(0x8000), np.float32(2**-16)
_BLACK, _WHITE = np.float32(0), np.float32(255)

_PIXELS = types.Array(types.uint8, 3, "C", readonly=True)
_PLANES = types.Array(types.uint8, 3, "C")
_FLOATS = types.Array(types.float32, 1, "C")


@numba.njit(nogil=True)
def _blend(values: np.ndarray, levels: np.ndarray, factor: np.float32) -> None:
    for i in range(len(values)):
        moved = (values[i] - levels[i]) * factor + levels[i]
        values[i] = np.int32(min(max(moved, _BLACK), _WHITE))


@numba.njit(
    types.void(_PIXELS, types.int64, types.int64, types.boolean, _PLANES, _FLOATS, _FLOATS),
    nogil=True,
    cache=True,
)
def jitter_box(
    pixels: np.ndarray,
    top: int,
    left: int,
    flip: bool,
    planes: np.ndarray,
    levels: np.ndarray,
    factors: np.ndarray,
) -> None:
    """Fills ``planes`` (3, h, w) from a box of uint8 (height, width, 3), mirrored if ``flip``.

    Each step moves values away from its level by its factor; a level below 0 is the pixel's grey.
    """
    height, width = planes.shape[1:]
    red, green = np.empty(width, np.float32), np.empty(width, np.float32)
    blue, grey = np.empty(width, np.float32), np.empty(width, np.float32)
    lines = pixels.reshape(pixels.shape[0], -1)
    for y in range(height):
        line = lines[top + y][3 * left : 3 * (left + width)]
        if flip:
            for x in range(width):
                mirrored = np.uint64(width - 1 - x)  # unsigned: numba looks for no sign
                red[mirrored] = line[3 * x]
                green[mirrored] = line[3 * x + 1]
                blue[mirrored] = line[3 * x + 2]
        else:
            for x in range(width):
                red[x], green[x], blue[x] = line[3 * x], line[3 * x + 1], line[3 * x + 2]
        for step in range(len(levels)):
            if levels[step] < 0:
                for x in range(width):
                    total = red[x] * _RED + green[x] * _GREEN + blue[x] * _BLUE
                    grey[x] = np.int32((total + _HALF) * _SCALE)
            else:
                grey[:] = levels[step]
            _blend(red, grey, factors[step])
            _blend(green, grey, factors[step])
            _blend(blue, grey, factors[step])
        for x in range(width):
            planes[0, y, x] = np.int32(red[x])
            planes[1, y, x] = np.int32(green[x])
            planes[2, y, x] = np.int32(blue[x])
