"""What names of files say: which claim to be pictures, and which only lie beside them."""

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    ".jp2", ".avif", ".heic", ".img",
)  # fmt: skip
# Pictures too, whether they can be read or not.
_OTHER_PICTURES = (
    ".jpe", ".j2k", ".j2c", ".jpx", ".jpf", ".jxl", ".apng", ".mpo", ".dib", ".pbm", ".pnm", ".pam",
    ".heif", ".hif", ".avifs", ".psd", ".svg", ".eps", ".ico", ".tga", ".exr", ".hdr", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
)  # fmt: skip
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
# Files beside the data of a WebDataset or Parquet directory that say nothing about its format.
SIDE_FILES = (
    ".json", ".jsonl", ".txt", ".md", ".rst", ".html", ".idx", ".yaml", ".yml", ".csv", ".tsv",
    ".crc", ".md5", ".sha256", ".py", ".log", "license", "readme",
)  # fmt: skip
# What says nothing of classes where a folder holds nothing else.
NO_PICTURES = (
    *SIDE_FILES, ".xml", ".npy", ".npz", ".mat", ".pkl", ".pt", ".pth", ".h5", ".hdf5", ".mp4",
    ".mov", ".avi", ".mkv", ".webm", ".wav", ".mp3", ".pdf", ".zip", ".gz", ".7z", ".rar",
)  # fmt: skip
# Of these only some are never part of a sample.
_NO_SAMPLES = tuple(suffix for suffix in SIDE_FILES if suffix not in (".json", ".txt"))
# What systems, archivers, network disks and programs put beside the files of the user.
_SYSTEM = {
    "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "_delta_log",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip


def is_side_name(name: str) -> bool:
    """Whether a file or directory of this name is a program's own, and nobody's picture."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM


def is_hidden(path: str) -> bool:
    """Whether a file, or a directory on the way to it, has such a name."""
    return any(map(is_side_name, path.split("/")))


def claims_picture(name: str) -> bool:
    """Whether a name says that the file is a picture."""
    return name.lower().endswith((*IMAGE_SUFFIXES, *_OTHER_PICTURES))


def is_no_sample(name: str) -> bool:
    """Whether a member of a tar is text about the tar, and no piece of a sample."""
    base = name.rpartition("/")[2].lower()
    return base.endswith(_NO_SAMPLES) or base.startswith(("readme", "license"))
