"""The fine-tuning network (encoder, pooled tokens, norm, linear head), and what it minimises.

Provenance: microsoft/unilm at 768a3c8, `beit/modeling_finetune.py`; the `state_dict` has that
file's names. Pretraining's `mask_token` and `lm_head` have no part in it.
"""

from typing import Any, ClassVar, Literal, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit import flops
from beit.initialisation import INIT_STD, init_encoder_
from beit.mim import BeitMIM
from beit.vit import BeitEncoder, Block, EncoderOptions

Pooling = Literal["mean", "cls"]

#: The official start of the head: so small that fine-tuning begins at uniform predictions.
#: Upstream's classifiers cut their normal draws at 2, not at one deviation as in pretraining.
HEAD_INIT_STD = 0.001 * INIT_STD


class BeitClassifier(BeitEncoder):
    """Images to class logits. `num_classes` 0 leaves the head out: forward gives pooled features.

    `pooling` "mean": the mean of the patch tokens, then `fc_norm`; "cls": the class token after
    pretraining's `norm`. Fresh weights come from torch's default generator, `init_weights` draws
    them again.
    """

    def __init__(
        self, *, num_classes: int, pooling: Pooling = "mean", **options: Unpack[EncoderOptions]
    ) -> None:
        super().__init__(**options)
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling {pooling!r}: use mean or cls")
        self.num_classes, self.pooling = num_classes, pooling
        norm = nn.LayerNorm(self.dim, eps=self.norm_eps)
        if pooling == "mean":
            self.fc_norm = norm
        else:
            self.norm = norm
        self.head: nn.Module = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    @property
    def norm_name(self) -> str:
        """Name of the norm before the head."""
        return "fc_norm" if self.pooling == "mean" else "norm"

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: the encoder as in pretraining, the head N(0, HEAD_INIT_STD)."""
        init_encoder_(self, generator)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.normal_(std=HEAD_INIT_STD, generator=generator)

    def config(self) -> dict[str, Any]:
        """JSON values for which `BeitClassifier(**config)` is this architecture."""
        # Left out where it is what it always was: folders of earlier releases stay equal.
        pooling = {} if self.pooling == "mean" else {"pooling": self.pooling}
        return {**super().config(), "num_classes": self.num_classes, **pooling}

    def forward(self, pixels: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Class logits (B, num_classes) of normalised pixels (B, 3, H, W)."""
        logits: Tensor = self.head(self.pooled(pixels, noise=noise))
        return logits

    def pooled(self, pixels: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """What the head sees of normalised pixels (B, 3, H, W): (B, dim)."""
        x = self.run_blocks(self.embed(pixels, None, None), noise=noise)
        if self.pooling == "mean":
            return cast(Tensor, self.fc_norm(x[:, 1:].mean(dim=1)))
        return cast(Tensor, self.norm(x[:, 0]))

    def features(self, pixels: Tensor, *, layer: int | None = None) -> Tensor:
        """Tokens (B, 1+N, dim), cls first, after block `layer` (from 1, None: the last)."""
        return self.run_blocks(self.embed(pixels, None, None), num_blocks=layer)

    def flops_per_image(self) -> float:
        """Floating-point operations of one image's forward and backward pass."""
        embedding = flops.patch_embedding(self.num_patches, self.patch_size, self.dim)
        blocks = self.depth * flops.block(self.num_patches + 1, self.dim, self.mlp_ratio)
        head = flops.linear(1, self.dim, self.num_classes)
        return flops.with_backward(embedding + blocks + head, embedding)


class Classification(nn.Module):
    """What fine-tuning minimises: cross-entropy of smoothed labels, one or two to an image.

    A module, since DDP and compile wrap it whole; its parameters are those of `network`.
    """

    #: Names of the sums over images. `train_accuracy` takes the label with the larger share.
    metrics: ClassVar[tuple[str, ...]] = ("loss", "train_accuracy")

    def __init__(self, network: BeitClassifier, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing

    def forward(
        self, pixels: Tensor, labels: Tensor, shares: Tensor, *, noise: Tensor | None = None
    ) -> Tensor:
        """Sums over the images by `metrics`: float32 (2,).

        pixels (B, 3, H, W) normalised; labels int64 (B, 2), the image's own and that of what was
        mixed into it; shares (B, 2), how much each counts; noise as `BeitEncoder.run_blocks`.
        """
        logits = self.network(pixels, noise=noise).float()
        losses = [
            F.cross_entropy(logits, each, reduction="none", label_smoothing=self.label_smoothing)
            for each in labels.unbind(1)
        ]
        loss = (torch.stack(losses, dim=1) * shares).sum()
        larger = labels.gather(1, shares.argmax(dim=1, keepdim=True)).squeeze(1)
        hits = (logits.detach().argmax(dim=1) == larger) & (shares.sum(dim=1) > 0)
        return torch.stack((loss, hits.sum(dtype=torch.float32)))


def classifier_from_pretraining(
    source: BeitMIM | BeitClassifier,
    *,
    num_classes: int,
    drop_path: float = 0.0,
    pooling: Pooling = "mean",
    keep_head: bool = False,
    generator: torch.Generator | None = None,
) -> BeitClassifier:
    """A network to fine-tune: the encoder of `source`, a fresh head, and a norm before it.

    The norm is fresh unless `source` has the one that `pooling` asks for. A shared bias table is
    copied into every block and trains separately there, as in the official code. The encoder's
    tensors are copies. With `keep_head` a classifier of as many classes keeps its head.
    """
    options = source.config()
    for name in ("vocab_size", "num_classes", "pooling", "early_layer", "head_layers"):
        options.pop(name, None)
    if options["relative_positions"] == "shared":
        options["relative_positions"] = "per_block"
    options["drop_path"] = drop_path
    model = BeitClassifier(**options, num_classes=num_classes, pooling=pooling)
    model.init_weights(generator)
    fresh = model.state_dict()
    taken = {name: value for name, value in per_block_tables(source).items() if name in fresh}
    if not keep_head:
        taken = {name: value for name, value in taken.items() if not name.startswith("head.")}
    may_be_fresh = (f"{model.norm_name}.", "head.")
    begun = {name: value for name, value in fresh.items() if name.startswith(may_be_fresh)}
    model.load_state_dict({**begun, **taken}, strict=True)
    return model


def per_block_tables(model: BeitEncoder) -> dict[str, Tensor]:
    """The state of `model`, its shared bias table (if any) given to every block."""
    state = dict(model.state_dict())
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for i, block in enumerate(model.blocks):
            name = f"blocks.{i}.attn.relative_position_bias_table"
            own = cast(Block, block).attn.relative_position_bias_table
            state[name] = shared.clone() if own is None else shared + own.detach()
    return state
