"""Encoded bytes to 8-bit RGB pixels, by one rule, whatever the file looks like.

===========================  ==================================================================
the file has                 the pixels are
===========================  ==================================================================
EXIF or container rotation   turned and mirrored upright; unreadable EXIF counts as upright
CMYK, YCbCr, grey, bilevel   converted to RGB by Pillow's formulas
a palette                    looked up
transparency of any kind     composited on white (alpha, palette alpha, one transparent colour)
16 bits a channel            the high byte of every sample (not clipped to 255)
several frames or pages      the first one
an ICC profile               not applied, broken or not
long or broken texts         skipped (PNG, where Pillow would refuse the file); orientation is read
missing or damaged data      refused where Pillow refuses it; nothing is padded with grey
more than ``max_pixels``     refused from the header, before pixels are allocated
float or 32-bit samples      refused: they name no white point
===========================  ==================================================================

Accepted containers are JPEG (also MPO), PNG, GIF, WebP, BMP, TIFF, PPM, JPEG 2000 and AVIF. The
list is closed on purpose: Pillow also opens formats that run other programs (EPS) or recognise
ordinary text. Pillow's global settings are neither changed nor relied on, so that any number of
threads may decode at once.
"""

import hashlib
import io
from typing import Final

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from beit.png_texts import without_texts

try:
    import simplejpeg
except ImportError:  # The `jpeg` extra: faster, never different.
    simplejpeg = None

# Importing a plugin registers it. Doing so here spares threads a race in Pillow's lazy set-up.
_PLUGINS: Final = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
FORMATS: Final = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Pillow warns above this number of pixels and refuses above twice of it.
DEFAULT_MAX_PIXELS: Final = 89_478_485

# What makes each EXIF orientation upright (EXIF 2.32, tag 0x0112).
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG: Final = 0x0112
# Chroma subsamplings on which libjpeg-turbo's two interfaces were seen to agree to the bit.
_PLAIN_SUBSAMPLINGS: Final = frozenset({"444", "422", "420", "440", "411", "Gray"})
# Everything that Pillow opens as 16-bit samples of 0…65535 in a 32-bit mode.
_FULL_RANGE_FORMATS: Final = frozenset({"PNG", "PPM"})


class UnusableImage(ValueError):  # noqa: N818 - a verdict on the image, named for the reader
    """Bytes that yield no pixels under the rule of this module.

    ``reason`` is one of ``empty``, ``not_an_image``, ``too_many_pixels``, ``truncated``,
    ``corrupt``, ``unsupported_mode`` and ``out_of_memory``; ``detail`` is for people.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        """The reason and, where there is one, what the decoder said."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def image_digest(data: bytes) -> bytes:
    """16 bytes that identify the encoded image (BLAKE2b)."""
    return hashlib.blake2b(data, digest_size=16).digest()


def recognised(head: bytes) -> bool:
    """Whether a file that begins like this is in one of the accepted formats, sound or not."""
    accepts = (Image.OPEN[name][1] for name in FORMATS)
    return any(bool(accept(head[:16])) for accept in accepts if accept is not None)


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode to an upright image of mode RGB.

    ``max_pixels`` bounds height times width as the header states it; Pillow's own limit of twice
    ``PIL.Image.MAX_IMAGE_PIXELS`` holds besides. Raises `UnusableImage` and nothing else,
    whatever the bytes are.
    """
    try:
        return _to_rgb(_open(data, max_pixels), max_pixels)
    except UnusableImage:
        raise
    except Exception as error:
        plain = without_texts(data)
        if plain is None:
            raise _explain(error) from error
    return decode_image(plain, max_pixels=max_pixels)


def decode_array(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """The pixels of `decode_image` as uint8 (height, width, 3), writeable and contiguous.

    Plain baseline JPEGs go through libjpeg-turbo's own interface where simplejpeg is installed,
    which gives the same bits sooner. Every other file, and every file at which that decoder so
    much as warns, goes through Pillow. Raises as `decode_image`.
    """
    try:
        image = _open(data, max_pixels)
        pixels = _decode_plain_jpeg(image, data)
        return np.array(_to_rgb(image, max_pixels)) if pixels is None else pixels
    except UnusableImage:
        raise
    except Exception as error:
        plain = without_texts(data)
        if plain is None:
            raise _explain(error) from error
    return decode_array(plain, max_pixels=max_pixels)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Parse the header only."""
    if not data:
        raise UnusableImage("empty", "0 bytes")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image, max_pixels)
    return image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnusableImage("corrupt", f"{width}x{height} pixels")
    if width * height > max_pixels:
        detail = f"{width}x{height} = {width * height} pixels, more than max_pixels = {max_pixels}"
        raise UnusableImage("too_many_pixels", detail)


