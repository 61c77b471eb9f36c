"""Configuration of the `import-tokenizer` stage."""

from dataclasses import dataclass, field
from typing import Annotated

from pipelines.config.checks import Ge, check, require
from pipelines.config.lease import LeaseConfig
from pipelines.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class ImportTokenizerConfig:
    """Published weights of DALL-E or VQ-KD to a tokenizer directory; no pickle is executed."""

    source: str
    """Path or URI of the encoder: OpenAI's encoder.pkl (a whole pickled network, either format of
    torch.save), a state dict of it, the FLAVA codebook (safetensors or pytorch_model.bin), or a
    VQ-KD file of BEiT v2 (vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth and its kin).
    Web addresses are not opened: download the file first."""
    output: str
    """URI of the tokenizer directory."""
    decoder: str = ""
    """Path or URI of decoder.pkl, for pictures of tokens; empty: none. Labels do not need it."""
    image_size: Annotated[int | None, Ge(8)] = None
    """Side of the square token view, in pixels. DALL-E: 112 if null, as BEiT has it for patches of
    16 at 224; the grid is image_size / 8. VQ-KD: null is the size in its file; for another one
    positions are interpolated as the official code does."""
    source_sha256: str = ""
    """SHA-256 that the source must have; empty: any. The hash is recorded in either case."""
    decoder_sha256: str = ""
    """The same for the decoder."""
    images: str = ""
    """URI of an image table to score the tokenizer on; empty: no score."""
    num_images: Annotated[int, Ge(1)] = 256
    """Images scored."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self)
        for name in ("source_sha256", "decoder_sha256"):
            value = getattr(self, name)
            hexadecimal = len(value) == 64 and set(value.lower()) <= set("0123456789abcdef")
            remedy = "must be 64 hexadecimal digits, or empty"
            require(not value or hexadecimal, name, value, remedy)
        has_decoder = bool(self.decoder) or not self.decoder_sha256
        require(has_decoder, "decoder_sha256", self.decoder_sha256, "set decoder as well")
