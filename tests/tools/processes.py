"""Processes of one torch.distributed group, which run functions of the tests together."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# The server imports these once, without running them, and forks each process from there.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "vlmfast.distributed.gather",
        "vlmfast.distributed.join",
        "vlmfast.distributed.ring",
        "vlmfast.nn",
    ]
)


class Processes:
    """A gloo group of `size` processes that live as long as the `with` block.

    A function that they run is called as `function(group, *arguments)`, and must be importable.
    """

    def __init__(self, size: int, rendezvous: str, timeout: float = 60.0):
        self.size = size
        self._pipes = []
        self._processes = []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            arguments = (rank, size, rendezvous, timeout, theirs)
            process = _context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        ranks: Sequence[int] | None = None,
        lost: Sequence[int] = (),
    ) -> list[Any]:
        """What `function` returns on each of `ranks`, by default all, which form a group.

        An exception on any of them is raised here, with its traceback. `lost` are those that end
        within `function`.
        """
        ranks = tuple(range(self.size) if ranks is None else ranks)
        for pipe in self._pipes:  # a group is made by all processes, members or not
            pipe.send((function, arguments, ranks))
        answers = [
            (True, None) if rank in lost else pipe.recv() for rank, pipe in enumerate(self._pipes)
        ]
        failures = [
            f"rank {rank}:\n{answer}" for rank, (good, answer) in enumerate(answers) if not good
        ]
        assert not failures, "\n".join(failures)
        return [answers[rank][1] for rank in ranks]


def _serve(rank: int, size: int, rendezvous: str, timeout: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    groups = {tuple(range(size)): dist.group.WORLD}
    while True:
        try:
            function, arguments, ranks = pipe.recv()
        except EOFError:
            os._exit(0)
        if ranks not in groups:
            groups[ranks] = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
        try:
            torch.manual_seed(0)
            answer = function(groups[ranks], *arguments) if rank in ranks else None
            pipe.send((True, answer))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
