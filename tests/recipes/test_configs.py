"""Every YAML file of ``recipes/conf``: it composes, passes the checks, builds, and repeats no default wrongly."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_module
from PIL import Image

import counterpoise.losses
import counterpoise.recipes
import counterpoise.samplers
from counterpoise.recipes.build import Parts, build
from counterpoise.recipes.composition import settle
from counterpoise.recipes.long_tailed import LongTailed
from counterpoise.recipes.validation import GROUPS, HYDRA_WORDS, locate, parameters
from tests.recipes.launching import as_if_alone

CONF = Path(counterpoise.recipes.__file__).parent / "conf"
FILES = sorted(str(file.relative_to(CONF).with_suffix("")) for file in CONF.rglob("*.yaml"))
OPTIONS = [name for name in FILES if "/" in name]
MANDATORY = {
    "data/csv": ["data.path=table.csv", "data.label=y"],
    "data/embeddings_npz": ["data.path=embeddings.npz"],
    "data/image_folder": ["data.root=images"],
    "data/mask_folder": ["data.root=scans"],
    "data/multi_label_csv": ["data.path=table.csv", "data.labels=y"],
    "data/multi_task_csv": ["data.path=table.csv", "data.classifications=[y]"],
    "data/paired_csv": ["data.path=pairs.csv", "data.image=file"],
    "loss/static_weighting": ["loss.task_weights=[1.0,0.001,100.0]"],
    "sampler/coreset": ["sampler.indices=indices.npy"],
    "sampler/score": ["sampler.scores=scores.npy"],
}
NEEDS_OTHERS = {
    "data/embeddings_npz": ["model=mlp"],
    "data/digits_canvas": ["recipe=multi_label"],
    "data/digits_scenes": ["recipe=semi_segmentation"],
    "data/mask_folder": ["recipe=semi_segmentation"],
    "data/multi_label_csv": ["recipe=multi_label"],
    "data/multi_task_csv": ["recipe=multi_task", "model=mlp"],
    "data/digits_attributes": ["recipe=paired"],
    "data/paired_csv": ["recipe=paired"],
    "data/rotated_digits": ["recipe=multi_task"],
    "loss/equal_weighting": ["recipe=multi_task"],
    "loss/static_weighting": ["recipe=multi_task"],
    "loss/uncertainty_weighting": ["recipe=multi_task"],
    "model/small_unet": ["recipe=semi_segmentation"],
    "loss/gml": ["recipe=gml"],
    "loss/barlow_twins": ["recipe=self_supervised"],
    "loss/ntxent": ["recipe=self_supervised"],
    "loss/supcon": ["recipe=supervised_contrastive"],
    **{f"loss/{name}": ["recipe=paired"] for name in ("clip", "convirt", "image_tabular_clip", "siglip")},
    **{
        f"loss/{name}": ["recipe=self_supervised"]
        for name in ("ascl", "ascl_byol", "byol", "cacr", "cw_rgp", "simsiam", "swav", "vicreg", "wmse")
    },
    "model/torchvision": ["data=image_folder", "data.root=images"],
    "reweighter/broad": ["reweighter.by=target"],
    "reweighter/group_dro": ["reweighter.by=target"],
    "sampler/coreset": ["loss=cross_entropy"],
    "sampler/score": ["loss=cross_entropy"],
}
NOT_BUILT = {
    **dict.fromkeys(
        [
            "data/cifar10_lt",
            "data/cifar100_lt",
            "data/fashion_mnist_lt",
            "data/coloured_fashion_mnist",
            "data/fashion_attributes",
            "data/fashion_canvas",
            "data/fashion_scenes",
            "data/rotated_fashion_mnist",
        ],
        "needs files that are downloaded",
    ),
    **dict.fromkeys(["logger/mlflow", "logger/wandb", "recipe/gradient_surgery"], "needs an extra of its own"),
}

PAPER = "the papers' protocol"
WORKERS = "images are decoded or augmented beside the training"
SMALL = "a small set: more steps an epoch"
IN_RUN_FOLDER = "inside the run folder"
FROM_LOSS = "auto is read by build: cosine where the loss needs it"
OF_RECIPE = "the recipe's own, where it names one"
ONE_HOT = "one-hot targets: the mean over classes would shrink with their number"
DIFFERENT = {
    ("callbacks/default", "monitor"): OF_RECIPE,
    ("callbacks/early_stopping", "mode"): "the monitored value is an accuracy",
    ("callbacks/early_stopping", "patience"): "balanced accuracy on few examples a class is noisy",
    ("data/cifar100_lt", "num_workers"): WORKERS,
    ("data/cifar10_lt", "num_workers"): WORKERS,
    ("data/coloured_digits", "batch_size"): SMALL,
    ("data/csv", "batch_size"): SMALL,
    ("data/diabetes", "batch_size"): SMALL,
    ("data/digits_canvas", "batch_size"): SMALL,
    ("data/digits_lt", "batch_size"): SMALL,
    ("data/image_folder", "batch_size"): SMALL,
    ("data/image_folder", "num_workers"): WORKERS,
    ("data/multi_label_csv", "batch_size"): SMALL,
    ("data/multi_task_csv", "batch_size"): SMALL,
    ("data/rotated_digits", "batch_size"): SMALL,
    **dict.fromkeys([("data/digits_attributes", "batch_size"), ("data/paired_csv", "batch_size")], SMALL),
    ("logger/csv", "name"): IN_RUN_FOLDER,
    ("logger/mlflow", "experiment_name"): "runs of a recipe belong together",
    ("logger/mlflow", "tracking_uri"): IN_RUN_FOLDER,
    ("logger/tensorboard", "name"): IN_RUN_FOLDER,
    ("logger/wandb", "project"): "wandb asks for one",
    ("logger/wandb", "save_dir"): IN_RUN_FOLDER,
    ("loss/cw_rgp", "block_size"): "fewer examples than a group of the recipe's embeddings has channels",
    ("loss/cw_rgp", "groups"): "embeddings of 64 as the recipe has them, not of 512",
    ("loss/swav", "num_prototypes"): "ten a class of the data at hand",
    ("loss/binary_cross_entropy", "inner"): "one scale with the other multi-label losses",
    ("loss/asymmetric", "inner"): ONE_HOT,
    ("loss/ldam", "normalizer"): "the released code: with class weights the mean divides by their sum",
    ("loss/sigmoid_focal", "inner"): ONE_HOT,
    ("loss/sigmoid_focal_star", "inner"): ONE_HOT,
    ("model/mlp", "head"): FROM_LOSS,
    ("model/resnet32", "head"): FROM_LOSS,
    ("model/small_cnn", "head"): FROM_LOSS,
    ("model/torchvision", "head"): FROM_LOSS,
    ("optimizer/sgd", "lr"): PAPER,
    ("optimizer/sgd", "momentum"): PAPER,
    ("optimizer/sgd", "weight_decay"): PAPER,
    ("recipe/self_supervised", "views"): "what None makes, spelled out so that it can be changed",
    ("recipe/clustering", "views"): "what None makes, spelled out so that it can be changed",
    **dict.fromkeys(
        [("recipe/clustering", key) for key in ("crop", "rotation", "contrast", "brightness", "noise")],
        "mild: a cluster is what its views have in common",
    ),
    ("recipe/semi_segmentation", "views"): "what None makes, spelled out so that it can be changed",
    **dict.fromkeys([("recipe/gml", key) for key in ("augment", "contrast_augment", "seed")], "two views that differ"),
    **dict.fromkeys([("model/features", key) for key in ("hidden", "head")], "no layer of its own"),
    ("recipe/gml", "shift"): "small images",
    **dict.fromkeys(
        [("recipe/paired", key) for key in ("views", "num_views", "crop", "contrast", "brightness", "noise")],
        "what a table says of an image, its view leaves alone",
    ),
    ("scheduler/cosine", "warmup"): "5 % of the steps, so that a first large step cannot diverge",
    ("scheduler/multistep", "factor"): PAPER,
    ("scheduler/multistep", "warmup"): PAPER,
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working folder with a table of three classes, images of two, masks, scores and indices of examples in it."""
    np.save(tmp_path / "scores.npy", np.linspace(0.1, 1.0, 50))
    np.save(tmp_path / "indices.npy", np.arange(0, 50, 2))
    embeddings = np.random.default_rng(0).normal(size=(90, 4))
    np.savez(tmp_path / "embeddings.npz", features=embeddings, targets=np.arange(90) % 3)
    rows = [f"{i % 7},{i % 5},{i % 3}" for i in range(90)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,y", *rows]))
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "images" / label / f"{i}.png")
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / "scans" / kind).mkdir(parents=True)
        for i in range(6):
            pixels = np.tile(np.arange(8, dtype=np.uint8) // 4, (8, 1))
            Image.fromarray(pixels).convert(mode).save(tmp_path / "scans" / kind / f"{i}.png")
    pairs = [f"images/{label}/{i}.png,{i},{label}" for label in ("cat", "dog") for i in range(6)]
    (tmp_path / "pairs.csv").write_text("\n".join(["file,number,word", *pairs]))
    with as_if_alone(tmp_path, ["counterpoise-train"]):
        yield tmp_path


def overrides_for(name: str) -> list[str]:
    """What chooses the option ``name`` of a group, and what it cannot do without."""
    group, _, option = name.rpartition("/")
    chosen = [f"{group}={option}"] if group else []
    return [*chosen, *MANDATORY.get(name, []), *NEEDS_OTHERS.get(name, [])]


def settled(name: str) -> dict[str, Any]:
    """The checked configuration that ``counterpoise-train`` would launch."""
    with initialize_config_module("counterpoise.recipes.conf", version_base="1.3"):
        return settle(compose("train", overrides=overrides_for(name)))[0]


def nodes(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping with a ``_target_`` in a YAML file."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node
        for inner in node.values():
            yield from nodes(inner)


def targets(name: str) -> list[Mapping[str, Any]]:
    return list(nodes(yaml.safe_load((CONF / f"{name}.yaml").read_text())))


def differing(name: str) -> Iterator[str]:
    """The keys of a file whose value is not the default of the parameter they set."""
    for node in targets(name):
        known = parameters(locate(name, node["_target_"]))
        for key in node.keys() - set(HYDRA_WORDS):
            default = known[key].default if key in known else inspect.Parameter.empty
            default = list(default) if isinstance(default, tuple) else default
            if default is not inspect.Parameter.empty and default != node[key]:
                yield key


@pytest.mark.parametrize("name", FILES)
def test_it_composes_and_passes_the_checks(name: str, folder: Path) -> None:
    config = settled(name)
    group = name.partition("/")[0]
    if group in GROUPS and targets(name):
        assert targets(name)[0]["_target_"] in yaml.safe_dump(config[group])


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(NOT_BUILT)))
def test_it_builds(name: str, folder: Path) -> None:
    assert isinstance(build(settled(name), folder), Parts)


