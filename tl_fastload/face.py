"""What the public classes of all roads share: a call made of its arguments, a load and a plan of
it, and the methods that every lean model has.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from tl_fastload.copies.write import MAX_SHARD_BYTES, save_lean
from tl_fastload.errors import NotEnoughMemory
from tl_fastload.ground.boundary import guarded
from tl_fastload.loading.relayout import put_in_layout
from tl_fastload.loading.resolve import resolved
from tl_fastload.loading.through_cache import load_through_cache
from tl_fastload.planning import make
from tl_fastload.planning.plan import LoadPlan
from tl_fastload.quantized.formats import read_quantization
from tl_fastload.quantized.spec import quantization_argument
from tl_fastload.report.progress import ProgressOption
from tl_fastload.request.adapters import read_adapter_argument
from tl_fastload.request.argument_types import checked, checked_keywords
from tl_fastload.request.keywords import sort_keywords
from tl_fastload.request.options import OWN_ARGUMENTS, Options
from tl_fastload.roads.road import Request, Road


def request_of(
    cls: type, road: Road, from_pretrained_kwargs: dict[str, Any], **arguments: Any
) -> Request:
    """The arguments of `from_pretrained_lean`, sorted by who takes them.

    Args:
        cls: the model class.
        road: its road.
        from_pretrained_kwargs: for Hugging Face.
        **arguments: all others.

    Raises:
        ArgumentError: one of a kind that it cannot be.
    """
    keywords = checked_keywords(from_pretrained_kwargs)
    arguments = checked(**arguments)
    own = {name: arguments.pop(name) for name in OWN_ARGUMENTS}
    own["quantize"] = read_quantization(quantization_argument(own["quantize"], keywords))
    own["adapter"] = read_adapter_argument(own["adapter"])
    if "torch_dtype" in keywords:
        arguments["torch_dtype"] = keywords.pop("torch_dtype")
    return Request(cls, road, Options(**own), arguments, sort_keywords(keywords))


def loaded(request: Request) -> Any:
    """The model of a call; it finds what its name means.

    Raises:
        LeanLoadError: anything that is wrong; NotEnoughMemory says what would fit.
    """
    request = resolved(request)
    if request.options.check_memory and request.options.dequantize:
        make.require_room(request)  # transformers reads the weights early
    try:
        return load_through_cache(request)
    except NotEnoughMemory as error:
        raise make.with_advice(request, error) from None


class Face:
    """The methods that every lean model has.

    Attributes:
        _road: of the models.
    """

    _road: Road

    @classmethod
    @guarded("while planning")
    def plan(cls, model_name: str | Path, *args: Any, **kwargs: Any) -> LoadPlan:
        """Predict what `from_pretrained_lean` of this class would take, without loading; see
        `tl_fastload.plan`.
        """
        lean: Any = cls
        bound = inspect.signature(lean.from_pretrained_lean).bind(model_name, *args, **kwargs)
        bound.apply_defaults()
        return make.plan_load(resolved(request_of(cls, cls._road, **bound.arguments)))

    def to_layout_(self, layout: str) -> Any:
        """Put every parameter of this model, and its gradient, into another memory order, one at a
        time. Values, shapes, dtypes and the Parameter objects stay.

            optimizer = torch.optim.AdamW(model.to_layout_("stock").parameters(), fused=True)

        Make optimizers afterwards: the states of one that has run keep the order they had.
        Quantized parameters stay as they are, mapped ones that move are mapped no more.

        Args:
            layout: "stock" for row-major, "forward" for the order in which the forward pass
                multiplies.

        Returns:
            This model.

        Raises:
            ArgumentError: another `layout`; or parameters without values here (on meta), shared
                with other tensors or processes, or of a kind that has no strides of its own
                (DTensor, sparse). Names them; nothing has changed.
        """
        put_in_layout(self, layout)
        return self

    def save_lean(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: ProgressOption = None,
    ) -> Path:
        """Write this model as it is in memory (processed, quantized, edited) into a folder that
        `from_pretrained_lean` maps in an instant; see `tl_fastload.save_lean`.
        """
        return save_lean(self, folder, max_shard_bytes=max_shard_bytes, progress=progress)
