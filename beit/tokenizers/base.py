"""What every image tokenizer shares: pictures to tokens, identity, precision."""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from beit.views import Interpolation

Precision = Literal["float32", "float16"]


def fingerprint_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """blake2b-128 over the canonical configuration and every tensor (name, dtype, shape, bytes)."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Match(NamedTuple):
    """Tokens of pictures, and how well each fits."""

    token_ids: Tensor
    """int64 (B, h*w), row-major."""
    logits: Tensor
    """float32 (B, h*w): that of the token, the larger the nearer to its code."""


class ImageTokenizer(nn.Module, ABC):
    """Pictures to token ids, and back where it can; what the pipelines ask of a tokenizer.

    It looks at views of side `image_size` (112 for DALL-E's 14 x 14 tokens), made from the source
    pixels by the filter `interpolation`, and maps their values to `pixel_range` itself. Weights
    are float32; `set_precision("float16")` rounds those of which a kind says that its tokens bear
    it, and leaves the identity of the tokenizer alone.
    """

    architecture: ClassVar[str]
    interpolation: ClassVar[Interpolation] = "lanczos"
    pixel_range: ClassVar[tuple[float, float]]
    #: What `set_precision` takes, the fastest on a GPU last.
    precisions: ClassVar[tuple[Precision, ...]] = ("float32", "float16")

    def __init__(self, *, image_size: int, stride: int, vocab_size: int) -> None:
        super().__init__()
        if image_size < stride or image_size % stride:
            raise ValueError(
                f"image_size {image_size} is not a multiple of the tokenizer's stride {stride}: "
                f"choose {max(1, round(image_size / stride)) * stride}"
            )
        self.image_size = image_size
        self.stride = stride
        self.vocab_size = vocab_size
        self.precision: Precision = "float32"
        self._fingerprint: str | None = None

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        return (self.image_size // self.stride, self.image_size // self.stride)

    @property
    def has_decoder(self) -> bool:
        """Whether `decode` makes pictures of tokens."""
        return False

    @abstractmethod
    def model_config(self) -> dict[str, Any]:
        """The constructor's keyword arguments."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> float32 (B,V,h,w): how well each code fits; the best is the token."""

    def config(self) -> dict[str, Any]:
        """What config.json holds: everything a reader needs to rebuild and feed the tokenizer."""
        return {
            "schema_version": 1,
            "architecture": self.architecture,
            "vocab_size": self.vocab_size,
            "image_size": self.image_size,
            "grid_size": list(self.grid_size),
            "stride": self.stride,
            "pixel_range": list(self.pixel_range),
            "interpolation": self.interpolation,
            "has_decoder": self.has_decoder,
            "model": self.model_config(),
        }

    def fingerprint(self) -> str:
        """Identity of configuration and float32 weights; the same on every device and precision.

        Computed once and kept: call it after training, not during.
        """
        if self._fingerprint is None:
            if self.precision != "float32":
                raise ValueError("fingerprint() must be taken before the weights are rounded")
            self._fingerprint = fingerprint_of(self.config(), self.state_dict())
        return self._fingerprint

    def set_precision(self, precision: Precision) -> None:
        """float16 rounds weights and computes with them, where that is for speed. Not reversible.

        Raises ValueError for a precision that this kind does not have.
        """
        if precision not in ("float32", "float16"):
            raise ValueError(f"precision {precision!r}: choose float32 or float16")
        if precision == self.precision:
            return
        if precision == "float32":
            raise ValueError("a float16 tokenizer has lost its float32 weights: load it again")
        if precision not in self.precisions:
            raise ValueError(
                f"precision {precision!r}: {self.architecture!r} has only "
                f"{' and '.join(self.precisions)}"
            )
        self.fingerprint()
        self.round_weights()
        self.precision = precision

    def round_weights(self) -> None:
        """To float16, in place, whatever a kind with that precision computes in it."""
        raise NotImplementedError

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError unless they are uint8 (B,3,H,W) and divide into whole tokens."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images of dtype {images.dtype} and shape {tuple(images.shape)}: "
                "uint8 (B,3,H,W) expected"
            )
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels do not divide into "
                f"tokens of {self.stride}x{self.stride}"
            )

    @torch.no_grad()
    def match(self, images: Tensor) -> Match:
        """uint8 (B,3,H,W) -> tokens and how well they fit, on the device."""
        logits = self.logits(images)
        token_ids = logits.argmax(dim=1, keepdim=True)
        return Match(token_ids.flatten(1), logits.gather(1, token_ids).float().flatten(1))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> token_ids int64 (B, h*w), row-major, by argmax on the device."""
        return self.logits(images).argmax(dim=1).flatten(1)

    def decode(self, token_ids: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """token_ids int (B, h*w) -> uint8 (B,3,H,W). `grid_size` where it is not the configured.

        Raises ValueError where there is no decoder, and for another number of tokens.
        """
        self.check_tokens(token_ids, grid_size or self.grid_size)
        raise ValueError(f"a tokenizer of architecture {self.architecture!r} has no decoder")

    def check_tokens(self, token_ids: Tensor, grid_size: tuple[int, int]) -> None:
        """Raises ValueError unless token_ids are (B, h*w)."""
        height, width = grid_size
        if token_ids.ndim != 2 or token_ids.shape[1] != height * width:
            raise ValueError(
                f"token_ids of shape {tuple(token_ids.shape)} do not fill a {height}x{width} grid"
            )
