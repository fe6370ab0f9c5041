"""Memory of large gradients is used again, never while somebody holds it, and goes back to the system when asked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise import kernels
from counterpoise.kernels._library import LARGE, gradient_like
from counterpoise.losses import CrossEntropyLoss, SigmoidFocalLoss
from tests.kernels.compare import compiled

pytestmark = compiled
CLASSES = 1000
ROWS = -(-LARGE // CLASSES)


def gradient(rows: int = ROWS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, CLASSES, generator=generator, requires_grad=True)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    return torch.autograd.grad(CrossEntropyLoss()(z, y), z)[0]


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    kernels.empty_cache()


def test_the_next_step_writes_where_the_last_one_did() -> None:
    first = gradient().data_ptr()
    assert gradient().data_ptr() == first
    assert gradient(ROWS // 2 + 300).data_ptr() == first  # a last batch that is smaller, but not by half


def test_what_is_held_is_left_alone() -> None:
    held = gradient(seed=1)
    copy = held.clone()
    view = gradient(seed=2)[3:5]
    seen = view.clone()
    assert gradient(seed=3).data_ptr() not in (held.data_ptr(), view.data_ptr() - 3 * CLASSES * 4)
    assert_close(held, copy, rtol=0, atol=0)
    assert_close(view, seen, rtol=0, atol=0)


def test_accumulated_gradients_are_held() -> None:
    z = torch.randn(ROWS, CLASSES, requires_grad=True)
    t = (torch.rand(ROWS, CLASSES) < 0.5).float()
    SigmoidFocalLoss()(z, t).backward()
    assert z.grad is not None
    once = z.grad.clone()
    SigmoidFocalLoss()(z, t).backward()
    assert_close(z.grad, 2 * once)


def test_a_small_gradient_is_an_ordinary_tensor() -> None:
    assert gradient_like(torch.ones(LARGE - 1)).untyped_storage().resizable()
    assert not gradient_like(torch.ones(LARGE)).untyped_storage().resizable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_type_are_those_of_the_logits(dtype: torch.dtype) -> None:
    x = torch.ones(LARGE // 4, 2, 2, dtype=dtype)
    made = gradient_like(x)
    assert (made.shape, made.dtype, made.stride(), made.is_cpu) == (x.shape, dtype, x.stride(), True)


def test_threads_do_not_share_a_block() -> None:
    """Each thread takes, fills and gives back on its own; a block that two had would hold the other's number."""
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            block = gradient_like(torch.empty(LARGE)).fill_(number)
            if not bool((block == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


RESIDENT = """
import os, torch
from counterpoise import kernels
from counterpoise.kernels._library import gradient_like
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
x = torch.empty(1).expand(64 * 2**18)
gradient_like(x.new_empty(64 * 2**18)).fill_(1)
before = resident()
kernels.empty_cache()
print(before - resident())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(("limit", "kept"), [("512", True), ("32", False), ("0", False)])
def test_what_is_kept_has_a_limit_and_is_given_back(limit: str, kept: bool) -> None:
    """64 MiB of float32: kept unless the limit is below that, and then returned by empty_cache()."""
    env = os.environ | {"COUNTERPOISE_CACHE_MIB": limit}
    done = subprocess.run([sys.executable, "-c", RESIDENT], env=env, capture_output=True, text=True, check=True)
    assert (float(done.stdout) > 60) is kept
