"""``examples/own_project``: a user's package and configs beside counterpoise's, launched from inside the project."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from counterpoise.recipes.run_folder import read_metrics
from tests.recipes.launching import QUICK, Outcome, launch, launch_process

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_project"
README = (EXAMPLE / "README.md").read_text()
COMMANDS = re.findall(r"^counterpoise-train (.+)$", README, flags=re.MULTILINE)
OURS = ("data=mine", "model=mine", "loss=mine")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLE, tmp_path / "project", ignore=shutil.ignore_patterns("outputs", "__pycache__")))


def config_of(outcome: Outcome) -> dict[str, Any]:
    """The configuration of the only run, after it went well."""
    assert outcome.code == 0, outcome.err
    (run,) = outcome.runs
    assert read_metrics(run)["status"] == "completed"
    return yaml.safe_load((run / "config.yaml").read_text())


def composed(project: Path, *arguments: str) -> dict[str, Any]:
    """What ``--cfg job`` prints."""
    outcome = launch(project, *arguments, "--cfg", "job")
    assert outcome.code == 0, outcome.err
    assert outcome.runs == []
    return yaml.safe_load(outcome.out)


def test_the_projects_data_model_and_loss_train_from_the_installed_script(project: Path) -> None:
    outcome = launch_process(project, "--config-dir", "conf", *OURS, *QUICK)
    config = config_of(outcome)
    assert config["loss"]["_target_"] == "my_project.loss.OrdinalLoss"
    assert config["model"]["_target_"] == "my_project.model.RingNet"
    metrics = read_metrics(outcome.runs[0])
    assert metrics["class_names"] == ["inner", "middle", "outer"]
    assert metrics["class_counts"][0] == pytest.approx(10 * metrics["class_counts"][2], abs=10)
    assert "report: outputs/long_tailed/" in outcome.out


def test_the_projects_loss_composes_with_a_reweighter_through_its_experiment(project: Path) -> None:
    config = config_of(launch(project, "--config-dir", "conf", "experiment=mine", *QUICK))
    assert config["loss"]["_target_"] == "my_project.loss.OrdinalLoss"
    assert config["reweighter"]["_target_"] == "counterpoise.samplers.GroupDRO"
    assert config["reweighter"]["by"] == "target"


def test_the_projects_primary_config_extends_ours(project: Path) -> None:
    config = config_of(launch(project, "--config-dir", "conf", "--config-name", "my_train", *QUICK))
    assert config["data"]["train"]["_target_"] == "my_project.data.Rings"
    assert config["optimizer"]["lr"] == 0.05
    assert config["scheduler"]["_target_"] == "counterpoise.recipes.schedules.cosine", "what it leaves alone is ours"


@pytest.mark.parametrize(
    "where",
    [("--config-dir", "conf"), ("--config-dir=conf",), ("-cd", "conf"), ("hydra.searchpath=[file://conf]",)],
    ids=["flag", "flag with =", "short flag", "searchpath"],
)
def test_the_projects_file_wins_over_ours_of_the_same_name(project: Path, where: tuple[str, ...]) -> None:
    assert composed(project, *where, "loss=cross_entropy")["loss"]["label_smoothing"] == 0.1


def test_an_absolute_quoted_searchpath_wins_too(project: Path) -> None:
    where = f"hydra.searchpath=['file://{project}/conf']"
    assert composed(project, where, "loss=cross_entropy")["loss"]["label_smoothing"] == 0.1


def test_the_first_of_several_folders_wins(project: Path) -> None:
    other = project / "other" / "loss"
    other.mkdir(parents=True)
    (other / "cross_entropy.yaml").write_text("_target_: counterpoise.losses.CrossEntropyLoss\nlabel_smoothing: 0.3\n")
    paths = "hydra.searchpath=[file://other,file://conf]"
    assert composed(project, paths, "loss=cross_entropy")["loss"]["label_smoothing"] == 0.3
    flag_first = composed(project, "--config-dir", "conf", "hydra.searchpath=[file://other]", "loss=cross_entropy")
    assert flag_first["loss"]["label_smoothing"] == 0.1


def test_a_launch_without_the_folder_finds_our_file_again(project: Path) -> None:
    composed(project, "--config-dir", "conf", "loss=cross_entropy")
    assert composed(project, "loss=cross_entropy")["loss"]["label_smoothing"] == 0.0


def test_the_file_that_wins_is_the_one_that_trains(project: Path) -> None:
    choice = ("data=mine", "model=mine", "loss=cross_entropy")
    assert config_of(launch(project, "--config-dir", "conf", *choice, *QUICK))["loss"]["label_smoothing"] == 0.1


def test_flags_may_stand_between_overrides(project: Path) -> None:
    assert composed(project, "seed=3", "--config-dir", "conf", "loss=mine")["seed"] == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_composes(project: Path, command: str) -> None:
    arguments = [a for a in shlex.split(command) if a not in ("-m", "--cfg", "job")]
    single = [a.partition(",")[0] if a.startswith("loss=") else a for a in arguments]
    assert composed(project, *single)["data"]["train"]["_target_"] == "my_project.data.Rings"


def test_the_readme_names_every_file() -> None:
    files = [p for p in EXAMPLE.rglob("*") if p.suffix in (".py", ".yaml") and p.name != "__init__.py"]
    assert len(COMMANDS) >= 6
    for file in files:
        assert f"`{file.relative_to(EXAMPLE)}`" in README


def test_a_mistake_beside_the_projects_own_loss_is_explained_by_its_parameters(project: Path) -> None:
    outcome = launch(project, "--config-dir", "conf", "loss=mine", "loss.distance_wieght=2")
    assert outcome.code == 2
    assert "did you mean 'distance_weight'?" in outcome.err


def test_a_mistake_under_the_projects_primary_config_is_explained_by_its_options(project: Path) -> None:
    outcome = launch(project, "--config-dir", "conf", "--config-name", "my_train", "data.train.nois=2")
    assert outcome.code == 2
    assert "did you mean 'noise'?" in outcome.err