@pytest.mark.parametrize("name", FILES)
def test_its_targets_exist(name: str) -> None:
    for node in targets(name):
        assert callable(locate(name, node["_target_"]))


@pytest.mark.parametrize("name", FILES)
def test_its_defaults_are_those_of_the_signature_or_differ_for_a_reason(name: str) -> None:
    assert {(name, key) for key in differing(name)} == {pair for pair in DIFFERENT if pair[0] == name}


def test_each_reason_is_given() -> None:
    assert all(DIFFERENT.values())
    assert {name for name, _ in DIFFERENT} <= set(FILES)


def test_our_parts_that_lack_facts_are_partial() -> None:
    """A file that leaves out a parameter without a default must be completed, so it says ``_partial_``."""
    for name in FILES:
        for node in targets(name):
            known = parameters(locate(name, node["_target_"])).values()
            required = {
                p.name for p in known if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            }
            assert node.get("_partial_") or required <= node.keys(), name


def public_parts() -> list[type]:
    """Losses, reweighters and samplers with a Spec that the long-tailed recipe takes."""
    rooms = (counterpoise.losses, counterpoise.samplers)
    exports = itertools.chain.from_iterable([getattr(room, name) for name in room.__all__] for room in rooms)
    found = [part for part in exports if inspect.isclass(part) and hasattr(part, "spec")]
    return [part for part in found if part.spec.task in (*LongTailed.tasks, "reweighter", "sampler")]


@pytest.mark.parametrize("part", public_parts(), ids=lambda part: part.__name__)
def test_every_public_part_that_fits_can_be_chosen_by_name(part: type) -> None:
    group = {"reweighter": "reweighter", "sampler": "sampler"}.get(part.spec.task, "loss")  # type: ignore[attr-defined]
    named = [
        locate(name, node["_target_"]) for name in OPTIONS if name.startswith(f"{group}/") for node in targets(name)
    ]
    assert part in named
