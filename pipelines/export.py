"""Weights of a run, or published ones, written for another library and read back.

What was written is loaded again and must compute the same before the stage says done: bit for
bit where our readers read it, within 1e-4 of the largest value for ONNX Runtime.
"""

import importlib.util
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beit.classifier import BeitClassifier
from beit.foreign import IMAGENET_MEAN, IMAGENET_STD, ONNX_FILE, WRITERS, load_network
from beit.mim import BeitMIM
from beit.positions import resize_positions
from beit.weights import FORMAT, read_weights_config, save_weights
from pipelines import storage
from pipelines.config.export import ExportConfig
from pipelines.errors import InputError, StageFailed

ONNX_TOLERANCE = 1e-4
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
Network = BeitMIM | BeitClassifier

USE = {
    "hf": "{cls}.from_pretrained({output!r})",
    "timm": "timm.create_model('local-dir:{output}', pretrained=True)",
    "unilm": "run_class_finetuning.py --finetune {output}/checkpoint.pth",
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
    if storage.list_files(output):
        raise InputError(f"output = {config.output}: holds files already; give an empty folder")
    with tempfile.TemporaryDirectory(prefix="beit-export-") as scratch:
        network, extra = _load(config, Path(scratch, "in"))
        network.eval()
        folder = Path(scratch, "out")
        try:
            files = _write(config, network, extra, folder)
        except ValueError as error:
            raise InputError(f"run = {config.run}: {error}") from error
        difference = _difference(config, network, folder)
        storage.store_dir(folder, output, last="config.json")
    return ExportResult(
        output=output,
        files=tuple(files),
        largest_difference=difference,
        use=USE[config.format].format(output=output, cls=_transformers_class(config, network)),
    )


def _load(config: ExportConfig, local: Path) -> tuple[Network, dict[str, Any]]:
    local = _fetch(config.run, local)
    try:
        network = load_network(local, image_size=config.image_size, num_heads=config.num_heads)
        if config.image_size is not None and network.image_size != (config.image_size,) * 2:
            network = resize_positions(network, config.image_size)
    except ValueError as error:
        raise InputError(str(error).replace(str(local), config.run)) from error
    return network, _extra(local)


def _fetch(run: str, local: Path) -> Path:
    """A local copy of the weights that `run` names: a folder or a file."""
    if Path(run.partition("?")[0]).suffix in WEIGHT_FILES:
        if not storage.exists(run):
            raise InputError(f"run = {run}: there is no such file")
        local.mkdir()
        file = local / Path(run.partition("?")[0]).name
        file.write_bytes(storage.read_bytes(run))
        return file
    weights = storage.join(run, "weights")
    if storage.list_files(weights):
        storage.fetch_dir(weights, local)
    elif storage.exists(storage.join(run, "run.json")):
        raise InputError(
            f"run = {run}: the run has no finished weights yet; start the same pretrain command "
            "again and let it finish"
        )
    elif storage.list_files(run):
        storage.fetch_dir(run, local)
    else:
        raise InputError(f"run = {run}: nothing is there")
    return local


def _extra(local: Path) -> dict[str, Any]:
    """What is known beside the tensors: above all how pixels were normalised."""
    if (local / "config.json").is_file():
        values = storage.read_json(str(local / "config.json"))
        if values.get("format") == FORMAT:
            return dict(read_weights_config(local)["extra"])
    processor = local / "preprocessor_config.json"
    if processor.is_file():
        values = storage.read_json(str(processor))
        return {"pixel_mean": values["image_mean"], "pixel_std": values["image_std"]}
    return {}


def _write(
    config: ExportConfig, network: Network, extra: dict[str, Any], folder: Path
) -> list[str]:
    if config.format == "weights":
        if not isinstance(network, BeitMIM):
            raise ValueError("a fine-tuned classifier; format weights holds pretrained networks")
        save_weights(network, folder, extra=extra)
        return ["weights.safetensors", "config.json"]
    options: dict[str, Any] = {}
    if config.format in ("hf", "timm"):
        options["mean"] = extra.get("pixel_mean", IMAGENET_MEAN)
        options["std"] = extra.get("pixel_std", IMAGENET_STD)
    if config.format == "hf":
        options["encoder_only"] = config.encoder_only
    if config.format == "onnx":
        if importlib.util.find_spec("onnxscript") is None:
            raise InputError("format = onnx: needs onnxscript; install the extra beit-ray[onnx]")
        # The exporter reports what it skips of libraries that are not there.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return WRITERS[config.format](network, folder, **options)


def _difference(config: ExportConfig, network: Network, folder: Path) -> float | None:
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
            again = load_network(
                folder, image_size=network.image_size, num_heads=network.num_heads
            ).eval()
            # An encoder alone has no head to compare.
            headless = isinstance(again, BeitClassifier) and not again.num_classes
            expected = _output(network, pixels, headless=headless)
            found = _output(again, pixels, headless=headless)
            limit = 0.0
    difference = (found - expected).abs().max().item()
    if not difference <= limit:
        raise StageFailed(
            f"what was written differs by {difference:.3g} from the network (allowed: {limit:.1g});"
            " nothing was stored"
        )
    return difference


def _output(network: Network, pixels: torch.Tensor, *, headless: bool = False) -> torch.Tensor:
    if isinstance(network, BeitMIM):
        return network.features(pixels)
    if headless:
        x = network.run_blocks(network.embed(pixels, None, None))
        pooled: torch.Tensor = network.fc_norm(x[:, 1:].mean(dim=1))
        return pooled
    logits: torch.Tensor = network(pixels)
    return logits


def _transformers_class(config: ExportConfig, network: Network) -> str:
    if config.encoder_only:
        return "BeitModel"
    pretraining = isinstance(network, BeitMIM)
    return "BeitForMaskedImageModeling" if pretraining else "BeitForImageClassification"
