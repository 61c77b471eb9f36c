"""How workers share the model: what is compiled, and when its gradients are ready."""

import functools
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn

from beit.mim import BeitMIM
from beit.objectives import Beit
from pipelines.errors import InputError
from pipelines.training import distributed
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


class Pair(World):
    """Two workers that are threads: what worker 0 broadcasts goes through a queue."""

    said: ClassVar[queue.Queue] = queue.Queue()
    heard: ClassVar[list] = []

    def broadcast(self, value):
        if self.rank == 0:
            self.said.put(value)
            return value
        self.heard.append(self.said.get(timeout=10))
        return self.heard[-1]


@pytest.mark.parametrize("fails", [False, True])
def test_others_hear_of_the_first_while_it_works(monkeypatch, fails):
    """A collective as long as the work would be taken for a stall."""
    monkeypatch.setattr(distributed, "HEARTBEAT", 0.02)
    Pair.heard.clear()
    first, second = (Pair(rank, 2, torch.device("cpu")) for rank in (0, 1))

    def work():
        until = time.monotonic() + 10
        while len(Pair.heard) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        if fails:
            raise InputError("no such column")
        return torch.get_num_threads()

    with ThreadPoolExecutor() as pool:
        other = pool.submit(second.on_first, work)
        if fails:
            with pytest.raises(InputError, match="no such column"):
                first.on_first(work)
        else:
            assert first.on_first(work) == torch.get_num_threads()
        assert other.result(timeout=10) is None
    assert len(Pair.heard) >= 4
    assert Pair.heard == [True] * (len(Pair.heard) - 1) + [False]


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