def _to_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    transparent = _transparent_colour(image)
    image.load()
    _check_size(image, max_pixels)  # Some containers learn their size only now.
    orientation = _orientation(image)
    if transparent is not None:
        image.info["transparency"] = transparent
    if image.mode.startswith("I"):
        rgb = _rgb_from_16_bit(image)
    elif image.mode in ("F", "LAB", "HSV"):
        raise UnusableImage("unsupported_mode", f"{image.format} of mode {image.mode}")
    elif image.has_transparency_data:
        rgb = _on_white(image.convert("RGBA"))
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {}  # Pillow would copy a profile from here into files saved later.
    return rgb


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent colour of a PNG in the 8 bits that its pixels are read with.

    Pillow hands it out in the bits of the file, which then matches no pixel or a wrong one.
    """
    colour = image.info.get("transparency")
    tiles = getattr(image, "tile", ())
    raw_mode = str(tiles[0][3]) if tiles else ""
    if isinstance(colour, tuple) and "RGB;16" in raw_mode:
        return tuple(value >> 8 for value in colour)
    if isinstance(colour, int) and raw_mode in ("L;2", "L;4"):
        return colour * (85 if raw_mode == "L;2" else 17)
    return None


def _rgb_from_16_bit(image: Image.Image) -> Image.Image:
    if image.mode == "I" and image.format not in _FULL_RANGE_FORMATS:
        raise UnusableImage("unsupported_mode", f"{image.format} of 32-bit integers")
    samples = np.asarray(image)
    grey = Image.fromarray((samples >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    alpha = np.where(samples == transparent, 0, 255).astype(np.uint8)
    return _on_white(Image.merge("LA", (grey, Image.fromarray(alpha))).convert("RGBA"))


def _on_white(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except MemoryError:
        raise
    except Exception:  # Pillow parses EXIF with many kinds of error; none concerns the pixels.
        return 1


def _decode_plain_jpeg(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Pixels by libjpeg-turbo's own interface, or None where Pillow has to decide."""
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if image.info.get("progressive") or image.info.get("adobe_transform", 1) != 1:
        return None
    width, height = image.size
    expected = (height, width, "Gray" if image.mode == "L" else "YCbCr")
    try:
        *header, subsampling = simplejpeg.decode_jpeg_header(data)
        if tuple(header) != expected or subsampling not in _PLAIN_SUBSAMPLINGS:
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except (ValueError, RuntimeError):
        return None
    return _turn(pixels, _orientation(image)) if pixels.shape == (height, width, 3) else None


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """`_UPRIGHT` for an array (height, width, 3)."""
    if orientation not in _UPRIGHT:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    mirror_columns = orientation in (2, 3, 6, 7)
    mirror_rows = orientation in (3, 4, 7, 8)
    return np.ascontiguousarray(pixels[:: -1 if mirror_rows else 1, :: -1 if mirror_columns else 1])


def _explain(error: Exception) -> UnusableImage:
    """The reason that stands for an exception of a decoder."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return UnusableImage("too_many_pixels", text)
    if isinstance(error, UnidentifiedImageError):
        return UnusableImage("not_an_image", "no accepted format recognises the bytes")
    if isinstance(error, MemoryError):
        return UnusableImage("out_of_memory", text)
    return UnusableImage("truncated" if "truncated" in text.lower() else "corrupt", text)
