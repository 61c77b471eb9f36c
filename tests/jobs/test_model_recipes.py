"""Every recipe of a paper parses, and means what its name and header say."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from beit.classifier import BeitClassifier
from beit.mim import SIZES, BeitMIM, model_config
from beit.tokenizers.vqkd import FeatureDecoder
from jobs.command import parse
from jobs.recipes import shipped_recipes
from pipelines import plan
from pipelines.config.finetune import AugmentConfig, FinetuneConfig, MixingConfig
from pipelines.config.plan import PlanConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.train_tokenizer import TrainTokenizerConfig
from pipelines.training.objective import build_objective
from pipelines.training.tokenizer_step import build_tokenizer

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "jobs" / "configs"
BEIT_V2 = set(CONFIGS.glob("beit_v2_*.yaml"))
BEIT = sorted(set(CONFIGS.glob("beit_*.yaml")) - BEIT_V2)
RECIPES = [*BEIT, *sorted(BEIT_V2), CONFIGS / "mae_base_in1k.yaml"]


def load(path):
    flags = ["--config", str(path), "--images", "I", "--output", "O"]
    tokens = [] if path.stem.startswith("mae") else ["--tokens", "T"]
    return parse(PretrainConfig, [*flags, *tokens], stage="pretrain")


TUNING = {  # epochs, warm-up, learning rate, layer decay, drop path
    "finetune_beit_base_in1k": (100, 20, 4e-3, 0.65, 0.1),
    "finetune_beit_large_in1k": (50, 5, 1e-3, 0.75, 0.2),
    "finetune_beit_v2_base_in1k": (100, 20, 5e-4, 0.6, 0.2),
    "finetune_mae_base_in1k": (100, 5, 5e-4 * 1024 / 256, 0.65, 0.1),
}


def load_tuning(path):
    flags = ["--config", str(path), "--run", "R", "--images", "I", "--output", "O"]
    return parse(FinetuneConfig, flags, stage="finetune")


@pytest.mark.parametrize("name", TUNING)
def test_a_recipe_of_fine_tuning_has_the_published_values(name):
    config = load_tuning(CONFIGS / f"{name}.yaml")
    optim = config.optim
    found = (optim.epochs, optim.warmup_epochs, optim.lr, optim.layer_decay, config.model.drop_path)
    assert found == TUNING[name]
    assert (optim.weight_decay, optim.min_lr, optim.clip_grad_norm) == (0.05, 1e-6, None)
    assert (config.mixing, config.augment) == (MixingConfig(), AugmentConfig())
    assert config.data.global_batch_size == 1024
    large = "large" in name
    size = {**SIZES["large" if large else "base"], "relative_positions": "per_block"}
    with torch.device("meta"):
        network = BeitClassifier(
            **size, image_size=224, patch_size=16, absolute_positions=False, num_classes=1000
        )
    gflop = re.search(r"([\d.]+) GFLOP an image", (CONFIGS / f"{name}.yaml").read_text())[1]
    assert network.flops_per_image() == pytest.approx(float(gflop) * 1e9, rel=5e-3)


def test_all_recipes_are_there():
    names = {path.stem for path in RECIPES}
    for size in ("base", "large"):
        assert {f"beit_{size}_in1k_300", f"beit_{size}_in1k_800"} <= names
    assert {"beit_base_in22k", "beit_base_plain_in1k_800"} <= names
    assert {"beit_small_in1k_300", "beit_tiny_in1k_300"} <= names


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_in*k*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_how_many_views_there_are(path):
    (said,) = re.findall(
        r"^# Views: (8 \(beit tokenize --num_views 8|a new one each)",
        path.read_text(),
        re.MULTILINE,
    )
    assert said.startswith("8") == (path.stem.startswith("beit_"))


@pytest.mark.parametrize("path", BEIT, ids=lambda path: path.stem)
def test_a_recipe_is_the_network_and_schedule_of_its_name(path):
    config = load(path)
    size = path.stem.split("_")[1]
    plain = "plain" in path.stem
    expected = model_config(size, architecture="plain" if plain else "shared_bias")
    model = config.model
    assert (model.dim, model.depth, model.num_heads) == tuple(
        SIZES[size][field] for field in ("dim", "depth", "num_heads")
    )
    assert model.layer_scale_init == expected["layer_scale_init"]
    assert model.absolute_positions == expected["absolute_positions"]
    assert model.relative_positions == expected["relative_positions"]
    assert model.grid_size == (14, 14)
    epochs = re.search(r"_(\d+)$", path.stem)
    assert config.optim.epochs == (float(epochs[1]) if epochs else 150)
    assert config.optim.lr == 1.5e-3
    assert config.optim.min_lr == 1e-5
    assert config.optim.weight_decay == 0.05
    assert config.optim.clip_grad_norm == (1.0 if size == "large" else 3.0)
    assert config.data.global_batch_size == 2048
    assert config.masking.num_masked == 75
    if "in22k" in path.stem:
        assert config.optim.warmup_steps == 10_000
        assert config.data.mean == (0.5, 0.5, 0.5)
    else:
        assert config.optim.warmup_epochs == 10
        assert config.data.mean == (0.485, 0.456, 0.406)
    with torch.device("meta"):
        network = BeitMIM(
            image_size=model.image_size,
            patch_size=model.patch_size,
            dim=model.dim,
            depth=model.depth,
            num_heads=model.num_heads,
            vocab_size=8192,
            absolute_positions=model.absolute_positions,
            relative_positions=model.relative_positions,
            layer_scale_init=model.layer_scale_init,
        )
    counts = {"tiny": 7.2e6, "small": 24.9e6, "base": 92e6, "large": 311.6e6}
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(counts[size], rel=0.02)


@pytest.mark.parametrize(
    ("size", "layer_scale", "early_layer", "parameters", "gflop"),
    [("base", 0.1, 9, 106_143_056, 128.26), ("large", 1e-5, 21, 336_728_512, 407.26)],
)
def test_beit_v2_is_the_official_network_and_schedule(
    size, layer_scale, early_layer, parameters, gflop
):
    config = load(CONFIGS / f"beit_v2_{size}_in1k.yaml")
    assert (config.model.layer_scale_init, config.objective.early_layer) == (
        layer_scale,
        early_layer,
    )
    assert (config.objective.kind, config.masking.exact) == ("beitv2", True)
    assert (config.optim.epochs, config.optim.lr, config.optim.beta2) == (1600, 1.5e-3, 0.999)
    assert (config.optim.clip_grad_norm, config.data.global_batch_size) == (3.0, 2048)
    with torch.device("meta"):
        objective = build_objective(config, 8192)
    assert sum(p.numel() for p in objective.parameters()) == parameters
    # GFLOP are as the official network is evaluated; ours leaves out projection and MLP of the
    # last block but for cls and 75 patches, and of the last head block but for 75.
    left_out = 3 * (121 + 122) * 18 * config.model.dim**2
    assert objective.flops_per_image(75) + left_out == pytest.approx(gflop * 1e9, rel=1e-4)


def test_mae_is_the_official_network_and_schedule():
    config = load(CONFIGS / "mae_base_in1k.yaml")
    assert config.tokens == []
    assert (config.masking.kind, config.masking.num_masked) == ("random", 196 - int(0.25 * 196))
    assert config.optim.lr == 1.5e-4 * config.data.global_batch_size / 256
    assert (config.optim.epochs, config.optim.warmup_epochs, config.optim.min_lr) == (1600, 40, 0)
    assert (config.optim.beta2, config.optim.clip_grad_norm) == (0.95, None)
    assert (config.policy.min_area, config.policy.brightness) == (0.2, 0)
    with torch.device("meta"):
        objective = build_objective(config, None)
    # Less the official network's biases of keys, which change nothing.
    count = sum(p.numel() for p in objective.parameters())
    assert count == 111_907_840 - 12 * 768 - 8 * 512
    # Three times 19.56 GFLOP as it is evaluated there; ours leaves out projection and MLP of the
    # decoder's last block, and its output layer, where nothing is masked.
    left_out = 3 * 50 * (18 * 512**2 + 2 * 512 * 768)
    expected = 3 * 19.56e9 - 2 * 196 * 768 * 768
    assert objective.flops_per_image(147) + left_out == pytest.approx(expected, rel=2e-3)


def test_vqkd_is_the_official_tokenizer_and_schedule():
    path = CONFIGS / "vqkd_base_in1k.yaml"
    flags = ["--config", str(path), "--images", "I", "--output", "O", "--teacher", "T"]
    config = parse(TrainTokenizerConfig, flags, stage="train-tokenizer")
    optim = config.optim
    assert optim.lr == 5e-5 * config.data.global_batch_size / 128
    assert (optim.min_lr, optim.beta2, optim.weight_decay) == (1e-5, 0.99, 1e-4)
    assert (optim.steps, optim.warmup_steps) == (100 * (1_281_167 // 512), 10 * (1_281_167 // 512))
    assert (optim.clip_grad_norm, config.views.min_area, config.views.jitter) == (None, 0.08, 0)
    assert (config.vqkd.decay, config.vqkd.commitment) == (0.99, 1.0)
    model = config.model
    with torch.device("meta"):
        tokenizer = build_tokenizer(model, seed=0)
        decoder = FeatureDecoder(
            num_patches=196, code_dim=model.code_dim, dim=model.dim,
            depth=config.vqkd.decoder_depth, num_heads=model.heads, feature_dim=512,
        )  # fmt: skip
    assert tokenizer.grid_size == (14, 14)
    assert sum(p.numel() for p in tokenizer.parameters()) == pytest.approx(86.40e6, abs=5e3)
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(22.42e6, abs=5e3)


@pytest.mark.parametrize(
    "path", [*RECIPES, *CONFIGS.glob("finetune_*.yaml")], ids=lambda path: path.stem
)
def test_a_header_says_what_a_user_wants_to_know(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for label in ("Command:", "Hardware:", "Hours:", "Expect:", "Accuracy:", "Settings:"):
        assert label in text, label
    assert f"jobs/configs/{path.name}" in text
    steps = int(re.search(r"([\d,]+) in all", text)[1].replace(",", ""))
    per_epoch = int(re.search(r"([\d,]+) steps an epoch", text)[1].replace(",", ""))
    config = load_tuning(path) if path.stem.startswith("finetune") else load(path)
    assert steps == per_epoch * config.optim.epochs


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_says_what_it_reaches(name):
    """Command, cost, expected figure, source; and where its result is, or that there is none."""
    path = shipped_recipes()[name]
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    text = " ".join(line.lstrip("# ") for line in lines)
    for label in ("Command:", "Cost:", "Expect:", "Settings:", "Run here:"):
        assert text.count(label) == 1, label
    assert re.search(rf"Command: beit [\w-]+ --config jobs/configs/{name}\.yaml", text)
    (ran,) = re.findall(r"Run here: (\S+)", text)
    assert ran.startswith("never") or (REPOSITORY / ran).is_file()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_in*k*.yaml")), ids=lambda path: path.stem)
def test_the_hours_of_a_recipe_are_those_of_the_plan(path):
    text = path.read_text()
    hours = re.search(r"Hours: about ([\d.]+)", text)
    flags = re.search(r"^# Cost: beit plan (.*)$", text, re.MULTILINE)[1]
    if hours is None:
        assert "Hours: not known" in text
        return
    planned = plan.run(parse(PlanConfig, flags.split(), stage="plan")).pretrain_hours
    digits = len(hours[1].partition(".")[2])
    assert round(planned, digits) == float(hours[1])
