"""Files of other libraries: read any BEiT checkpoint into a network, write one for them.

Reading executes nothing: safetensors, or torch files with weights_only.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit.convert import (
    Network,
    from_huggingface,
    from_timm,
    from_unilm,
    official_tensors,
    to_huggingface,
    to_timm,
    to_unilm,
)
from beit.convert_mae import (
    from_mae,
    is_mae,
    mae_from_huggingface,
    mae_to_huggingface,
    to_mae,
)
from beit.git_lfs import check_fetched
from beit.infer_config import options_of, told
from beit.mae import MaeNetwork
from beit.mim import BeitMIM, BeitV2MIM
from beit.tensor_files import read_tensors
from beit.weights import FORMATS, is_ours, load_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNILM_FILE = "checkpoint.pth"
PREPROCESSOR_FILE = "preprocessor_config.json"
ONNX_FILE = "encoder.onnx"
ONNX_OPSET = 18
# Training saves of the official code carry their options: argparse's record of plain values, paths
# and NumPy scalars. None of these does anything when it is made.
_OPTIONS: list[Any] = [
    argparse.Namespace,
    *((path, f"{module}.{path.__name__}")
      for path in (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath)
      for module in ("pathlib", "pathlib._local")),
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar")
      for core in ("core", "_core")),
    np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
]  # fmt: skip
_BICUBIC = 3  # Pillow's number, which preprocessor_config.json wants


def load_network(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Network:
    """The network in `path`: our weights folder, a transformers or timm folder, an official file.

    What only pretraining needs is left out: BEiT v2's aggregation head, MAE's decoder
    (`load_whole` has them). image_size and num_heads serve files that do not tell them (see
    `beit.convert.from_unilm`). ValueError if it is none of these, or does not fit.
    """
    whole = load_whole(path, image_size=image_size, num_heads=num_heads)
    return whole.plain() if isinstance(whole, BeitV2MIM | MaeNetwork) else whole


def load_whole(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Network | MaeNetwork:
    """As `load_network`, with all that the file holds: a `BeitV2MIM`, a `MaeNetwork`."""
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{place} does not exist")
    if place.is_file():
        return _official(place, image_size=image_size, num_heads=num_heads)
    config = _read_config(place)
    if config is None:
        file = place / UNILM_FILE
        if not file.exists():
            raise ValueError(f"{place} has no config.json and no {UNILM_FILE}: no BEiT weights")
        return _official(file, image_size=image_size, num_heads=num_heads)
    if is_ours(config):
        return load_weights(place)
    if config.get("model_type") == "beit":
        return from_huggingface(_read_folder(place), config, source=str(place))
    if config.get("model_type") == "vit_mae":
        return mae_from_huggingface(_read_folder(place), config, source=str(place))
    # Published folders have no model_args: what they do not tell is read off the tensors.
    arguments = config.get("model_args") or {}
    if isinstance(arguments, Mapping) and str(config.get("architecture")).startswith("beit"):
        return from_timm(
            _read_folder(place),
            image_size=_pair(arguments.get("img_size", image_size)),
            num_heads=arguments.get("num_heads", num_heads),
            source=str(place),
        )
    raise ValueError(
        f"{place / 'config.json'} describes no BEiT: expected format "
        f"{' or '.join(map(repr, FORMATS))}, model_type 'beit' or 'vit_mae' (transformers) or "
        "architecture 'beit...' (timm)"
    )


def _official(
    file: Path, *, image_size: int | tuple[int, int] | None, num_heads: int | None
) -> Network | MaeNetwork:
    state = _read_tensors(file)
    tensors = official_tensors(state)
    if is_mae(tensors):
        args = state.get("args")
        heads = {"num_heads": num_heads or told(args, "num_heads")}
        heads["decoder_heads"] = told(args, "decoder_heads")
        return from_mae(tensors, **heads, source=str(file))
    return from_unilm(state, image_size=image_size, num_heads=num_heads, source=str(file))


def pixel_statistics(path: str | Path) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and deviation of pixels in [0, 1] by which the weights in `path` want them normalised.

    As their family says: transformers' image processor, timm's configuration, the options inside
    an official file, ImageNet's for an official MAE file. None where nothing says so;
    ValueError for what is no JSON, or says it by anything but three numbers each.
    """
    place = Path(path)
    if place.is_file():
        return _statistics_of_file(_read_tensors(place), place)
    if (place / UNILM_FILE).is_file() and not (place / "config.json").is_file():
        return pixel_statistics(place / UNILM_FILE)
    processor = _read_json(place / PREPROCESSOR_FILE)
    if processor is not None:
        return _told(processor, ("image_mean", "image_std"), place / PREPROCESSOR_FILE)
    timm = (_read_config(place) or {}).get("pretrained_cfg")
    return _told(timm, ("mean", "std"), place / "config.json")


def _told(
    values: Any, names: tuple[str, str], path: Path
) -> tuple[Sequence[float], Sequence[float]] | None:
    if not isinstance(values, Mapping) or any(values.get(name) is None for name in names):
        return None
    mean, std = (_channels(values[name], f"{path}: {name}") for name in names)
    return mean, std


def _channels(value: Any, where: str) -> list[float]:
    numbers = isinstance(value, list) and [c for c in value if isinstance(c, int | float)]
    if not numbers or len(numbers) != 3 or numbers != value:
        raise ValueError(f"{where} = {value!r}: expected three numbers")
    return numbers


