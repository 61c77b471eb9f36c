"""Configuration of the `export` stage."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.config.checks import Ge, check, require


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Weights of a run, or published ones, in the layout of another library."""

    run: str
    """URI of a run directory, a weights folder, or published weights: a transformers or timm
    folder, or a unilm file (.pth)."""
    output: str
    """URI of the folder to write; it must be empty or absent."""
    format: Literal["hf", "timm", "unilm", "onnx", "weights"] = "hf"
    """hf: transformers, for from_pretrained; timm: for create_model("local-dir:..."); unilm: the
    official code's file; onnx: the encoder; weights: this project's own folder."""
    encoder_only: bool = False
    """hf: a BeitModel, without the head."""
    image_size: Annotated[int | None, Ge(1)] = None
    """Resize positions to this image side, in pixels; null: as trained."""
    num_heads: Annotated[int | None, Ge(1)] = None
    """Attention heads of a unilm file without bias tables whose heads are not 64 wide."""

    def __post_init__(self) -> None:
        check(self)
        require(
            not self.encoder_only or self.format == "hf",
            "encoder_only",
            self.encoder_only,
            f"goes with format hf, not {self.format}; leave it out",
        )
