"""The learner of VQ-KD beside upstream's computation: loss, gradients and codebook of a step."""

import torch

from beit.teachers import Teacher
from beit.tokenizers.vqkd_import import vqkd_from
from pipelines.config.train_tokenizer import DataConfig, ModelConfig, VqkdConfig
from pipelines.sample_order import SampleOrder
from pipelines.training.distributed import World
from pipelines.training.vqkd_learner import Vqkd
from tests.beit.vqkd_peer import peer
from tests.pipelines.vqkd_fixtures import vqkd_settings

CODES, BATCH, FEATURES = 40, 8, 12


class Table:
    """As much of an image table as settings name."""

    uri = "images"


def teacher_of(target):
    """One that says `target` (B, N, D) of whatever it sees."""
    return Teacher(
        network=lambda _: target, image_size=32, grid_size=(4, 4), dim=FEATURES, mean=(0, 0, 0),
        std=(1, 1, 1), name="target", weights="", fingerprint="",
    )  # fmt: skip


def learner_of(model, target):
    """Ours with upstream's weights; codes are left where they are, as upstream does."""
    config = vqkd_settings(
        Table, "unused", "target",
        model=ModelConfig(kind="vqkd", image_size=32, patch_size=8, dim=128, depth=2, num_heads=2,
                          vocab_size=CODES, code_dim=8),
        vqkd=VqkdConfig(decoder_depth=2, decoder_dim=128, decay=0.99, restart_below=0),
        data=DataConfig(global_batch_size=BATCH, num_shards=4, window=8),
    )  # fmt: skip
    order = SampleOrder([BATCH], seed=0, global_batch_size=BATCH, num_shards=4, window=8)
    tokenizer = vqkd_from(model.state_dict()).requires_grad_(requires_grad=True)
    world = World(0, 1, torch.device("cpu"))
    learner = Vqkd(tokenizer, teacher_of(target), config, order, world)
    learner.decoder.load_state_dict(decoder_names(model.state_dict()))
    return learner


def decoder_names(state):
    """Upstream's tensors of the decoder, by our names."""
    names = {}
    for name, value in state.items():
        if name.startswith("decoder.patch_embed.proj."):
            weight = value.flatten(1) if value.ndim == 4 else value
            names[name.replace("decoder.patch_embed.proj", "embed")] = weight
        elif name.startswith("decoder."):
            names[name.removeprefix("decoder.")] = value
        elif name.startswith("decode_task_layer."):
            names[name.replace("decode_task_layer", "task_layer")] = value
    return names


def encoder_names(state):
    """Likewise of the encoder and what follows it."""
    names = {}
    for name, value in state.items():
        if name.startswith("encoder.fc_norm."):
            names[name.removeprefix("encoder.")] = value
        elif name.startswith("encoder."):
            names[name] = value
        elif name.startswith("encode_task_layer."):
            names[name.replace("encode_task_layer", "task_layer")] = value
    return names


def check_gradients(ours, theirs):
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert grads.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(grads[name], value, atol=1e-6, rtol=1e-4)


def test_a_step_is_that_of_upstream():
    model = peer(codes=CODES).train()
    generator = torch.Generator().manual_seed(2)
    pictures = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    target = torch.randn(BATCH, 16, FEATURES, generator=generator)
    learner = learner_of(model, target)
    before = learner.tokenizer.codebook.clone()
    loss, features, commitment = model(pictures.float(), target)
    loss.backward()

    outcome = learner(pictures, *learner.prepare(pictures, 1))
    outcome.loss.backward()
    torch.testing.assert_close(outcome.loss, loss)
    torch.testing.assert_close(outcome.terms, torch.stack([loss, features, commitment]).detach())
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    check_gradients(learner.decoder, decoder_names(theirs))
    check_gradients(learner.tokenizer, encoder_names(theirs))

    learner.after_step(outcome, 1)
    moved = learner.tokenizer.codebook
    torch.testing.assert_close(moved, model.quantize.embedding.weight.data)
    unused = torch.bincount(outcome.codes, minlength=CODES) == 0
    assert unused.any()
    assert torch.equal(moved[unused], before[unused])
