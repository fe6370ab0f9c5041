"""``counterpoise-train``: mistakes end with exit code 2 and one line before any training; runs leave their folder.

Launches are in this process, see ``launching``; what only a process of its own can show has one.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from counterpoise.recipes import composition
from counterpoise.recipes.errors import ConfigError
from counterpoise.recipes.run import load_result
from counterpoise.recipes.run_folder import drop_if_empty, new_folder, read_metrics
from counterpoise.recipes.validation import accepts, spell
from tests.recipes.launching import QUICK, Outcome, launch, launch_process

BREAKS = '''
from pathlib import Path

import lightning.pytorch as pl
from torch import nn


class Own(pl.Callback):
    """Knows where it writes."""

    def __init__(self, where):
        self.where = where


class Breaks(nn.Linear):
    """Fails in the third training step as long as a file called "break" is there."""

    steps = 0

    def __init__(self, in_features, num_classes):
        super().__init__(in_features, num_classes)

    def forward(self, x):
        self.steps += self.training
        if self.steps == 3 and Path("break").exists():
            raise RuntimeError("the third step went wrong")
        return super().forward(x.flatten(1))
'''
DATA_BUG = '''
from torch.utils.data import Dataset


class Buggy(Dataset):
    """Has a bug of its own, which is no mistake in the configuration."""

    def __init__(self):
        {}["no such key"]
'''
FILES = {
    "mine.py": BREAKS,
    "buggy.py": DATA_BUG,
    "conf/model/breaks.yaml": "_target_: mine.Breaks\n_partial_: true\n",
    "conf/callbacks/own.yaml": "defaults: [default]\nown: {_target_: mine.Own, where: '${run_dir:}/own'}\n",
    "conf/loss/two_view.yaml": "_target_: counterpoise.contrastive.NTXentLoss\n_partial_: true\n",
    "conf/data/buggy.yaml": (
        "_target_: counterpoise.recipes.data.from_datasets\n"
        "train: {_target_: buggy.Buggy}\ntest: {_target_: buggy.Buggy}\n"
    ),
    "nan.csv": "a,b,y\n" + "".join(f"{i},{'nan' if i == 7 else i % 3},{i % 2}\n" for i in range(40)),
    "one.csv": "a,b,y\n" + "".join(f"{i},{i % 3},1\n" for i in range(40)),
}
BREAKING = ("--config-dir", "conf", "model=breaks", "data.batch_size=96", *QUICK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run of one epoch that went well."""
    outcome = launch(tmp_path_factory.mktemp("finished"), *QUICK)
    assert outcome.code == 0, outcome.err
    return outcome


def refused(outcome: Outcome) -> str:
    """The one line on stderr of a launch that was refused, with nothing trained and nothing left behind."""
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.out == ""
    assert not list(outcome.folder.glob("outputs/*"))
    return outcome.err.strip()


