import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from beit import flops
from beit.mim import BeitMIM, BeitV2MIM
from beit.objectives import Beit, BeitV2

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 64,
    "depth": 3,
    "num_heads": 4,
    "absolute_positions": True,
    "relative_positions": "none",
    "layer_scale_init": None,
}


def batch(num_masked=6, images=2, vocab_size=100):
    """Pixels, mask and targets; every image has as many masked patches, elsewhere."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(images, 3, 32, 32, generator=generator)
    ranks = torch.rand(images, 16, generator=generator).argsort(dim=1).argsort(dim=1)
    mask = ranks < num_masked
    targets = torch.randint(vocab_size, (images * num_masked,), generator=generator)
    return pixels, mask, targets


@pytest.mark.parametrize(
    ("dim", "depth", "expected"), [(768, 12, 107.978305536e9), (1024, 24, 372.788723712e9)]
)
def test_flops_are_those_counted_on_the_real_networks(dim, depth, expected):
    # Counted by torch's FlopCounterMode on BEiT-Base and -Large of the official code, which
    # evaluates the last block everywhere.
    embedding = flops.patch_embedding(196, 16, dim)
    head = flops.linear(75, dim, 8192)
    forward = embedding + depth * flops.block(197, dim, 4) + head
    assert flops.with_backward(forward, embedding) == pytest.approx(expected, rel=1e-9)


def counted(objective, num_masked=6):
    """FLOPs of a forward and backward pass on one image, with those that the counter misses."""
    pixels, mask, targets = batch(num_masked)
    with FlopCounterMode(display=False) as counter:
        outcome = objective(pixels, mask, targets, num_masked=2 * num_masked, noise=None)
        outcome.sums[0].backward()
    # The counter does not know the fused attention kernel of the CPU: 4 * T^2 * dim a block.
    attention = 3 * objective.num_branches * 4 * 17**2 * 64
    return counter.get_total_flops() / 2 + attention


class TestBeit:
    def objective(self):
        return Beit(BeitMIM(**SMALL, vocab_size=100))

    def test_sums_are_those_of_the_logits(self):
        objective, (pixels, mask, targets) = self.objective(), batch()
        logits = objective.network(pixels, mask)
        outcome = objective(pixels, mask, targets, num_masked=12, noise=None)
        assert torch.equal(outcome.codes, logits.argmax(dim=-1))
        loss, correct = outcome.sums.tolist()
        assert loss / 12 == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)
        assert correct == (outcome.codes == targets).sum()
        assert objective(pixels, mask, outcome.codes, num_masked=12, noise=None).sums[1] == 12

    def test_a_batch_without_masked_patches_has_sums_and_gradients_of_zero(self):
        objective, (pixels, _, _) = self.objective(), batch()
        mask = torch.zeros(2, 16, dtype=torch.bool)
        nothing = torch.zeros(0, dtype=torch.int64)
        outcome = objective(pixels, mask, nothing, num_masked=0, noise=None)
        assert outcome.sums.tolist() == [0, 0]
        outcome.sums[0].backward()
        assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())

    def test_flops_match_what_is_executed(self):
        objective = self.objective()
        assert counted(objective) == objective.flops_per_image(6)

    def test_what_is_exported_is_the_network(self):
        objective, (pixels, mask, _) = self.objective(), batch()
        weights = {name: value + 1 for name, value in objective.network.state_dict().items()}
        exported = objective.export(weights)
        assert torch.equal(exported.mask_token, objective.network.mask_token + 1)
        objective.network.load_state_dict(weights)
        assert torch.equal(exported(pixels, mask), objective.network(pixels, mask))


class TestBeitV2:
    def objective(self):
        return BeitV2(BeitV2MIM(**SMALL, vocab_size=100, early_layer=2))

    def test_both_losses_count_alike_and_the_last_block_is_judged(self):
        objective, (pixels, mask, targets) = self.objective(), batch()
        main, aggregated = objective.network(pixels, mask)
        outcome = objective(pixels, mask, targets, num_masked=12, noise=None)
        sums = dict(zip(objective.metrics, outcome.sums.tolist(), strict=True))
        losses = [F.cross_entropy(logits, targets).item() for logits in (main, aggregated)]
        assert sums["main_loss"] / 12 == pytest.approx(losses[0], abs=1e-5)
        assert sums["aggregated_loss"] / 12 == pytest.approx(losses[1], abs=1e-5)
        assert sums["loss"] / 12 == pytest.approx(sum(losses), abs=1e-5)
        assert torch.equal(outcome.codes, main.argmax(dim=-1))
        assert sums["mim_accuracy"] == (main.argmax(dim=-1) == targets).sum()
        assert sums["aggregated_accuracy"] == (aggregated.argmax(dim=-1) == targets).sum()

    def test_what_is_minimised_reaches_every_parameter(self):
        objective, (pixels, mask, targets) = self.objective(), batch()
        objective(pixels, mask, targets, num_masked=12, noise=None).sums[0].backward()
        assert all(p.grad is not None and p.grad.any() for p in objective.parameters())

    def test_predictions_are_those_of_the_last_block(self):
        objective, (pixels, mask, _) = self.objective(), batch()
        predicted = objective.predict(pixels, mask)
        assert torch.equal(predicted[mask], objective.network(pixels, mask)[0].argmax(dim=-1))

    def test_what_is_exported_lacks_the_aggregation_head_only(self):
        objective, (pixels, mask, _) = self.objective(), batch()
        exported = objective.export(objective.network.state_dict())
        assert type(exported) is BeitMIM
        main, _ = objective.network(pixels, mask)
        assert torch.equal(exported(pixels, mask), main)
        tokens = objective.network.features(pixels, layer=3)
        assert torch.equal(exported.features(pixels, layer=3), tokens)

    def test_flops_match_what_is_executed(self):
        objective = self.objective()
        assert counted(objective) == objective.flops_per_image(6)
