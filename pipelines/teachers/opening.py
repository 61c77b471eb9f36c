"""From the flags `--teacher` and `--layer` to a teacher."""

import tempfile
from pathlib import Path

from beit.teachers import Teacher
from pipelines import storage
from pipelines.errors import InputError
from pipelines.teachers import efficientnet
from pipelines.teachers.folders import read_config
from pipelines.teachers.own_run import run_teacher
from pipelines.teachers.timm_folder import timm_teacher
from pipelines.teachers.transformers_folder import transformers_teacher


def open_teacher(uri: str, *, layer: int | None, side: int, device: str = "cpu") -> Teacher:
    """The teacher that `uri` names, on `device`, frozen.

    `side` patches a side are what the tokenizer has: teachers of any size take the one that gives
    as many, the others are as they are.

    Raises:
        InputError: there is none, it cannot be read, or it has no such layer.
    """
    if uri == efficientnet.NAME:
        return efficientnet.efficientnet_teacher(layer=layer, side=side, device=device)
    if not storage.exists(storage.join(uri, "config.json")):
        return run_teacher(uri, layer=layer, device=device)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(storage.absolute(uri))
        if not storage.is_local(uri):
            folder = Path(directory)
            storage.fetch_dir(uri, directory, suffixes=(".json", ".safetensors"))
        config = read_config(folder, uri)
        if "model_type" in config:
            return transformers_teacher(folder, config, uri, layer=layer, side=side, device=device)
        if "architecture" in config:
            return timm_teacher(folder, config, uri, layer=layer, device=device)
    return run_teacher(uri, layer=layer, device=device)


def absolute_uri(uri: str) -> str:
    """The same for workers with another working directory; names of packages stay."""
    return uri if uri in ("", efficientnet.NAME) else storage.absolute(uri)


def check_grid(teacher: Teacher, grid_size: tuple[int, int], *, image_size: int) -> None:
    """Raises InputError unless teacher and tokenizer cut an image into the same patches."""
    if teacher.grid_size == grid_size:
        return
    rows, columns = teacher.grid_size
    fitting = image_size / rows
    remedy = (
        f"set model.patch_size {fitting:.0f}"
        if rows == columns and fitting.is_integer()
        else f"set model.image_size and model.patch_size for {rows} patches a side"
    )
    raise InputError(
        f"teacher = {teacher.name}: its features lie on a grid of {rows} x {columns} patches, the "
        f"tokens of model.image_size = {image_size} on one of {grid_size[0]} x {grid_size[1]}; "
        f"{remedy}, or take another teacher"
    )