MISTAKES = {
    "unknown option": (["loss=logit_ajusted"], "loss=logit_ajusted is not there.*did you mean 'logit_adjusted'"),
    "unknown option of a nested default": (["experiment=ldam"], "expected one of .*ldam_drw"),
    "unknown group": (["los=cross_entropy"], "los is not a key of the configuration, did you mean 'loss'"),
    "unknown key": (["loss.taw=2"], "loss.taw is not a key of the configuration, did you mean 'tau'"),
    "unknown key of the trainer": (["trainer.max_epoch=2"], "did you mean 'max_epochs'"),
    "a key that no file sets": (["trainer.max_steps=2"], r"to add it, write \+trainer.max_steps"),
    "an added key that the class does not take": (
        ["loss=softmax_focal", "+loss.gama=2"],
        "loss.gama is not a parameter of SoftmaxFocalLoss, did you mean 'gamma'",
    ),
    "an added name": (["+data.name=x"], "data.name is not a parameter of digits_lt"),
    "an added top-level key": (["+sead=2"], "sead is not a key of the configuration, did you mean 'seed'"),
    "wrong type": (["loss.tau=high"], r"loss.tau is 'high' \(str\), expected float"),
    "wrong type where a tensor may stand": (["optimizer.lr=high"], "optimizer.lr is 'high'.*expected float or Tensor"),
    "wrong type of the trainer": (["trainer.max_epochs=1.5"], "trainer.max_epochs is 1.5"),
    "no such literal": (["trainer.precision=17"], "trainer.precision is 17 .*'16-mixed'"),
    "negative seed": (["seed=-1"], "seed is -1, expected an integer >= 0"),
    "missing value": (["data=csv"], "data.path is missing, give it as data.path=..."),
    "missing folder": (["data=image_folder", "data.root=/nowhere"], "root /nowhere does not exist"),
    "missing file": (["data=csv", "data.path=nowhere.csv", "data.label=y"], "nowhere.csv does not exist"),
    "NaN in a table": (
        ["data=csv", "data.path=nan.csv", "data.label=y", "model=mlp"],
        "nan.csv, line 9, column 'b': 'nan' is not a finite number",
    ),
    "one class": (
        ["data=csv", "data.path=one.csv", "data.label=y", "model=mlp"],
        "one class, '1', expected at least 2",
    ),
    "a loss of another recipe": (
        ["--config-dir", "conf", "loss=two_view"],
        "NTXentLoss is a two_view objective, expected one of multiclass, multilabel",
    ),
    "a value the part refuses": (
        ["data.imbalance_factor=0.5"],
        r"data: imbalance_factor is 0.5, expected .*\[1, inf\]",
    ),
    "a value the optimiser refuses": (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
    "a value the scheduler refuses": (["scheduler.warmup=3"], r"scheduler: warmup is 3, expected a number in \[0, 1\]"),
    "a value the trainer refuses": (["trainer.max_epochs=-3"], "trainer: `max_epochs` must be a non-negative integer"),
    "an option that the run sets": (["+trainer.callbacks=[]"], "trainer.callbacks is set by the run itself"),
    "groups that the data lacks": (["reweighter=group_dro"], "reweighter.group_counts is missing.*no groups"),
    "a group taken out that is needed": (["~loss"], "loss has no _target_"),
    "null for an option": (["loss=null"], "a group was given something that is no name.*~group"),
    "a sweep without -m": (["loss=ldam,cross_entropy"], "Ambiguous value.*add -m"),
    "no override at all": (["loss"], "override 'loss' cannot be read, expected key=value"),
    "no such target": (["loss._target_=counterpoise.losses.LDAM"], "counterpoise.losses has no LDAM"),
    "no such module": (["loss._target_=counterpoise.loses.LDAMLoss"], "No module named 'counterpoise.loses'"),
    "broken interpolation": (["seed=${nothing}"], "Interpolation key 'nothing' not found"),
    "unwritable output_dir": (["output_dir=/proc/nowhere"], "output_dir '/proc/nowhere' cannot be written"),
    "no run to go on with": (["resume=nowhere"], "nowhere', which has no config.yaml: expected a run folder, or auto"),
    "no such folder of configs": (["--config-dir", "nowhere"], "nowhere' not found"),
    "no such primary config": (["--config-name", "nowhere"], "Cannot find primary config 'nowhere'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_behind(folder: Path, mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    line = refused(launch(folder, *arguments, *(q for q in QUICK if q.partition("=")[0] not in "".join(arguments))))
    assert re.search(expected, line), line


def test_the_installed_script_tells_it_in_one_line_too(folder: Path) -> None:
    assert "did you mean 'logit_adjusted'" in refused(launch_process(folder, "loss=logit_ajusted"))


def test_a_bug_in_a_users_part_keeps_its_traceback_and_leaves_no_folder(folder: Path) -> None:
    outcome = launch(folder, "--config-dir", "conf", "data=buggy", *QUICK)
    assert outcome.code == 1
    assert 'buggy.py", line' in outcome.err
    assert "KeyError: 'no such key'" in outcome.err
    assert outcome.runs == []


def test_without_its_extra_the_script_names_it(tmp_path: Path) -> None:
    program = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from counterpoise.recipes.cli import train
train()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: counterpoise-train needs lightning")
    assert done.stderr.endswith(": pip install 'counterpoise[recipes]'\n")
    assert done.stderr.count("\n") == 1


# A run that goes well.


def test_the_run_folder_holds_what_it_should(finished: Outcome) -> None:
    (run,) = finished.runs
    assert run.parts[-3] == "long_tailed"
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == {
        "config.yaml",
        "metrics.json",
        "history.csv",
        "predictions.npz",
        "report.html",
        ".lock",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "logs/version_0/metrics.csv",
    }
    assert [p.name for p in finished.folder.iterdir()] == ["outputs"], "Hydra writes nothing of its own"


def test_metrics_json_holds_its_schema(finished: Outcome) -> None:
    metrics = json.loads((finished.runs[0] / "metrics.json").read_text())
    assert list(metrics) == [
        "schema_version",
        "recipe",
        "config_hash",
        "status",
        "error",
        "notes",
        "command",
        "environment",
        "class_names",
        "class_counts",
        "splits",
        "bands",
        "per_class",
        "confusion",
        "cost",
    ]
    assert metrics["schema_version"] == 1
    assert metrics["recipe"] == "long_tailed"
    assert metrics["status"] == "completed"
    assert metrics["error"] is None
    assert set(metrics["splits"]) == {"val", "test"}
    for split in metrics["splits"].values():
        assert {"accuracy", "balanced_accuracy", "macro_f1"} <= set(split)
        assert all(value is None or math.isfinite(value) for value in split.values())
    assert len(metrics["class_counts"]) == len(metrics["class_names"]) == 10
    assert metrics["cost"]["epochs"] == 1
    assert metrics["cost"]["steps"] == math.ceil(sum(metrics["class_counts"]) / 64)
    assert metrics["command"].startswith("counterpoise-train trainer.max_epochs=1")


def test_config_yaml_is_resolved_and_describes_the_run(finished: Outcome) -> None:
    (run,) = finished.runs
    text = (run / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert "${" not in text
    assert "???" not in text
    assert config["logger"]["save_dir"] == str(run)
    assert config["loss"] == {"_target_": "counterpoise.losses.LogitAdjustedLoss", "_partial_": True, "tau": 1.0}


def test_predictions_are_those_of_the_test_split(finished: Outcome) -> None:
    with np.load(finished.runs[0] / "predictions.npz") as predictions:
        assert set(predictions) == {"index", "target", "logits"}
        assert predictions["logits"].shape == (400, 10)
        accuracy = (predictions["logits"].argmax(1) == predictions["target"]).mean()
    assert accuracy == pytest.approx(load_result(finished.runs[0])["accuracy"])


def test_checkpoints_hold_plain_data(finished: Outcome) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        torch.load(finished.runs[0] / "checkpoints" / name, weights_only=True)


def test_the_table_and_the_report_are_told(finished: Outcome) -> None:
    assert "Balanced accuracy" in finished.out
    assert f"report: {finished.runs[0].relative_to(finished.folder)}/report.html" in finished.out


def test_cfg_job_prints_the_configuration_and_runs_nothing(folder: Path) -> None:
    outcome = launch(folder, "loss=ldam", "--cfg", "job")
    assert outcome.code == 0
    assert yaml.safe_load(outcome.out)["loss"]["_target_"] == "counterpoise.losses.LDAMLoss"
    assert not (folder / "outputs").exists()


def test_a_multirun_makes_a_folder_for_each_job(folder: Path) -> None:
    outcome = launch(folder, "-m", "loss=cross_entropy,logit_adjusted", *QUICK)
    assert outcome.code == 0, outcome.err
    losses = [yaml.safe_load((run / "config.yaml").read_text())["loss"]["_target_"] for run in outcome.runs]
    assert losses == ["counterpoise.losses.CrossEntropyLoss", "counterpoise.losses.LogitAdjustedLoss"]
    assert not (folder / "multirun").exists()


def test_a_fast_dev_run_writes_nothing(folder: Path) -> None:
    outcome = launch(folder, "debug=fast_dev_run", *QUICK)
    assert outcome.code == 0, outcome.err
    assert outcome.runs == []


def test_lists_reach_parts_as_lists(folder: Path) -> None:
    weights = "loss.class_weight=[1,2,1,1,1,1,1,1,1,1]"
    assert launch(folder, "loss=cross_entropy", weights, "model=mlp", "model.hidden=[8]", *QUICK).code == 0


# A run that fails, and going on with one.


def failed_run(folder: Path, *arguments: str) -> tuple[Outcome, Path]:
    """A launch that fails in its third step, and its run folder."""
    (folder / "break").touch()
    known = set(folder.glob("outputs/*/*/*"))
    outcome = launch(folder, *BREAKING, *arguments)
    (folder / "break").unlink()
    (run,) = set(outcome.runs) - known
    return outcome, run


def test_a_failure_in_training_keeps_its_traceback_and_marks_the_run(folder: Path) -> None:
    outcome, run = failed_run(folder)
    assert outcome.code == 1
    assert "Traceback (most recent call last)" in outcome.err
    assert 'mine.py", line' in outcome.err
    metrics = read_metrics(run)
    assert metrics["status"] == "failed"
    assert metrics["error"] == "the third step went wrong"
    assert "the third step went wrong" in (run / "report.html").read_text()


def test_resume_auto_goes_on_with_the_newest_unfinished_run_of_the_same_configuration(folder: Path) -> None:
    older, newer = failed_run(folder)[1], failed_run(folder)[1]
    again = (*BREAKING, "resume=auto")
    other = launch(folder, *again, "seed=5")
    assert other.code == 0, other.err
    assert [read_metrics(run)["status"] for run in (older, newer)] == ["failed", "failed"], "another configuration's"
    for expected in (newer, older):
        outcome = launch(folder, *again)
        assert outcome.code == 0, outcome.err
        assert f"report: {expected.relative_to(folder)}/report.html" in outcome.out
        assert read_metrics(expected)["status"] == "completed"
    assert len(launch(folder, *again).runs) == 4, "nothing is unfinished, so a new run starts"


def test_resume_auto_finds_a_run_whose_parts_know_their_folder(folder: Path) -> None:
    run = failed_run(folder, "callbacks=own")[1]
    assert yaml.safe_load((run / "config.yaml").read_text())["callbacks"]["own"]["where"] == f"{run}/own"
    assert launch(folder, *BREAKING, "callbacks=own", "resume=auto").runs == [run]


def test_resume_goes_on_in_the_folder_it_is_given(folder: Path) -> None:
    run = failed_run(folder)[1]
    outcome = launch(folder, *BREAKING, f"resume={run.relative_to(folder)}")
    assert outcome.code == 0, outcome.err
    assert outcome.runs == [run]


def test_a_finished_run_goes_on_for_more_epochs(folder: Path) -> None:
    first = launch(folder, *QUICK)
    longer = ("trainer.max_epochs=2", *QUICK[1:])
    outcome = launch(folder, *longer, f"resume={first.runs[0]}")
    assert outcome.code == 0, outcome.err
    assert outcome.runs == first.runs
    assert (first.runs[0] / "history.csv").read_text().count("\n") == 3
    assert read_metrics(first.runs[0])["cost"]["epochs"] == 2


def refused_to_go_on(finished: Outcome, *arguments: str) -> str:
    before = {p: p.read_bytes() for p in finished.runs[0].rglob("*") if p.is_file()}
    outcome = launch(finished.folder, *QUICK, *arguments, f"resume={finished.runs[0]}")
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in finished.runs[0].rglob("*") if p.is_file()}, "it is left as it was"
    assert len(outcome.runs) == 1
    return outcome.err


def test_resume_refuses_a_run_of_another_loss(finished: Outcome) -> None:
    assert "resume: loss differs from that of the run in" in refused_to_go_on(finished, "loss=cross_entropy")


def test_resume_refuses_a_damaged_checkpoint(finished: Outcome) -> None:
    checkpoint = finished.runs[0] / "checkpoints" / "last.ckpt"
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        checkpoint.write_bytes(damaged)
        message = refused_to_go_on(finished)
        assert "last.ckpt' cannot be read" in message
        assert "delete it to start the run anew" in message
    checkpoint.write_bytes(whole)


# The pieces behind it.


def test_flags_go_behind_overrides_with_their_values() -> None:
    given = ["a=1", "--config-dir", "conf", "-m", "b=2", "--config-name=x", "c=3"]
    assert composition.overrides_first(given) == ["a=1", "b=2", "c=3", "--config-dir", "conf", "-m", "--config-name=x"]
    assert composition.overrides_first(["~loss", "--cfg", "job", "+a.b=1"]) == ["~loss", "+a.b=1", "--cfg", "job"]
    assert composition.overrides_first([]) == []


def test_an_empty_run_folder_goes_with_its_empty_parents_but_not_with_others(tmp_path: Path) -> None:
    first, second = new_folder(tmp_path, "long_tailed"), new_folder(tmp_path, "long_tailed")
    (second / "metrics.json").write_text("{}")
    drop_if_empty(first)
    assert not first.exists()
    drop_if_empty(second)
    assert second.exists()
    (second / "metrics.json").unlink()
    drop_if_empty(second)
    assert list(tmp_path.iterdir()) == []


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    assert len({new_folder(tmp_path, "long_tailed") for _ in range(5)}) == 5


def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir .* cannot be written: Not a directory"):
        new_folder(tmp_path / "file", "long_tailed")


ACCEPTED = [
    (float, 1),
    (float | None, None),
    (int | str, "auto"),
    (list[int], [1, 2]),
    (Sequence[float], []),
    (Path, "folder"),
    (Literal["a", "b"], "b"),
    (float | Tensor, [1.0]),
    (float, {"_target_": "math.sqrt"}),
    (nn.Module, "what cannot be judged"),
    (Any, None),
]
NOT_ACCEPTED = [
    (float, "1"),
    (float, True),
    (int, 1.0),
    (bool, 1),
    (float, None),
    (list[int], "12"),
    (Literal["a", "b"], "c"),
    (float | Tensor, "high"),
    (int | None, {"a": 1}),
]


@pytest.mark.parametrize(("annotation", "value"), ACCEPTED, ids=str)
def test_a_value_that_an_annotation_allows(annotation: Any, value: Any) -> None:
    assert accepts(annotation, value)


@pytest.mark.parametrize(("annotation", "value"), NOT_ACCEPTED, ids=str)
def test_a_value_that_an_annotation_forbids(annotation: Any, value: Any) -> None:
    assert not accepts(annotation, value)


def test_annotations_are_spelled_for_people() -> None:
    assert spell(float | None) == "float or null"
    assert spell(Literal["a", "b"] | int) == "'a' or 'b' or int"
