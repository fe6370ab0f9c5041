"""Diabetes progression of 442 patients, with sex and age: a small real table on which fairness can be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterpoise._core import check_number
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.cuts import stratified_split
from counterpoise.recipes.data.splits import AsDict, InMemory, Splits

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData


def diabetes(
    *,
    keep_sex: bool = False,
    val_fraction: float = 0.3,
    test_fraction: float = 0.3,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """scikit-learn's diabetes patients: is the disease to progress by more than the median, or not?

    Groups are the two sexes, which the source codes as 1 and 2 and does not name; subgroups the terciles of age in the
    training rows. Inputs (9,) or (10,): age, body mass index, blood pressure and six blood values, standardised on the
    training rows. Splits are stratified by class and sex.

    Args:
        keep_sex: sex is one of the inputs, too. Without it, other columns still tell much of it.
        test_fraction: in (0, 0.5], of all rows; val_fraction: in (0, 0.5], of what the test split leaves.
        seed: draws the splits.

    Source: Efron et al., Least Angle Regression, 2004, section 1.
    """
    from sklearn.datasets import load_diabetes

    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    check_number("test_fraction", test_fraction, 0, 0.5, open_low=True)
    table = load_diabetes(scaled=False)
    values, progression = torch.from_numpy(table.data), torch.from_numpy(table.target)
    names, age, sex = list(table.feature_names), table.feature_names.index("age"), table.feature_names.index("sex")
    targets, groups = (progression > progression.quantile(0.5)).long(), (values[:, sex] == 2).long()
    kept = [i for i in range(len(names)) if keep_sex or i != sex]
    rows = InMemory(values[:, kept], targets, groups)
    pool = AsDict(rows)
    test, rest = stratified_split(2 * targets + groups, test_fraction, seed)
    held, left = stratified_split((2 * targets + groups)[rest], val_fraction, seed)
    train, val = rest[left], rest[held]
    rows.standardize(train)
    edges = values[train, age].quantile(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    place = kept.index(age)
    splits = Splits(
        pool.subset(train),
        pool.subset(val),
        pool.subset(test),
        class_names=["slow", "fast"],
        class_counts=pool.subset(train).class_counts,
        input_shape=(len(kept),),
        group_counts=groups[train].bincount(minlength=2).tolist(),
        facts={
            "group_names": ["sex 1", "sex 2"],
            "subgroup_feature": place,
            "subgroup_edges": _standardized(edges, rows, place),
            "subgroup_names": _age_names(edges),
        },
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _standardized(edges: Tensor, rows: InMemory, place: int) -> list[float]:
    """Edges in the units of the inputs; moved up by a little, so that an age at the edge is below it."""
    return ((edges + 1e-3 - rows.mean[place]) / rows.std[place]).tolist()


def _age_names(edges: Tensor) -> list[str]:
    low, high = (int(edge) for edge in edges.tolist())
    return [f"age to {low}", f"age {low + 1} to {high}", f"age above {high}"]
