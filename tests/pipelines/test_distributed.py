"""How workers share the model: what is compiled, and when its gradients are ready."""

import functools

import torch
from torch import nn

from beit.mim import BeitMIM
from beit.objectives import Beit
from pipelines.training.distributed import World, wrap_model

SMALL = {
    "image_size": 16,
    "patch_size": 8,
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "vocab_size": 11,
    "absolute_positions": False,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
}


def node_that_gives(gradient_of, root):
    """The step of the backward pass in which this parameter's gradient becomes ready."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if getattr(following, "variable", None) is gradient_of:
                return node
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    raise AssertionError("no gradient")


def test_gradients_of_blocks_are_ready_one_after_the_other(monkeypatch):
    """Else nothing would be left to exchange them beside."""
    compile_ = nn.Module.compile
    aot = functools.partialmethod(compile_, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", aot)
    torch.manual_seed(0)
    objective, alone = Beit(BeitMIM(**SMALL)), World(0, 1, torch.device("cpu"))
    wrapped = wrap_model(objective, alone, strategy="ddp", compiled=True)
    mask = torch.tensor([[True, False, True, False]] * 2)
    targets = torch.tensor([1, 2, 3, 4])
    outcome = wrapped(torch.randn(2, 3, 16, 16), mask, targets, num_masked=4, noise=None)
    weights = [block.mlp.fc1.weight for block in objective.network.blocks]
    nodes = [node_that_gives(weight, outcome.sums.grad_fn) for weight in weights]
    assert all("Compiled" in node.name() for node in nodes)
    assert len(set(nodes)) == SMALL["depth"]
