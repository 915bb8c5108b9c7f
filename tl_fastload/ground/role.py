"""What a parameter is to its model, said without names.

Each road has a function `role(name) -> Role` for the names that its models have
(`tl_fastload.hooked.names`); whatever else needs to know is given that function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Part = Literal["embedding", "attention", "MLP", "norms", "other"]
Kind = Literal["matrix", "bias", "norm", "table", "other"]

ATTENTION_NORM, MLP_NORM = "attention norm", "MLP norm"
"""`what` of the norms whose output a block's matrices read."""


@dataclass(frozen=True)
class Role:
    """What one parameter or buffer is.

    Attributes:
        part: of the model. "embedding" is all that turns tokens into vectors and back, "norms" are
            those between the parts, "other" is what nobody knows.
        kind: "matrix" (weights that no default can stand for), "bias", "norm" (its weight or
            bias), "table" (computed from the configuration), or "other".
        what: in words, such as "query", "router" or "final norm"; a bias has its matrix's.
        sides: what each dimension runs over, such as ("d_model", "d_mlp").
        inputs: those of the sides that a matrix multiplies away.
        reads: `what` of the norm whose output a matrix multiplies; "" where it reads no norm's.
        is_bias: of a matrix or of a norm.
        is_folded: a norm that `fold_ln` folds into the matrices that read it.
        is_last: behind the last block.
        layer: number of its block, from 0; None outside of the blocks.
    """

    part: Part = "other"
    kind: Kind = "other"
    what: str = ""
    sides: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    reads: str = ""
    is_bias: bool = False
    is_folded: bool = False
    is_last: bool = False
    layer: int | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions of a matrix in the order [out, in]."""
        outputs = [dim for dim, side in enumerate(self.sides) if side not in self.inputs]
        return (*outputs, *(dim for dim, side in enumerate(self.sides) if side in self.inputs))

    @property
    def n_outputs(self) -> int:
        """How many of the dimensions are outputs: those that `order` begins with."""
        return len(self.sides) - len(self.inputs)

    @property
    def is_projection(self) -> bool:
        """Whether it is a matrix of a linear map inside a block, such as quantization is for."""
        return self.kind == "matrix" and self.part != "embedding" and "expert" not in self.sides

    @property
    def writes(self) -> int | None:
        """The dimension along the residual stream of a matrix or a bias that adds to it; None if
        it does not.
        """
        if self.kind not in ("matrix", "bias") or "d_model" in self.inputs:
            return None
        return self.dim("d_model")

    @property
    def default(self) -> float:
        """What stands for weights that a model does not have: one for a norm's, else zero."""
        return 1.0 if self.kind == "norm" and not self.is_bias else 0.0

    def dim(self, side: str) -> int | None:
        """Which dimension runs over a side; None if there is no such dimension."""
        return self.sides.index(side) if side in self.sides else None


RoleOf = Callable[[str], Role]
"""From the name of a parameter or buffer to what it is."""


def by_place(names: Iterable[str], role: RoleOf) -> dict[tuple[int | None, str, bool], str]:
    """(layer, what, whether it is a bias) -> the name of that parameter; for weights and biases
    that there is one of in a layer.
    """
    roles = {name: role(name) for name in names}
    return {(found.layer, found.what, found.is_bias): name for name, found in roles.items()}
