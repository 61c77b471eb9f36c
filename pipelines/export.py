"""Weights of a run, or published ones, written for another library and read back.

What was written is loaded again and must compute the same before the stage says done: bit for
bit where our readers read it, within 1e-4 of the largest value for ONNX Runtime.
"""

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beit.foreign import IMAGENET_MEAN, IMAGENET_STD, ONNX_FILE, WRITERS, load_whole
from beit.mae import MaeNetwork
from beit.mim import BeitMIM, BeitV2MIM
from beit.positions import resize_positions
from beit.weights import save_weights
from pipelines import lease, storage
from pipelines.config.export import ExportConfig
from pipelines.errors import InputError, StageFailed
from pipelines.tables.weights_store import Whole, open_network, open_whole
from pipelines.training.weights import whole_network

ONNX_TOLERANCE = 1e-4
# Formats that keep what only pretraining needs, and of which network.
WHOLE: Mapping[str, type[BeitV2MIM | MaeNetwork]] = {
    "unilm": BeitV2MIM,
    "mae": MaeNetwork,
    "hf": MaeNetwork,
}

USE = {
    "hf": "{cls}.from_pretrained({output!r})",
    "timm": "timm.create_model('local-dir:{output}', pretrained=True)",
    "unilm": "run_class_finetuning.py --finetune {output}/checkpoint.pth",
    "mae": "main_finetune.py --finetune {output}/checkpoint.pth",
    "onnx": "onnxruntime.InferenceSession('{output}/encoder.onnx')",
    "weights": "beit.weights.load_weights({output!r})",
}


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written."""

    output: str
    files: tuple[str, ...]
    largest_difference: float | None
    """Between the network and what was read back; None: not compared (no ONNX Runtime)."""
    use: str
    """One line that loads it."""

    def summary(self) -> str:
        """Two lines for the command."""
        checked = (
            "not compared: onnxruntime is not installed"
            if self.largest_difference is None
            else f"read back, largest difference {self.largest_difference:.1g}"
        )
        return f"{self.output}: {', '.join(self.files)} ({checked})\n  use: {self.use}"


def run(config: ExportConfig) -> ExportResult:
    """Writes the export.

    Raises:
        InputError: no weights there, they do not fit, or the output folder is in use.
        StageFailed: what was written does not compute the same.
    """
    output = storage.absolute(config.output)
    with tempfile.TemporaryDirectory(prefix="beit-export-") as scratch:
        network, told = _open(config)
        extra = _with_pixels(config, told)
        folder = Path(scratch, "out")
        try:
            files = _write(config, network, extra, folder)
        except ValueError as error:
            raise InputError(f"run = {config.run}: {error}") from error
        difference = _difference(config, network, folder)
        # A lease clears its output up, and a folder of somebody else is none of our business.
        _refuse_others(folder, output, config)
        with lease.held(output, config.lease, stage="export") as holder:
            _refuse_others(folder, output, config)
            storage.store_dir(folder, output, last="config.json", check=holder.fence.check)
            holder.done()
    return ExportResult(
        output=output,
        files=tuple(files),
        largest_difference=difference,
        use=_use(output, config, network),
    )


def _open(config: ExportConfig) -> tuple[Whole, dict[str, Any]]:
    """The network to write, and what is known beside its tensors."""
    kind = None if config.encoder_only else WHOLE.get(config.format)
    opened = open_network if kind is None else open_whole
    stored = opened(config.run, image_size=config.image_size, num_heads=config.num_heads)
    network = stored.network
    if kind and "steps" in stored.extra:
        trained = whole_network(config.run, kind, steps=stored.extra["steps"])
        if trained is not None:
            network = resize_positions(trained, network.image_size)
    if isinstance(network, BeitV2MIM | MaeNetwork) and not (kind and isinstance(network, kind)):
        network = network.plain()
    return network.eval(), stored.extra


def _use(output: str, config: ExportConfig, network: Whole) -> str:
    """One line that loads it: libraries open folders of a disk."""
    local = storage.is_local(output)
    folder = output if local else output.partition("?")[0].rstrip("/").rpartition("/")[2]
    line = USE[config.format].format(output=folder, cls=_transformers_class(config, network))
    return line if local else f"copied to a disk: {line}"


def _refuse_others(folder: Path, output: str, config: ExportConfig) -> None:
    """Raises InputError if anything is there but these files, as a killed export leaves them."""
    for file in storage.list_files(output):
        ours = folder / file.path
        if lease.is_of_lease(file.path) or (
            ours.is_file()
            and ours.stat().st_size == file.size
            and ours.read_bytes() == storage.read_bytes(storage.join(output, file.path))
        ):
            continue
        raise InputError(
            f"output = {config.output}: holds files already, the first is {file.path!r}; give an "
            "empty folder"
        )


def _with_pixels(config: ExportConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """What is known beside the tensors, with how pixels were normalised.

    Raises:
        InputError: the format keeps that, and neither the weights nor the user tell.
    """
    if config.pixel_mean and config.pixel_std:
        told = {"pixel_mean": list(config.pixel_mean), "pixel_std": list(config.pixel_std)}
        extra = {**extra, **told}
    if "pixel_mean" not in extra and config.format in ("hf", "timm", "weights"):
        raise InputError(
            f"run = {config.run}: does not tell how pixels were normalised; give --pixel_mean and "
            "--pixel_std: '[0.5, 0.5, 0.5]' twice for the released BEiT, "
            f"'{list(IMAGENET_MEAN)}' and '{list(IMAGENET_STD)}' for the released BEiT v2"
        )
    return extra


def _write(config: ExportConfig, network: Whole, extra: dict[str, Any], folder: Path) -> list[str]:
    if config.format == "weights":
        assert not isinstance(network, MaeNetwork)
        save_weights(network, folder, extra=extra)
        return ["weights.safetensors", "config.json"]
    options: dict[str, Any] = {}
    if config.format != "onnx":
        options |= {"mean": extra.get("pixel_mean"), "std": extra.get("pixel_std")}
    if config.format == "hf":
        options["encoder_only"] = config.encoder_only
        options["class_names"] = extra.get("class_names", ())
    if config.format == "onnx":
        if importlib.util.find_spec("onnxscript") is None:
            raise InputError("format = onnx: needs onnxscript; install the extra beit-ray[onnx]")
        # The exporter reports what it skips of libraries that are not there.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return WRITERS[config.format](network, folder, **options)


def _difference(config: ExportConfig, network: Whole, folder: Path) -> float | None:
    """Largest absolute difference between the network's outputs and the export's."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, *network.image_size, generator=generator)
    with torch.no_grad():
        if config.format == "onnx":
            if importlib.util.find_spec("onnxruntime") is None:
                return None
            import onnxruntime

            session = onnxruntime.InferenceSession(
                str(folder / ONNX_FILE), providers=["CPUExecutionProvider"]
            )
            expected = _output(network, pixels)
            found = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
            limit = ONNX_TOLERANCE * max(1.0, expected.abs().max().item())
        else:
            again = load_whole(
                folder, image_size=network.image_size, num_heads=network.num_heads
            ).eval()
            # An encoder alone has no head to compare.
            headless = config.encoder_only and config.format == "hf"
            expected = _output(network, pixels, headless=headless)
            found = _output(again, pixels, headless=headless)
            if found.dim() > expected.dim():  # pooled by the class token, which is normed already
                found = found[:, 0]
            limit = 0.0
    difference = (found - expected).abs().max().item()
    if not difference <= limit:
        raise StageFailed(
            f"what was written differs by {difference:.3g} from the network (allowed: {limit:.1g});"
            " nothing was stored"
        )
    return difference


def _output(network: Whole, pixels: torch.Tensor, *, headless: bool = False) -> torch.Tensor:
    if isinstance(network, BeitV2MIM | MaeNetwork):
        mask = torch.arange(network.num_patches).expand(len(pixels), -1) % 2 == 0
        whole: torch.Tensor = network(pixels, mask)
        return whole
    if isinstance(network, BeitMIM):
        return network.features(pixels)
    if headless:
        return network.pooled(pixels)
    logits: torch.Tensor = network(pixels)
    return logits


def _transformers_class(config: ExportConfig, network: Whole) -> str:
    if config.encoder_only:
        return "BeitModel"
    if isinstance(network, MaeNetwork):
        return "ViTMAEForPreTraining"
    pretraining = isinstance(network, BeitMIM)
    return "BeitForMaskedImageModeling" if pretraining else "BeitForImageClassification"
