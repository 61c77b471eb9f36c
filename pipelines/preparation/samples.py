"""Which members of a tar are one sample, which of them is its image, and which its label.

WebDataset's rule: files of one directory with the same name up to the first dot are a sample
(`7.jpg`, `7.cls`, `7.mask.png`), and the rest of a name says what the file is in it. Where names
have dots of their own (`22.05.png`, `22.06.png`), or a sample holds several pictures, that rule
alone would give images the labels of others; what is done then is said at each function.
"""

import tarfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import chain

from pipelines.preparation.file_names import IMAGE_SUFFIXES

UNCLEAR = {
    "unclear_image": "name the extension of the images with --image_field (jpg, or rgb.png), or "
    "give --image_field '*.png' if each is an image of its own",
    "unclear_label": "name the rest of the label's name behind the sample's with --label_field "
    "(label.cls), give every image a label of its own name, or set --labels none",
}
"""What to do about samples that can be read in two ways, by reason."""


class UnclearSample(ValueError):  # noqa: N818 - a verdict on the sample, named for the reader
    """A sample whose image, or whose label, is not told by the names of its members.

    `reason` is `unclear_image` or `unclear_label`.
    """

    def __init__(self, reason: str, members: Iterable[tarfile.TarInfo]) -> None:
        self.reason = reason
        self.names = [member.name for member in members]
        super().__init__(reason)


def sample_of(name: str) -> str:
    """WebDataset's rule: files of one directory with the same name up to the first dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return folder + slash + base.partition(".")[0]


def extension_of(name: str) -> str:
    """What a name says of the file's part in its sample: all after the first dot, small."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def images_of(
    sample: Sequence[tarfile.TarInfo], *, wanted: str, label: str
) -> list[tarfile.TarInfo]:
    """The members that are images of their own; none if there is no picture.

    With `wanted`, those of that extension (`jpg`, `rgb.png`; of several, `jpg;png`, the first that
    is there), or all that a pattern fits (`*.png`). Otherwise the only picture; else every picture
    if each has a label of its own name (`22.05.png`, `22.05.cls`); else the one without a further
    word in its name (`7.jpg` beside `7.mask.png`); else every picture if each has some file of
    its own name.

    Args:
        label: Extension of the members with labels; "" where labels are not asked for.

    Raises:
        UnclearSample: none of this holds.
    """
    pictures = [member for member in sample if member.name.lower().endswith(IMAGE_SUFFIXES)]
    if wanted:
        for pattern in wanted.lower().split(";"):
            found = [member for member in sample if _fits(member.name, pattern)]
            if found:
                return found
        return []
    names = {member.name for member in pictures}
    if len(names) < 2:
        return pictures
    stems = [_stem(name) for name in names]
    apart = len(set(stems)) == len(stems)
    labels = {_without(member.name, label) for member in sample} if label else set()
    if apart and labels.issuperset(stems):
        return pictures
    plain = [member for member in pictures if "." not in extension_of(member.name)]
    if len({member.name for member in plain}) == 1:
        return plain
    others = {_stem(member.name) for member in sample if member.name not in names}
    if apart and others.issuperset(stems):
        return pictures
    raise UnclearSample("unclear_image", pictures)


def labels_of(
    image: tarfile.TarInfo, sample: Sequence[tarfile.TarInfo], extension: str
) -> list[tarfile.TarInfo]:
    """The members with the image's label: of its own name, else of the longest beginning of it.

    `22.05.cls` is the label of `22.05.png`, `7.cls` that of `7.jpg` and of `7.rgb.png`. There may
    be several of one name, which must then say the same.

    Raises:
        UnclearSample: there are labels in the sample, but none with such a name.
    """
    named: dict[str | None, list[tarfile.TarInfo]] = {}
    for member in sample:
        named.setdefault(_without(member.name, extension), []).append(member)
    named.pop(None, None)
    stem = _stem(image.name)
    folder = stem.rpartition("/")[0]
    while stem != folder:
        if stem in named:
            return named[stem]
        stem = stem[: max(stem.rfind("."), len(folder))]
    if named:
        raise UnclearSample("unclear_label", [image, *chain.from_iterable(named.values())])
    return []


def _fits(name: str, pattern: str) -> bool:
    pattern = pattern if pattern.startswith(("*", ".")) else f".{pattern}"
    return fnmatchcase(f".{extension_of(name)}", pattern)


def _stem(name: str) -> str:
    """A name without its last suffix."""
    return name.removeprefix("./").rpartition(".")[0]


def _without(name: str, extension: str) -> str | None:
    """A name without this extension; None if it has another one."""
    suffix = f".{extension.lower()}"
    return name.removeprefix("./")[: -len(suffix)] if name.lower().endswith(suffix) else None
