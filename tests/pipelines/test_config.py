"""Bounds that fields declare, and records that other versions wrote."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from beit.view_policy import Framing, ViewPolicy
from pipelines.config.audit import AuditConfig
from pipelines.config.checks import (
    Before,
    Bound,
    Ge,
    Gt,
    Le,
    Lt,
    changed_fields,
    check,
    to_dict,
)
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.export import ExportConfig
from pipelines.config.import_tokenizer import ImportTokenizerConfig
from pipelines.config.plan import PlanConfig
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.tokenize_images import TokenizeConfig
from pipelines.config.train_tokenizer import TrainTokenizerConfig, ViewsConfig
from pipelines.errors import InputError
from pipelines.tables import token_files
from pipelines.tables.token_files import Identity

CONFIGS = [
    AuditConfig(table="t"),
    EvaluateConfig(run="r", images="i"),
    ExportConfig(run="r", output="o"),
    ImportTokenizerConfig(source="s", output="o"),
    PlanConfig(images="i"),
    PrepareConfig(source="s", output="o"),
    PretrainConfig(images="i", tokens=["t"], output="o"),
    TokenizeConfig(images="i", tokenizer="t", output="o"),
    TrainTokenizerConfig(images="i", output="o"),
]


def sections(config):
    """(prefix, section) of a configuration and of all within."""
    yield "", config
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            yield f"{name}.", value


def beyond(bound):
    """A number just outside."""
    step = {Ge: -1, Gt: 0, Le: 1, Lt: 0}[type(bound)]
    return bound.limit + step


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_declared_bound_is_kept_and_named(config):
    for prefix, section in sections(config):
        for name, hint in {f.name: f.type for f in dataclasses.fields(section)}.items():
            bounds = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Bound)]
            values = [beyond(bound) for bound in bounds] + [math.nan] * bool(bounds)
            for value in values:
                entry = (1.0, value, 1.0) if isinstance(getattr(section, name), tuple) else value
                with pytest.raises(InputError, match=rf"^{prefix}{name} = .*: must be"):
                    dataclasses.replace(section, **{name: entry})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_no_number_is_endless(config):
    for prefix, section in sections(config):
        for name in [f.name for f in dataclasses.fields(section)]:
            if isinstance(getattr(section, name), float):
                with pytest.raises(ValueError, match=rf"{prefix}{name}.* = .*inf"):
                    dataclasses.replace(section, **{name: math.inf})


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"relative_positions": "some"}, "choose none, shared, per_block"),
        ("model", {"image_size": 225}, "multiple of model.patch_size = 16"),
        ("model", {"num_heads": 7}, "must divide model.dim = 768"),
        ("masking", {"min_block": 76}, "between 1 and masking.num_masked = 75"),
        ("masking", {"max_block": 15}, "masking.max_block = 15: must be at least masking.min_b"),
        ("data", {"global_batch_size": 12}, "positive multiple of data.num_shards = 8"),
        ("optim", {"min_lr": 1.0}, "at most optim.lr = 0.0015"),
        ("optim", {"clip_grad_norm": 0.0}, "must be above 0; null for no clipping"),
        ("optim", {"beta1": 1.0}, "must be at least 0 and below 1"),
        ("scaling", {"num_workers": (2, 1)}, "1 <= min <= max"),
        ("scaling", {"strategy": "fsdp", "num_workers": 0}, "needs scaling.num_workers >= 1"),
        ("checkpoint", {"keep": 1}, "at least 2, so that a damaged one has a predecessor"),
        ("health", {"data_starvation": "rollback"}, "choose off, warn, stop"),
    ],
)
def test_relations_and_choices_are_kept_and_named(section, changes, message):
    config = PretrainConfig(images="i", tokens=["t"], output="o")
    name, value = next(iter(changes.items()))
    with pytest.raises(InputError) as refused:
        dataclasses.replace(getattr(config, section), **changes)
    assert str(refused.value).startswith(f"{section}.{name} = {value!r}: ")
    assert message in str(refused.value)


def test_a_choice_of_the_stage_itself_is_named_without_a_section():
    with pytest.raises(InputError, match=r"^precision = 'bfloat16': choose auto, float32, float16"):
        TokenizeConfig(images="i", tokenizer="t", output="o", precision="bfloat16")


def test_a_framing_is_named_by_the_section_it_stands_in():
    with pytest.raises(ValueError, match=r"^policy\.min_area, policy\.max_area = 0\.9, 0\.8: give"):
        ViewPolicy(min_area=0.9, max_area=0.8)
    with pytest.raises(ValueError, match=r"^views\.flip_probability = 2: give a share"):
        ViewsConfig(flip_probability=2)
    with pytest.raises(InputError, match=r"^views\.jitter = inf: must be at least 0 and below inf"):
        ViewsConfig(jitter=math.inf)
    assert {f.name for f in dataclasses.fields(Framing)} < {
        f.name for f in dataclasses.fields(ViewsConfig)
    }


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    eps: float = 1e-6
    fused: Annotated[bool, Before(False)] = True
    """Declared later: what was begun before did without."""

    def __post_init__(self):
        check(self, "optim.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The version after the one of the records below."""

    output: str
    kind: Literal["beit", "mae"] = "beit"
    sides: tuple[int, int] = (1, 2)
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-3))


def test_a_record_of_an_earlier_version_means_the_defaults_of_then():
    old = {"output": "o", "optim": {"lr": 3e-3}}
    assert changed_fields(old, Stage(output="o", optim=Optim(lr=3e-3, fused=False))) == {}
    assert changed_fields(old, Stage(output="o")) == {"optim.fused": (False, True)}
    other = Stage(output="o", kind="mae", optim=Optim(lr=3e-3, eps=1e-8, fused=False))
    assert changed_fields(old, other) == {"kind": ("beit", "mae"), "optim.eps": (1e-6, 1e-8)}
    assert changed_fields(old, other, ["kind", "optim"]) == {}
    # The stage's default, not the section's.
    assert changed_fields({"output": "o", "optim": {"fused": True}}, Stage(output="o")) == {}


def test_a_record_of_a_later_version_is_refused_by_the_field_that_is_not_known_here():
    new = to_dict(Stage(output="o")) | {"mixup": 0.8}
    ((name, (then, now)),) = changed_fields(new, Stage(output="o")).items()
    assert (name, then, repr(now)) == ("mixup", 0.8, "no field of this version")


@dataclass(frozen=True, kw_only=True)
class NextPolicy(ViewPolicy):
    hue: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NextIdentity(Identity):
    stride: int = 8


def test_a_token_table_outlives_new_fields_of_its_identity(monkeypatch):
    old = Identity(
        image_fingerprint="i",
        num_rows=3,
        tokenizer_fingerprint="t",
        vocab_size=16,
        grid_size=(2, 2),
        image_size=16,
        interpolation="lanczos",
        policy=ViewPolicy(seed=5).to_dict(),
        views=(0, 2),
        device="cpu",
        precision="float32",
        batch_size=4,
    ).to_dict()
    monkeypatch.setattr(token_files, "Identity", NextIdentity)
    monkeypatch.setattr(token_files, "ViewPolicy", NextPolicy)
    identity = NextIdentity.from_dict(old)
    assert identity.stride == 8
    assert NextPolicy.from_dict(identity.policy) == NextPolicy(seed=5)
    assert token_files.completed(old) == identity.to_dict()
