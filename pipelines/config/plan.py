"""Configuration of `plan`."""

from dataclasses import dataclass
from typing import Annotated

from pipelines.config.checks import Ge, Gt, check, require


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What tokenizing and pretraining would cost. Reads manifests at most, writes nothing."""

    images: str = ""
    """Image table; its manifest gives the number of images and their bytes. Empty: see
    `num_images`."""
    num_images: Annotated[int, Ge(0)] = 0
    """Number of images, where there is no table yet."""
    image_kilobytes: Annotated[float, Gt(0)] = 110.0
    """Mean size of an encoded image, where there is no table yet (110: ImageNet-1k)."""
    num_views: Annotated[int, Ge(1)] = 4
    """Views kept in the token table."""
    epochs: Annotated[int, Ge(1)] = 300
    """Epochs of pretraining."""
    num_patches: Annotated[int, Ge(0)] = 0
    """Tokens of a view. 0: those of `tokenizer`, or 196 where none is named."""
    rows_per_unit: Annotated[int, Ge(1)] = 1024
    """Images in one unit of work."""
    num_gpus: Annotated[int, Ge(1)] = 8
    """GPUs for tokenizing and for pretraining; machines, where the rate is measured on a CPU."""
    num_cpus: Annotated[int, Ge(1)] = 64
    """CPU cores that decode."""
    tokenizer: str = ""
    """Tokenizer whose rate is measured here, on this machine's GPU or CPU. Empty: the rate below
    is believed."""
    encode_rate: Annotated[float, Gt(0)] = 2500.0
    """Views a second that one GPU tokenizes. The default is an assumption: the DALL-E encoder in
    float16 at 40 % of an A100's peak (50 GFLOP a view)."""
    decode_rate: Annotated[float, Ge(0)] = 0.0
    """Images a second that one core reads, decodes and renders `num_views` views of. 0: what
    500 x 375 JPEGs take in docs/tokenize.md."""
    train_rate: Annotated[float, Gt(0)] = 1000.0
    """Images a second that one GPU trains on. The default is an assumption: BEiT-Base at 224 px
    in bfloat16 on an A100."""

    def __post_init__(self) -> None:
        check(self)
        counted = bool(self.images) or self.num_images >= 1
        require(counted, "num_images", self.num_images, "give their number, or --images TABLE")
