"""Configuration of the `export` stage."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipelines.config.checks import Ge, check, require
from pipelines.config.lease import LeaseConfig


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Weights of a run, or published ones, in the layout of another library."""

    run: str
    """URI of a run directory, a weights folder, or published weights: a transformers or timm
    folder, or an official file of BEiT, BEiT v2 or MAE (.pth)."""
    output: str
    """URI of the folder to write; it must be empty or absent."""
    format: Literal["hf", "timm", "unilm", "mae", "onnx", "weights"] = "hf"
    """hf: transformers, for from_pretrained, MAE with its decoder; timm: for
    create_model("local-dir:...", pretrained=True); unilm, mae: the official codes' files, with all
    that an official file holds; onnx: the encoder; weights: this project's own folder."""
    encoder_only: bool = False
    """hf: a BeitModel, without head or decoder. unilm, mae: without what BEiT v2 and MAE train
    beside the encoder (aggregation head, decoder)."""
    image_size: Annotated[int | None, Ge(1)] = None
    """Resize positions to this image side, in pixels; null: as trained."""
    pixel_mean: tuple[float, float, float] | None = None
    """Per channel, of pixels in [0, 1], for weights that do not tell how they were normalised."""
    pixel_std: tuple[float, float, float] | None = None
    """As pixel_mean: the deviation."""
    num_heads: Annotated[int | None, Ge(1)] = None
    """Attention heads of a unilm file without bias tables whose heads are not 64 wide."""

    lease: LeaseConfig = field(default_factory=LeaseConfig)

    def __post_init__(self) -> None:
        check(self)
        require(
            (self.pixel_mean is None) == (self.pixel_std is None),
            "pixel_mean, pixel_std",
            (self.pixel_mean, self.pixel_std),
            "give both or neither",
        )
        require(
            not self.encoder_only or self.format in ("hf", "unilm", "mae"),
            "encoder_only",
            self.encoder_only,
            f"goes with format hf, unilm and mae; {self.format} has no more: leave it out",
        )
