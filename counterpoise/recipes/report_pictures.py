"""Small images of a report: kept in metrics.json as text, drawn side by side into one inline SVG."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

PALETTE = (  # of pixel classes; the first is background
    *("#1b2530", "#2b6cb0", "#e08a2e", "#2f9c95", "#c2562b", "#8e6bbf"),
    *("#c9b458", "#6aa84f", "#d06c9e", "#7f8c99", "#8fd3f4"),
)


def encoded(image: Tensor) -> str:
    """An image (1 or 3, H, W), scaled from its smallest to its largest value, as a PNG in base64."""
    x = image.detach().cpu().float()
    low, high = float(x.min()), float(x.max())
    pixels = ((x - low) / max(high - low, 1e-12) * 255).round().to(torch.uint8)
    return _png(pixels[0].numpy() if len(pixels) == 1 else pixels[:3].permute(1, 2, 0).numpy())


def encoded_classes(classes: Tensor) -> str:
    """A map of pixel classes (H, W), each in a colour of its own, as a PNG in base64."""
    colors = np.array([[round(255 * part) for part in to_rgb(color)] for color in PALETTE], dtype=np.uint8)
    return _png(colors[classes.cpu().numpy() % len(PALETTE)])


def decoded(text: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image.convert("RGB"))


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


__all__ = ["PALETTE", "decoded", "encoded", "encoded_classes"]
