"""Weights at any URI, whoever wrote them: a run's, a weights folder's, or published ones."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from beit.convert import Network
from beit.foreign import class_names, load_network, load_whole, pixel_statistics
from beit.mae import MaeNetwork
from beit.positions import resize_positions
from beit.weights import CONFIG_FILE, WEIGHTS_FILE, is_ours
from pipelines import storage
from pipelines.errors import InputError

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
# What else a folder with weights has to say.
FILES = (*WEIGHT_FILES, ".json")

Whole: TypeAlias = Network | MaeNetwork
N = TypeVar("N", Network, Whole)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored(Generic[N]):
    """A network, and what is known of it beside its tensors."""

    network: N
    uri: str
    """Of the weights themselves: a folder or a file."""
    fingerprint: str
    extra: dict[str, Any]
    """What its folder says: pixel_mean, pixel_std, class_names, ..., where it does."""

    @property
    def class_names(self) -> Sequence[str]:
        """Of a classifier; empty where they are not known."""
        names: Sequence[str] = self.extra.get("class_names") or ()
        return names


def open_network(
    uri: str,
    *,
    field: str = "run",
    image_size: int | None = None,
    num_heads: int | None = None,
) -> Stored[Network]:
    """The network of a run directory, a weights folder, or published weights, on the CPU.

    What only pretraining needs is left out (`open_whole` has it). `field` is the option that errors
    name. `image_size` resizes its positions, in pixels; `num_heads` serves official files that do
    not tell.

    Raises:
        InputError: there are none, or none that we know.
    """
    return _open(load_network, uri, field, image_size, num_heads)


def open_whole(
    uri: str,
    *,
    field: str = "run",
    image_size: int | None = None,
    num_heads: int | None = None,
) -> Stored[Whole]:
    """As `open_network`, with all that the files hold: aggregation head, decoder."""
    return _open(load_whole, uri, field, image_size, num_heads)


def _open(
    read: Callable[..., N], uri: str, field: str, image_size: int | None, num_heads: int | None
) -> Stored[N]:
    with tempfile.TemporaryDirectory(prefix="beit-weights-") as scratch:
        place, local = _fetch(uri, Path(scratch, "in"), field)
        try:
            network = read(local, image_size=image_size, num_heads=num_heads)
            if image_size is not None and network.image_size != (image_size, image_size):
                network = resize_positions(network, image_size)
            extra = _extra(local)
        except ValueError as error:
            raise InputError(f"{field} = {uri}: {str(error).replace(str(local), place)}") from error
        return Stored(network=network, uri=place, fingerprint=_identity(local), extra=extra)


def weights_fingerprint(uri: str) -> str:
    """Identity of a weights folder: the hash of names and contents of the files that make it up."""
    names = (WEIGHTS_FILE, CONFIG_FILE)
    files = [file for file in storage.list_files(uri, recursive=False) if file.path in names]
    return _hashed({f.path: storage.read_bytes(storage.join(uri, f.path)) for f in files})


def _identity(local: Path) -> str:
    files = [local] if local.is_file() else [file for file in local.iterdir() if file.is_file()]
    if not local.is_file() and is_ours(_config(local)):
        files = [file for file in files if file.name in (WEIGHTS_FILE, CONFIG_FILE)]
    return _hashed({file.name: file.read_bytes() for file in files})


def _hashed(files: dict[str, bytes]) -> str:
    return storage.fingerprint({name: storage.digest(data) for name, data in files.items()})


def _fetch(uri: str, local: Path, field: str) -> tuple[str, Path]:
    """URI and local copy of the weights that `uri` names: a folder or a file."""
    # A local name may have a question mark; in another URI the query begins there.
    name = Path(uri if storage.is_local(uri) else uri.partition("?")[0]).name
    if Path(name).suffix in WEIGHT_FILES:
        if not storage.exists(uri):
            raise InputError(f"{field} = {uri}: there is no such file")
        local.mkdir()
        file = local / name
        file.write_bytes(storage.read_bytes(uri))
        return storage.absolute(uri), file
    weights = storage.join(uri, "weights")
    if _holds_weights(weights):
        storage.fetch_dir(weights, local, suffixes=FILES)
        return storage.absolute(weights), local
    if storage.exists(storage.join(uri, "run.json")):
        raise InputError(
            f"{field} = {uri}: the run has no finished weights yet; start the same command that "
            "began it again and let it finish"
        )
    if not _holds_weights(uri):
        lacks = f"no weights are there ({', '.join(WEIGHT_FILES)}); give a run or a weights folder"
        raise InputError(f"{field} = {uri}: {lacks if storage.exists(uri) else 'nothing is there'}")
    storage.fetch_dir(uri, local, suffixes=FILES)
    return storage.absolute(uri), local


def _holds_weights(uri: str) -> bool:
    files = storage.list_files(uri, recursive=False)
    return any(file.path.endswith((*WEIGHT_FILES, CONFIG_FILE)) for file in files)


def _extra(local: Path) -> dict[str, Any]:
    """What is known beside the tensors: above all how pixels were normalised."""
    config = _config(local)
    if is_ours(config):
        extra = config.get("extra") or {}
        if not isinstance(extra, dict):
            raise ValueError(f"{local / CONFIG_FILE}: `extra` is {extra!r:.40}, and no object")
        return dict(extra)
    told, names = pixel_statistics(local), class_names(local)
    pixels = {} if told is None else {"pixel_mean": list(told[0]), "pixel_std": list(told[1])}
    return {**pixels, "class_names": names} if names else pixels


def _config(local: Path) -> dict[str, Any]:
    file = local / CONFIG_FILE
    values: dict[str, Any] = storage.read_json(str(file)) if file.is_file() else {}
    return values
