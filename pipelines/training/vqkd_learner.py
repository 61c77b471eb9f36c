"""VQ-KD in training: a teacher's features through the codebook, and a codebook that follows.

Provenance: BEiT v2 (arXiv 2208.06366), section 3.1; microsoft/unilm at 768a3c8. What differs is
written where it does: one k-means start for all workers, and codes that start again.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from beit import counters, optim
from beit.teachers import Teacher
from beit.tokenizers.clustering import kmeans
from beit.tokenizers.vqkd import (
    FeatureDecoder,
    VqkdTokenizer,
    moved_codebook,
    num_heads_of,
    restarted,
)
from pipelines.config.train_tokenizer import TrainTokenizerConfig
from pipelines.sample_order import SampleOrder
from pipelines.training.distributed import World
from pipelines.training.tokenizer_step import Learner, Outcome

KMEANS_ITERATIONS = 10
RESTART_SHARE = 16
"""At most one code in so many starts again in a step."""


class Vqkd(Learner):
    """Encoder, codebook and decoder; the teacher stands beside them and is not trained."""

    terms = ("loss", "feature_loss", "commitment")
    tokenizer: VqkdTokenizer
    usage: Tensor
    no_weight_decay = frozenset(
        {"tokenizer.encoder.pos_embed", "tokenizer.encoder.cls_token",
         "decoder.pos_embed", "decoder.cls_token"}
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: VqkdTokenizer,
        teacher: Teacher,
        config: TrainTokenizerConfig,
        order: SampleOrder,
        world: World,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.teacher, self.config, self.order, self.world = teacher, config, order, world
        self.shards = order.shards_of(world.rank, world.size)
        vocab_size, code_dim = tokenizer.codebook.shape
        self.num_patches = tokenizer.grid_size[0] * tokenizer.grid_size[1]
        dim = config.vqkd.decoder_dim or config.model.dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(counters.device_seed(config.seed, 0, 0))
            self.decoder = FeatureDecoder(
                num_patches=self.num_patches,
                code_dim=code_dim,
                dim=dim,
                depth=config.vqkd.decoder_depth,
                num_heads=num_heads_of(dim),
                feature_dim=teacher.dim,
            ).to(world.device)
        # Patches that a code would get in a step if all got as many.
        self.even = order.global_batch_size * self.num_patches / vocab_size
        usage = torch.full((vocab_size,), self.even, device=world.device)
        self.register_buffer("usage", usage)

    @property
    def trained(self) -> "Vqkd":
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        return optim.parameter_groups(self, weight_decay)

    def prepare(self, images: Tensor, step: int) -> tuple[Tensor, ...]:
        """The teacher's features (B, N, D). Step 0 first places the codebook."""
        if step == 0:
            self._place_codebook(images)
        return (self.teacher.features(images),)

    @torch.no_grad()
    def _place_codebook(self, images: Tensor) -> None:
        """K-means centres of the states of the first *global* batch, equal on all workers.

        Upstream's workers cluster their own batches, each from a seed of its own. States are
        computed by canonical shard, so that they do not depend on how many workers there are.
        """
        by_shard = torch.split(images, self.order.shard_batch_size)
        own = torch.cat([self.tokenizer.states(shard).flatten(0, 1) for shard in by_shard])
        states = torch.cat(self.world.gather(own))
        codebook = torch.zeros_like(self.tokenizer.codebook)
        if self.world.rank == 0:  # on CUDA, sums of equal numbers may differ in their last bits
            generator = torch.Generator().manual_seed(self.config.seed)
            centres, _ = kmeans(
                states, len(codebook), generator=generator, num_iterations=KMEANS_ITERATIONS
            )
            codebook = F.normalize(centres, dim=1)
        self.tokenizer.codebook.copy_(self.world.sum(codebook))

    def forward(self, images: Tensor, *prepared: Tensor) -> Outcome:
        """Terms: loss, 1 - cosine of the predicted features, commitment."""
        (features,) = prepared
        states = self.tokenizer.states(images)
        codes = self.tokenizer.likeness(states.detach()).argmax(-1)
        matched = F.embedding(codes, self.tokenizer.codebook)
        commitment = F.mse_loss(states, matched)
        # The gradient of what the decoder sees goes past the codebook, straight to the states.
        predicted = self.decoder(states + (matched - states).detach())
        feature_loss = (1 - F.cosine_similarity(predicted.float(), features, dim=-1)).mean()
        loss = feature_loss + self.config.vqkd.commitment * commitment
        with torch.no_grad():
            terms = torch.stack([loss, feature_loss, commitment])
        return Outcome(loss, terms, codes.flatten(), states.detach().flatten(0, 1))

    @torch.no_grad()
    def after_step(self, outcome: Outcome, step: int) -> None:
        """Moves the codebook by the states of the global batch, and restarts what has died."""
        assert outcome.states is not None
        how, codebook = self.config.vqkd, self.tokenizer.codebook
        sums = torch.zeros(len(codebook), codebook.shape[1] + 1, device=codebook.device)
        ones = torch.ones_like(outcome.states[:, :1])
        sums.index_add_(0, outcome.codes, torch.cat((outcome.states, ones), dim=1))
        sums = self.world.sum(sums)
        counts = sums[:, -1]
        moved = moved_codebook(codebook, sums[:, :-1], counts, how.decay)
        usage = torch.lerp(counts, self.usage, how.decay)
        if how.restart_below > 0:
            moved, usage = restarted(
                moved,
                usage,
                self._candidates(outcome.states, step),
                least=how.restart_below * self.even,
                fresh=self.even,
            )
        codebook.copy_(moved)
        self.usage.copy_(usage)

    def _candidates(self, states: Tensor, step: int) -> Tensor:
        """States (R, D) drawn from canonical shards of the batch: the same on all workers."""
        shard_patches = self.order.shard_batch_size * self.num_patches
        most = math.ceil(len(self.usage) / RESTART_SHARE)
        count = math.ceil(most / self.order.num_shards)
        chosen = [
            position * shard_patches + int(uniform * shard_patches)
            for position, shard in enumerate(self.shards)
            for uniform in counters.uniforms(
                self.config.seed, counters.RESTARTS, (step, shard, 0), count
            )
        ]
        rows = torch.tensor(chosen, pin_memory=states.is_cuda)
        rows = rows.to(states.device, non_blocking=True)
        return torch.cat(self.world.gather(states[rows]))[:most]

    @torch.no_grad()
    def figures(self, images: Tensor, step: int) -> dict[str, float]:  # noqa: ARG002
        """Codes that hardly any patch was matched with lately."""
        starved = self.usage < self.config.vqkd.restart_below * self.even
        return {"starved_codes": float(starved.sum())}
