"""From a configuration to the learner that a tokenizer is trained by."""

from beit.tokenizers import ImageTokenizer, VqkdTokenizer
from beit.tokenizers.discrete_vae import DiscreteVae
from pipelines.config.train_tokenizer import TrainTokenizerConfig
from pipelines.sample_order import SampleOrder
from pipelines.teachers import open_teacher
from pipelines.training.distributed import World
from pipelines.training.dvae_learner import RelaxedVae
from pipelines.training.tokenizer_step import Learner
from pipelines.training.vqkd_learner import Vqkd


def build_learner(
    tokenizer: ImageTokenizer, config: TrainTokenizerConfig, order: SampleOrder, world: World
) -> Learner:
    """The learner of this worker, on the tokenizer's device.

    Raises:
        InputError: the teacher cannot be read.
    """
    shards = order.shards_of(world.rank, world.size)
    if isinstance(tokenizer, VqkdTokenizer):
        teacher = open_teacher(
            config.teacher,
            layer=config.layer,
            side=tokenizer.grid_size[0],
            device=str(world.device),
        )
        return Vqkd(tokenizer, teacher, config, order, world)
    assert isinstance(tokenizer, DiscreteVae)
    return RelaxedVae(tokenizer, config, shards=shards, shard_batch_size=order.shard_batch_size)
