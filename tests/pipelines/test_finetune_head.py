"""When the head of a classifier goes on in fine-tuning, and what is said when it does not."""

import pytest
import torch

from beit.classifier import BeitClassifier
from beit.foreign import write_huggingface
from beit.weights import save_weights
from pipelines import finetune
from pipelines.config.checks import flatten, to_dict
from pipelines.tracking.table import deciding
from pipelines.training.finetuning import build_classifier, plan_run
from tests.pipelines.finetune_fixtures import ENCODER, MEAN, STD, small_finetune, write_encoder
from tests.pipelines.pretrain_fixtures import events_of, write_images

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("images"))
    write_images(uri, 48, parts=1, class_names=NAMES)
    return uri


def classifier(pooling="mean"):
    options = {name: value for name, value in ENCODER.items() if name != "vocab_size"}
    options["relative_positions"] = "per_block"
    model = BeitClassifier(**options, num_classes=3, pooling=pooling)
    model.init_weights(torch.Generator().manual_seed(4))
    return model


def settings(run, images, tmp_path, **changes):
    return small_finetune({"run": str(run), "images": images}, tmp_path / "run", **changes)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_it_goes_on_with_the_pooling_that_it_was_trained_on(pooling, images, tmp_path):
    source = classifier(pooling)
    extra = {"pixel_mean": MEAN, "pixel_std": STD, "class_names": NAMES}
    save_weights(source, tmp_path / "source", extra=extra)
    for asked in ("mean", "cls"):
        config = settings(tmp_path / "source", images, tmp_path, model={"pooling": asked})
        plan = plan_run(config)[2]
        head = build_classifier(config, plan).state_dict()["head.weight"]
        kept = torch.equal(head, source.state_dict()["head.weight"])
        assert plan.keep_head == kept == (asked == pooling)
        if not kept:
            assert (
                plan.why_fresh == f"the weights' own was trained on pooling {pooling}, not {asked}"
            )


def test_it_goes_on_through_a_transformers_folder(images, tmp_path):
    source = classifier()
    told = {"mean": MEAN, "std": STD}
    write_huggingface(source, tmp_path / "named", class_names=NAMES, **told)
    config = settings(tmp_path / "named", images, tmp_path)
    plan = plan_run(config)[2]
    assert plan.keep_head
    head = build_classifier(config, plan).state_dict()["head.weight"]
    assert torch.equal(head, source.state_dict()["head.weight"])
    for folder, names, why in [
        ("silent", (), "the weights do not name their classes"),
        ("turned", NAMES[::-1], "the weights' own is of other classes than the images"),
    ]:
        write_huggingface(source, tmp_path / folder, class_names=names, **told)
        assert plan_run(settings(tmp_path / folder, images, tmp_path))[2].why_fresh == why


def test_a_random_encoder_has_nothing_of_the_weights_but_their_sizes(images, tmp_path):
    source = classifier()
    extra = {"pixel_mean": MEAN, "pixel_std": STD, "class_names": NAMES}
    save_weights(source, tmp_path / "source", extra=extra)

    def begun(seed):
        config = settings(
            tmp_path / "source", images, tmp_path, model={"encoder": "random"}, seed=seed
        )
        plan = plan_run(config)[2]
        assert plan.why_fresh == "model.head = auto, model.encoder = random"
        # MLflow's table tells it from a run that begins with the weights.
        assert deciding("finetune", flatten(to_dict(config)))["model.encoder"] == "random"
        return build_classifier(config, plan).state_dict()

    one, again, other = begun(0), begun(0), begun(1)
    given = source.state_dict()
    for name in ("patch_embed.proj.weight", "blocks.1.mlp.fc1.weight", "head.weight"):
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])
        assert one[name].shape == given[name].shape
        assert not torch.equal(one[name], given[name])


def test_what_became_of_it_is_an_event(images, tmp_path):
    run = write_encoder(tmp_path / "encoder")
    config = settings(run, images, tmp_path, optim={"steps": 2, "warmup_steps": 1})
    finetune.run(config)
    (event,) = [event for event in events_of(config.output) if event["event"] == "head"]
    assert not event["kept"]
    assert event["message"] == "the head is fresh: the weights have none"
