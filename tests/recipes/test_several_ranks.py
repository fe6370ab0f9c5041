"""C6 through the command line: two processes with half the batch each train what one process trains."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.recipes.launching import launch_process

COMMON = (
    *("model=mlp", "model.hidden=[32]", "optimizer.lr=0.05", "trainer.max_epochs=3", "trainer.accelerator=cpu"),
    *(
        "experiment=group_dro_classes",
        "sampler=class_balanced",
        "sampler.num_samples=384",
        "trainer.enable_progress_bar=false",
    ),
)


def trained(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Last weights and the training loss of each epoch."""
    (run,) = [file.parent for file in folder.glob("outputs/*/*/*/metrics.json")]
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    rows = csv.DictReader((run / "history.csv").open())
    return state, [float(row["train/loss"]) for row in rows]


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, options in ((one, ("data.batch_size=64",)), (two, ("data.batch_size=32", "trainer=ddp"))):
        folder.mkdir()
        done = launch_process(folder, *options, *COMMON)
        assert done.code == 0, done.err
    (expected, losses), (state, losses_of_two) = trained(one), trained(two)
    assert losses_of_two == pytest.approx(losses, rel=1e-4)
    for name, x in expected.items():
        torch.testing.assert_close(state[name], x, rtol=1e-3, atol=1e-5)
