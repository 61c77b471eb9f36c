"""Pretraining that begins with weights: what is taken over, refused and recorded."""

import dataclasses

import pytest
import torch

from beit.foreign import write_huggingface, write_unilm
from beit.mae import MaeNetwork
from beit.mim import BeitMIM, BeitV2MIM
from beit.positions import resize_bias_table
from beit.warm_start import taken_over
from beit.weights import load_weights, read_weights_config, save_weights
from pipelines import pretrain, storage
from pipelines.errors import InputError
from pipelines.training.objective import build_objective, warm_start
from tests.pipelines.pretrain_fixtures import small_config

SMALL = {
    "image_size": 32,
    "patch_size": 4,
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "absolute_positions": False,
    "relative_positions": "shared",
    "layer_scale_init": 0.1,
}
PLAIN = {**SMALL, "absolute_positions": True, "relative_positions": "none"}


def network(cls=BeitMIM, **changes):
    """With every tensor random, so that none is equal by chance."""
    model = cls(**{**SMALL, "vocab_size": 64, **changes})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def taken(target, weights):
    """Names that `target` begins with, each checked to be what `weights` has."""
    found = taken_over(target, weights, source="S")
    for name, value in found.items():
        assert torch.equal(value, weights.state_dict()[name])
    return set(found)


def test_of_its_own_kind_everything_is_taken_over():
    assert taken(network(), network()) == set(network().state_dict())
    v2 = {"cls": BeitV2MIM, "early_layer": 1}
    assert taken(network(**v2), network(**v2)) == set(network(**v2).state_dict())


def test_v2_begins_with_beit_but_for_its_head():
    v2 = network(BeitV2MIM, early_layer=1)
    assert taken(v2, network()) == set(network().state_dict())
    assert taken(network(), v2) == set(network().state_dict())


def test_a_head_for_another_vocabulary_stays_fresh():
    missing = set(network().state_dict()) - taken(network(), network(vocab_size=7))
    assert missing == {"lm_head.weight", "lm_head.bias"}


def test_families_share_the_encoder_only():
    mae = MaeNetwork(**PLAIN, decoder_dim=32, decoder_depth=1, decoder_heads=2)
    plain = network(**PLAIN)
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc2.bias"}
    for found in (taken(plain, mae), taken(mae, plain)):
        assert names <= found
        assert all(name.startswith(("cls", "pos", "patch", "blocks")) for name in found)
    assert taken(mae, mae) == set(mae.state_dict())


def test_other_sizes_are_refused_with_the_tensors_that_differ():
    with pytest.raises(ValueError, match=r"S does not fit .*missing: blocks\.1.*") as refused:
        taken_over(network(), network(depth=1), source="S")
    assert "lm_head" not in str(refused.value)
    with pytest.raises(ValueError, match=r"missing: pos_embed; unknown: rel_pos_bias"):
        taken_over(network(**PLAIN), network(), source="S")


@pytest.mark.parametrize("form", ["weights", "hf", "unilm"])
def test_every_form_of_weights_is_read(form, tables, tmp_path):
    weights = network()
    if form == "weights":
        save_weights(weights, tmp_path / form)
    else:
        {"hf": write_huggingface, "unilm": write_unilm}[form](weights, tmp_path / form)
    uri = str(tmp_path / form) + ("/checkpoint.pth" if form == "unilm" else "")
    config = small_config(tables, tmp_path / "run", init=uri)
    begun = build_objective(config, 64).network
    warm_start(config, begun)
    for name, value in weights.state_dict().items():
        assert torch.equal(begun.state_dict()[name], value), name


def test_positions_are_resized(tables, tmp_path):
    save_weights(network(image_size=16), tmp_path / "w")
    config = small_config(tables, tmp_path / "run", init=str(tmp_path / "w"))
    begun = build_objective(config, 64).network
    warm_start(config, begun)
    table = "rel_pos_bias.relative_position_bias_table"
    expected = resize_bias_table(network(image_size=16).state_dict()[table], (4, 4), (8, 8))
    torch.testing.assert_close(begun.state_dict()[table], expected)


def test_a_run_begins_with_weights_and_records_which(tables, tmp_path):
    first = pretrain.run(small_config(tables, tmp_path / "first", optim={"steps": 4}))
    config = small_config(
        tables, tmp_path / "second", init=first.run_uri, optim={"steps": 1, "warmup_steps": 0},
        seed=9,
    )  # fmt: skip
    second = pretrain.run(config)
    prints = storage.read_json(f"{second.run_uri}/run.json")["fingerprints"]
    assert (
        prints["init"] == read_weights_config(second.weights_uri)["extra"]["fingerprints"]["init"]
    )
    before, after = (load_weights(r.weights_uri).state_dict() for r in (first, second))
    moved = max((before[name] - value).abs().max() for name, value in after.items())
    assert 0 < moved < 0.01, "one step away from where it began"
    assert pretrain.run(config).resumed_from == 1

    # Other weights at the same place are another run.
    third = small_config(tables, tmp_path / "third", optim={"steps": 2, "warmup_steps": 0})
    pretrain.run(third)
    with pytest.raises(InputError, match="fingerprint of init"):
        pretrain.run(dataclasses.replace(config, init=third.output))
    with pytest.raises(InputError, match=r"init = .*nowhere: nothing is there"):
        pretrain.run(dataclasses.replace(config, init=str(tmp_path / "nowhere")))
    save_weights(network(depth=1), tmp_path / "shallow")
    with pytest.raises(InputError, match=r"init = .*missing: blocks\.1.*give model\.\* the sizes"):
        pretrain.run(dataclasses.replace(config, init=str(tmp_path / "shallow")))
