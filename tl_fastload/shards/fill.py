"""Parts of parameters into the processes that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tl_fastload.ground.compat import item_bytes
from tl_fastload.placement.own_values import as_promise as promise_of
from tl_fastload.recipes.evaluate import Evaluation
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.recipes.slices import Slices, as_promise
from tl_fastload.roads.road import Shared, home_of
from tl_fastload.shards.plan import Choose, ShardPlan, hold_shared, make_plan
from tl_fastload.shards.ranks import Ranks


@dataclass
class Sharding:
    """One new model, of which this process gets its parts.

    While it is filled, the model has stand-ins of the parts' shapes, so that parts are placed as
    whole parameters are.

    Attributes:
        shared: the model.
        places: parameter -> the modules that hold it, and its name in each.
        ranks: the processes.
        plan: who holds what.
        shapes: parameter, or buffer that has a recipe -> its shape.
        dtypes: likewise its dtype.
    """

    shared: Shared
    places: dict[str, list[tuple[nn.Module, str]]]
    ranks: Ranks
    plan: ShardPlan
    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        shared: Shared,
        recipes: dict[str, Promise],
        choose: Choose,
        ranks: Ranks,
    ) -> Sharding:
        """Decide who holds what, the same in all processes; the model is not changed.

        Args:
            model: what is filled; its parameters may be on the meta device if all have recipes.
            shared: what it is to become.
            recipes: parameter or buffer -> recipe; parameters that have none get their own values.
            choose: which dimensions may be cut.
            ranks: the processes.

        Raises:
            LeanLoadError: another process would decide otherwise.
        """
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            recipes.setdefault(name, promise_of(parameter, name))
        buffers = {n: buffer for n, buffer in model.named_buffers() if n in recipes}
        tensors = {**parameters, **buffers}
        made = cls(
            shared,
            {name: [home_of(model, name)] for name in parameters},
            ranks,
            ShardPlan(),
            {name: tensor.shape for name, tensor in tensors.items()},
            {name: tensor.dtype for name, tensor in tensors.items()},
        )
        with ranks.together(lambda: f"{made.plan} {made.shapes} {made.dtypes}"):
            own: Any = {n: recipes[n].reshape(shape) for n, shape in made.shapes.items()}
            made.plan = make_plan(own, choose, ranks.size, buffers)
        return made

    def cut(self, recipes: dict[str, Promise]) -> None:
        """Put stand-ins of the parts into the model, and the parts' recipes in place of those that
        each process evaluates itself.
        """
        slices = Slices()
        for group in self.plan.cut:
            nodes = [
                self.plan.parts[name].of(slices, recipes[name].node, self.ranks.own)
                for name in group
            ]
            for name, node in zip(group, hold_shared(nodes), strict=True):
                recipes[name] = as_promise(node)
        for name in self.places:
            empty = torch.empty(self._own_shape(name), dtype=self.dtypes[name], device="meta")
            self.put(name, empty)

    def exchange(self, recipes: dict[str, Promise]) -> None:
        """Evaluate what is evaluated whole, in several processes at a time, and send it around. Its
        recipes become this process's parts.
        """
        n_ranks, own = self.ranks.size, self.ranks.own
        for first in range(0, len(self.plan.whole), n_ranks):
            turn = self.plan.whole[first : first + n_ranks]
            mine = turn[own] if own < len(turn) else []
            nodes = hold_shared([recipes[name].node for name in mine])
            evaluation = Evaluation(nodes, self.ranks.device)
            for step in range(max(len(group) for group in turn)):
                whole = None
                with self.ranks.together():
                    if step < len(mine):
                        name = mine[step]
                        value = evaluation.value(nodes[step]).tensor
                        whole = value.reshape(self.shapes[name]).to(self.dtypes[name])
                        del value
                for owner, group in enumerate(turn):
                    if step < len(group):
                        name = group[step]
                        part = self._send(name, whole if owner == own else None, owner)
                        recipes[name] = Promise.of(MemorySource(part, name), self.ranks.device)

    def _send(self, name: str, whole: torch.Tensor | None, owner: int) -> torch.Tensor:
        part = self.plan.parts[name]
        shape = self._own_shape(name)
        out = torch.empty(shape, dtype=self.dtypes[name], device=self.ranks.device)
        if part.dim is None:
            if whole is not None:
                out.copy_(whole)
            self.ranks.broadcast(out, owner)
        else:
            self.ranks.scatter(whole, owner, out, part.dim, list(part.sizes))
        return out

    def own_bytes(self) -> int:
        """What this process's parts take."""
        return sum(
            self._own_shape(name).numel() * item_bytes(dtype) for name, dtype in self.dtypes.items()
        )

    def exchanged_bytes(self) -> dict[str, int]:
        """Parameter that one process evaluates for all -> what it takes here: the part, and for the
        largest of them the whole as well.
        """
        found = {}
        for name in (name for group in self.plan.whole for name in group):
            found[name] = self._own_shape(name).numel() * item_bytes(self.dtypes[name])
        largest = max(found, key=lambda name: self.shapes[name].numel(), default=None)
        if largest is not None:
            found[largest] += self.shapes[largest].numel() * item_bytes(self.dtypes[largest])
        return found

    def _own_shape(self, name: str) -> torch.Size:
        return self.plan.parts[name].shape(self.shapes[name], self.ranks.own)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in a parameter's places; it trains if that did."""
        made = nn.Parameter(tensor, requires_grad=self.parameter(name).requires_grad)
        for module, leaf in self.places[name]:
            module._parameters[leaf] = made

    def parameter(self, name: str) -> nn.Parameter:
        """What stands in a parameter's places."""
        module, leaf = self.places[name][0]
        found = module._parameters[leaf]
        assert found is not None
        return found