def _statistics_of_file(
    state: Mapping[str, Any], place: Path
) -> tuple[Sequence[float], Sequence[float]] | None:
    options = options_of(state.get("args"))
    if ours := _told(options, ("pixel_mean", "pixel_std"), place / "args"):
        return ours
    imagenet = options.get("imagenet_default_mean_and_std")
    if imagenet or (imagenet is None and is_mae(official_tensors(state))):
        return IMAGENET_MEAN, IMAGENET_STD
    return None if imagenet is None else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def class_names(folder: str | Path) -> list[str]:
    """Of a transformers classifier, in the order of its outputs; empty where nobody named them."""
    named = (_read_config(Path(folder)) or {}).get("id2label")
    if not isinstance(named, Mapping) or set(named) != {str(i) for i in range(len(named))}:
        return []
    names = [str(named[str(i)]) for i in range(len(named))]
    # What transformers writes for classes without names.
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def write_unilm(model: Network, folder: str | Path, **pixels: Sequence[float] | None) -> list[str]:
    """`checkpoint.pth` for the official scripts (`--finetune`, or `--resume` without optimiser).

    `mean` and `std` of pixels are kept beside the tensors, for `pixel_statistics`.
    """
    return _write_official(to_unilm(model), folder, **pixels)


def write_mae(
    model: MaeNetwork | Network, folder: str | Path, **pixels: Sequence[float] | None
) -> list[str]:
    """`checkpoint.pth` for MAE's official scripts (`--finetune`, or `--resume`); `mean` and `std`
    as `write_unilm`."""
    return _write_official(to_mae(model), folder, **pixels)


def _write_official(
    file: dict[str, Any],
    folder: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[str]:
    if mean is not None and std is not None:
        file["args"] |= {"pixel_mean": list(mean), "pixel_std": list(std)}
    torch.save(file, _made(folder) / UNILM_FILE)
    return [UNILM_FILE]


def write_huggingface(
    model: Network | MaeNetwork,
    folder: str | Path,
    *,
    encoder_only: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    class_names: Sequence[str] = (),
) -> list[str]:
    """A folder for `from_pretrained`: weights, configuration and image preprocessing."""
    directory = _made(folder)
    if isinstance(model, MaeNetwork):
        state, config = mae_to_huggingface(model)
    else:
        state, config = to_huggingface(model, encoder_only=encoder_only, class_names=class_names)
    _save(state, directory / "model.safetensors")
    _write_json(directory / "config.json", config)
    preprocessing = {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": model.image_size[0], "width": model.image_size[1]},
        "resample": _BICUBIC,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_reduce_labels": False,
    }
    _write_json(directory / PREPROCESSOR_FILE, preprocessing)
    return ["model.safetensors", "config.json", PREPROCESSOR_FILE]


def write_timm(
    model: Network,
    folder: str | Path,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> list[str]:
    """A folder for `timm.create_model("local-dir:FOLDER")`."""
    directory = _made(folder)
    state, arguments = to_timm(model)
    _save(state, directory / "model.safetensors")
    config = {
        "architecture": "beit_base_patch16_224",
        "num_classes": arguments["num_classes"],
        "num_features": model.dim,
        "global_pool": arguments["global_pool"],
        "model_args": {k: v for k, v in arguments.items() if k != "num_classes"},
        "pretrained_cfg": {
            "tag": "beit_ray",
            "num_classes": arguments["num_classes"],
            "input_size": [3, *model.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": list(mean),
            "std": list(std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _write_json(directory / "config.json", config)
    return ["model.safetensors", "config.json"]


class _Features(nn.Module):
    def __init__(self, model: BeitMIM) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.features(pixels)


def write_onnx(model: Network, folder: str | Path) -> list[str]:
    """`encoder.onnx`: `pixels` (batch, 3, H, W) float32 to an output, for any batch size.

    A `BeitMIM` gives `features` (batch, 1+N, dim) after the final norm, a classifier `logits`.
    """
    directory = _made(folder)
    pretraining = isinstance(model, BeitMIM)
    network = _Features(model) if isinstance(model, BeitMIM) else model
    was_training = model.training
    network.eval()
    try:
        # A fused kernel's memory layout would be traced, and does not fit what replaces it.
        with sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                network,
                (torch.zeros(2, 3, *model.image_size),),
                input_names=["pixels"],
                output_names=["features" if pretraining else "logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=ONNX_OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        model.train(was_training)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    program.save(str(directory / ONNX_FILE), external_data=False)
    return [ONNX_FILE]


#: What `write_*` each format has.
WRITERS: Mapping[str, Callable[..., list[str]]] = {
    "hf": write_huggingface,
    "timm": write_timm,
    "unilm": write_unilm,
    "mae": write_mae,
    "onnx": write_onnx,
}


def _made(folder: str | Path) -> Path:
    directory = Path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _read_config(folder: Path) -> dict[str, Any] | None:
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    check_fetched(path)
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")  # noqa: TRY004 - a bad file
    return config


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return dict(_read_tensors(folder / name))
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _read_tensors(path: Path) -> Mapping[str, Any]:
    """Tensors of a safetensors or torch file; nothing in it is executed."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    check_fetched(path)
    try:
        with torch.serialization.safe_globals(_OPTIONS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as plain tensors: {error}") from error
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise ValueError(f"{path} holds a {kind}, no tensors by name")  # noqa: TRY004 - a bad file
    return state


def _pair(size: Any) -> int | tuple[int, int] | None:
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return None if size is None else int(size)
