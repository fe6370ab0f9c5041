"""A persistent pool of gloo processes on this machine: what several ranks compute, without starting them every time."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, arguments = job
        try:
            pipe.send((True, function(rank, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """``size`` ranks of one process group; :meth:`run` calls a module-level function on each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.mkdtemp()
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, str(Path(self.folder) / "rendezvous"), there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, *arguments)`` on every rank; results in rank order, or the first rank's traceback."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = [self._answer(pipe) for pipe in self.pipes]
        for rank, (ok, result) in enumerate(answers):
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{result}")
        return [result for _, result in answers]

    @staticmethod
    def _answer(pipe: Connection) -> Any:
        if not pipe.poll(60):
            raise TimeoutError("a rank did not answer within a minute: a collective that not all ranks reach?")
        return pipe.recv()

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()
