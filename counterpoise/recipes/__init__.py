"""What is launched: Lightning modules, data, callbacks, reports, and the Hydra configuration in ``conf/``.

Names load on first access, since they need the ``recipes`` extra and losses do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Adversarial": "adversarial",
    "AlignedViews": "aligned_views",
    "BatchAugment": "models",
    "Checkpoints": "callbacks",
    "Clustering": "clustering",
    "ConfigError": "errors",
    "Coreset": "coreset",
    "DeferredReweighting": "callbacks",
    "Fair": "fair",
    "GML": "gml",
    "GradientSurgery": "gradient_surgery",
    "GroupRobust": "group_robust",
    "Heads": "models",
    "History": "callbacks",
    "JustTrainTwice": "just_train_twice",
    "LongTailed": "long_tailed",
    "MLP": "models",
    "MultiLabel": "multi_label",
    "MultiTask": "multi_task",
    "Paired": "paired",
    "RandomStates": "callbacks",
    "Recipe": "module",
    "ResNet32": "models",
    "Result": "run",
    "ProjectionHead": "heads",
    "PredictionHead": "heads",
    "SelfSupervised": "self_supervised",
    "SupervisedContrastive": "supervised_contrastive",
    "TableCorruption": "table_corruption",
    "TransformViews": "views",
    "Views": "views",
    "SemiSegmentation": "semi_segmentation",
    "SmallCNN": "models",
    "SmallUNet": "segmentation_models",
    "classification_metrics": "evaluation",
    "fit": "run",
    "torchvision_model": "models",
    "write_report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and missing.name.startswith("counterpoise"):
            raise
        raise ModuleNotFoundError(
            f"counterpoise.recipes.{name} needs {missing.name}: pip install 'counterpoise[recipes]'", name=missing.name
        ) from missing


def __dir__() -> list[str]:
    return __all__
