"""The data of the recipes: every factory gives a :class:`LabelledData`, whose ``splits`` are dict data sets.

Built-in sets (``digits_lt``, ``fashion_mnist_lt``, ``coloured_digits``, ...) and a user's own (``image_folder``,
``csv_table``, ``from_datasets``) go one way: test and validation are cut first, and only what is left to train on
becomes long-tailed. ``LongTailedSubset`` does the last step for any labelled data set.
"""

from counterpoise.recipes.data.canvas import digits_canvas, fashion_canvas
from counterpoise.recipes.data.cifar import cifar10_lt, cifar100_lt
from counterpoise.recipes.data.coloured import coloured_digits, coloured_fashion_mnist
from counterpoise.recipes.data.csv import csv_table
from counterpoise.recipes.data.cuts import balanced_split, stratified_split, validation_split
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.data.diabetes import diabetes
from counterpoise.recipes.data.digits import digits_lt
from counterpoise.recipes.data.embeddings import embeddings_npz
from counterpoise.recipes.data.fashion_mnist import fashion_mnist_lt, load_fashion_mnist
from counterpoise.recipes.data.image_folders import image_folder
from counterpoise.recipes.data.long_tail import (
    LongTail,
    LongTailedSubset,
    class_order,
    long_tail_counts,
    long_tail_indices,
)
from counterpoise.recipes.data.mask_folders import mask_folder
from counterpoise.recipes.data.multi_label_csv import multi_label_csv
from counterpoise.recipes.data.multi_task_csv import multi_task_csv
from counterpoise.recipes.data.own import from_datasets
from counterpoise.recipes.data.paired import digits_attributes, fashion_attributes
from counterpoise.recipes.data.paired_csv import paired_csv
from counterpoise.recipes.data.rotated import rotated_digits, rotated_fashion_mnist
from counterpoise.recipes.data.scenes import digits_scenes, fashion_scenes
from counterpoise.recipes.data.splits import AsDict, Examples, InMemory, Splits, groups_of, targets_of
from counterpoise.recipes.data.task_splits import splits_of_tasks

__all__ = [
    "AsDict",
    "Examples",
    "InMemory",
    "LabelledData",
    "LongTail",
    "LongTailedSubset",
    "Splits",
    "balanced_split",
    "cifar10_lt",
    "cifar100_lt",
    "class_order",
    "coloured_digits",
    "coloured_fashion_mnist",
    "csv_table",
    "diabetes",
    "digits_attributes",
    "digits_canvas",
    "digits_lt",
    "digits_scenes",
    "embeddings_npz",
    "fashion_attributes",
    "fashion_canvas",
    "fashion_mnist_lt",
    "fashion_scenes",
    "from_datasets",
    "groups_of",
    "image_folder",
    "load_fashion_mnist",
    "long_tail_counts",
    "long_tail_indices",
    "mask_folder",
    "multi_label_csv",
    "multi_task_csv",
    "paired_csv",
    "rotated_digits",
    "rotated_fashion_mnist",
    "splits_of_tasks",
    "stratified_split",
    "targets_of",
    "validation_split",
]
