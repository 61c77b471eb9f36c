"""Image tokenizers: pictures to visual tokens, and back where they can.

`save_tokenizer` and `load_tokenizer` work on a local directory with `tokenizer.safetensors` (all
weights, float32) and `config.json`; no pickle is involved.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from beit.git_lfs import check_fetched
from beit.tensor_files import read_tensors
from beit.tokenizers.base import ImageTokenizer, Precision
from beit.tokenizers.dalle import DalleTokenizer
from beit.tokenizers.dvae import DvaeTokenizer
from beit.tokenizers.kmeans import KmeansTokenizer
from beit.tokenizers.projection import ProjectionTokenizer
from beit.tokenizers.vqkd import VqkdTokenizer

__all__ = [
    "ARCHITECTURES",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "DalleTokenizer",
    "DvaeTokenizer",
    "ImageTokenizer",
    "KmeansTokenizer",
    "Precision",
    "ProjectionTokenizer",
    "VqkdTokenizer",
    "load_tokenizer",
    "save_tokenizer",
]

WEIGHTS_FILE = "tokenizer.safetensors"
CONFIG_FILE = "config.json"
ARCHITECTURES: dict[str, type[ImageTokenizer]] = {
    kind.architecture: kind
    for kind in (DalleTokenizer, DvaeTokenizer, KmeansTokenizer, ProjectionTokenizer, VqkdTokenizer)
}


def save_tokenizer(tokenizer: ImageTokenizer, directory: str | Path) -> str:
    """Write weights and configuration into a local directory; returns the fingerprint."""
    if tokenizer.precision != "float32":
        raise ValueError("a float16 tokenizer has lost its float32 weights: save before rounding")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tokenizer.state_dict().items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"architecture": tokenizer.architecture})
    text = json.dumps(tokenizer.config(), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n")
    return tokenizer.fingerprint()


def load_tokenizer(
    directory: str | Path, *, device: str | torch.device = "cpu", precision: Precision = "float32"
) -> ImageTokenizer:
    """Read what `save_tokenizer` wrote, for inference, on `device`.

    Raises ValueError that names the file for a missing, foreign or damaged directory, and for
    weights that do not fit the configuration.
    """
    directory = Path(directory)
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(f"{path} is missing: {directory} holds no tokenizer")
        check_fetched(path)
    try:
        config = json.loads(config_path.read_text())
        with torch.device("meta"):  # every weight comes from the file
            tokenizer = ARCHITECTURES[config["architecture"]](**config["model"])
    except Exception as error:  # any value may stand where a size is wanted
        raise ValueError(
            f"{config_path} does not describe a tokenizer of {sorted(ARCHITECTURES)}: {error!r}"
        ) from error
    rebuilt = tokenizer.config()
    wrong = [name for name in {*config, *rebuilt} if config.get(name) != rebuilt.get(name)]
    if wrong:
        raise ValueError(f"{config_path}: fields {sorted(wrong)} contradict field model")
    tensors = read_tensors(weights_path)
    try:
        tokenizer.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights_path} does not fit {config_path}: {error}") from error
    tokenizer.requires_grad_(requires_grad=False)
    tokenizer.eval()
    for name, tensor in tokenizer.state_dict().items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{weights_path}: {name} is {tensor.dtype}, float32 expected")
    for parameter in tokenizer.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    tokenizer.fingerprint()  # while the weights are those of the file
    tokenizer.set_precision(precision)
    return tokenizer.to(device)
