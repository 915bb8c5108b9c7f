"""The processes that share a model: what they agree on, and what they send to one another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tl_fastload.errors import LeanLoadError


class Ranks:
    """The processes of a one-dimensional mesh.

    Args:
        mesh: a `torch.distributed.device_mesh.DeviceMesh`.

    Attributes:
        size: how many there are.
        own: number of this one among them.
        device: where its part lies.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.size = int(mesh.size())
        self.own = int(mesh.get_local_rank())
        self._group = mesh.get_group()
        kind = mesh.device_type
        self.device = torch.device(kind)
        if kind != "cpu":
            self.device = torch.device(kind, getattr(torch, kind).current_device())

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Give every process the values of one of them, in place."""
        source = dist.get_global_rank(self._group, owner)
        dist.broadcast(tensor, source, group=self._group)

    def scatter(
        self, whole: torch.Tensor | None, owner: int, out: torch.Tensor, dim: int, sizes: list[int]
    ) -> None:
        """Give every process its part of a tensor that one of them has.

        Args:
            whole: the tensor; None in all processes but the owner.
            owner: number of that process.
            out: contiguous memory for the part.
            dim: which dimension is cut.
            sizes: how long each process's part is.
        """
        for number, size in enumerate(sizes):
            part = None if whole is None else whole.narrow(dim, sum(sizes[:number]), size)
            if number == owner and part is not None:
                out.copy_(part)
            elif part is not None and size:
                target = dist.get_global_rank(self._group, number)
                dist.send(part.contiguous(), target, group=self._group)
            elif number == self.own != owner and size:
                dist.recv(out, dist.get_global_rank(self._group, owner), group=self._group)

    @contextmanager
    def together(self, plan: Callable[[], str] = str) -> Iterator[None]:
        """What all processes do or none: where it fails in one, it fails in all.

        Args:
            plan: what they have to have in common after it, in words.

        Raises:
            LeanLoadError: another process failed, or has another plan.
        """
        try:
            yield
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}", "")
            raise
        self._agree(plan())

    def _agree(self, plan: str) -> None:
        told = self._tell("", hashlib.sha256(plan.encode()).hexdigest())
        failed = [(number, error) for number, (error, _) in enumerate(told) if error]
        if failed:
            number, error = failed[0]
            raise LeanLoadError(
                f"Process {number} of {self.size} could not load its part, so nothing was loaded "
                f"in any. It said: {error}"
            )
        others = [number for number, (_, other) in enumerate(told) if other != told[0][1]]
        if others:
            raise LeanLoadError(
                f"Processes 0 and {others[0]} of {self.size} found other weights, or were called "
                "with other arguments, so nothing was loaded in any. Call from_pretrained_lean "
                "alike in all of them, and see that they reach the same files (revision=)."
            )

    def _tell(self, error: str, plan: str) -> list[tuple[str, str]]:
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, (error, plan), group=self._group)
        return told
