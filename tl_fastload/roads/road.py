"""A road: how a pretrained model becomes a model of some class of TransformerLens'.

What loads, plans and keeps copies knows roads by this interface alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tl_fastload.ground.role import Role, RoleOf
from tl_fastload.huggingface.config import Supported
from tl_fastload.huggingface.pretrained import Located, Pretrained
from tl_fastload.placement.spread import Parts, Spread
from tl_fastload.quantized.spec import as_dtype
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.contradictions import check_arguments, check_device_map
from tl_fastload.request.keywords import Keywords
from tl_fastload.request.options import Options
from tl_fastload.request.sharing import check_sharing
from tl_fastload.roads.observer import Observer
from tl_fastload.source.aliases import Aliases
from tl_fastload.source.location import Location


@dataclass(frozen=True)
class Request:
    """One call of `from_pretrained_lean`, its arguments sorted by who takes them.

    Attributes:
        cls: the model class.
        road: how such models are loaded.
        options: what TransformerLens' own method does not have.
        arguments: of TransformerLens' own method; `torch_dtype` only if it was given.
        keywords: for Hugging Face.
        copy: the processed copy that the name means; None for anything else.
        copy_at: where on the hub that copy lies; None for one in a local folder.
        located: where the model and its adapters lie; None for a copy, and as long as nobody has
            looked (`tl_fastload.loading.resolve`).
    """

    cls: type
    road: Road
    options: Options
    arguments: dict[str, Any]
    keywords: Keywords
    copy: Path | None = None
    copy_at: Location | None = None
    located: Located | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are to be, by either name of that argument."""
        return as_dtype(self.arguments.get("torch_dtype", self.arguments["dtype"]))

    def check(self) -> None:
        """Raise for values that mean nothing, contradict each other or this machine."""
        options = self.options
        options.check()
        check_arguments(self.arguments, self.keywords)
        check_sharing(self.options, self.arguments)
        also = {**self.arguments, "mesh": options.mesh}
        check_device_map(options.device_map, options.max_memory, also)

    def changed(self, **changes: Any) -> Request:
        """The same call with other arguments of TransformerLens' own method."""
        arguments = {**self.arguments, **changes}
        if "dtype" in changes:
            arguments.pop("torch_dtype", None)
        return replace(self, arguments=arguments)

    def with_options(self, **changes: Any) -> Request:
        """The same call with other options."""
        return replace(self, options=replace(self.options, **changes))


@dataclass
class Recording:
    """What goes into a model, found out without reading weights.

    Attributes:
        model: the model that it goes into: a new one, one on the meta device, or the caller's.
        requested: the processing steps that the caller asked for.
        pretrained: where the weights come from; None for a state dict.
        recipes: name of a parameter or buffer -> how its value comes about. Others are ignored.
        shifts: name of a quantized matrix -> what processing takes out of its inputs.
        notes: for the report.
    """

    model: Any
    requested: dict[str, bool]
    pretrained: Pretrained | None = None
    recipes: dict[str, Promise] = field(default_factory=dict)
    shifts: dict[str, Promise] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class TensorParallel(Protocol):
    """How models of a road compute with parts of their matrices."""

    def dims_to_share(
        self, model: Any, n_ranks: int
    ) -> Callable[[str, torch.Size], list[int] | None]:
        """Which dimension of a parameter is shared among processes, by its name and shape.

        Raises:
            ArgumentError: the model cannot be shared so.
        """

    def layers(self, model: Any, shared: Iterable[str]) -> Iterable[nn.Module]:
        """The attention and MLP layers, which compute with the parameters of these names."""


def home_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name in it."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


@dataclass
class Shared:
    """A model that several processes share, while it is filled.

    Attributes:
        model: the model.
        root: what is called whenever the model runs, around all of its modules.
        has_only_blocks: whether the root may compute with parameters of any module but its blocks.
        places: parameter of what is filled -> the modules that hold it, and its name in each.
        views: parameter that is a part of another one's memory in a process alone, and has memory
            of its own here -> that other one, and where it lies in it.
        follow: lets what is no parameter, and the same memory, be that memory again.
    """

    model: nn.Module
    root: nn.Module
    has_only_blocks: bool
    places: dict[str, list[tuple[nn.Module, str]]]
    views: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    follow: Callable[[], None] = lambda: None


class Road(Protocol):
    """What is asked of a road.

    Attributes:
        name: TransformerLens' class that its models are of, for messages.
        config_class: the dataclass of its models' `cfg`.
        supported: which model classes it can load.
        tensor_parallel: gives what lets several processes compute with parts of one model's
            matrices.
        counts_devices: whether `cfg.n_devices` of a model with a device map says over how many it
            lies; to others it says that their forward pass moves activations between blocks.
        moves_first: whether TransformerLens processes a model on its devices, not on the CPU.
    """

    @property
    def name(self) -> str: ...

    @property
    def config_class(self) -> type: ...

    @property
    def supported(self) -> Supported: ...

    @property
    def tensor_parallel(self) -> Callable[[], TensorParallel]: ...

    @property
    def counts_devices(self) -> bool: ...

    @property
    def moves_first(self) -> bool: ...

    def aliases(self) -> Aliases:
        """The names that TransformerLens has for models."""

    def record(
        self,
        request: Request,
        pretrained: Pretrained,
        *,
        on_meta: bool = False,
        observer: Observer | None = None,
    ) -> Recording:
        """Run TransformerLens' own loading to its end, on promises.

        Args:
            request: the call.
            pretrained: the model; its `tree` is asked for once.
            on_meta: make the model on the meta device, without a tokenizer, and say nothing: for a
                plan.
            observer: told of what TransformerLens would hold.

        Raises:
            Exception: anything that TransformerLens' code raises; `pretrained.is_recording` says
                whether its converter or processing was at work.
        """

    def record_weights(
        self, model: Any, pretrained: Pretrained, flags: Mapping[str, bool]
    ) -> Recording:
        """The same for weights under Hugging Face's names that go into a live model, which is not
        changed; the recording's model is what `stored` returns. Recipes of what the weights do not
        tell are zeros.
        """

    def empty_model(
        self,
        request: Request,
        cfg: Any,
        notes: list[str],
        tokenizer: Any,
        *,
        hf_config: Any,
        built: Mapping[str, Any] | None,
        **keywords: Any,
    ) -> Any:
        """A model without values, of a configuration that was saved, or what is filled in its
        place.

        Args:
            request: the call; its processing steps are those that were done.
            cfg: its configuration; not changed.
            notes: gets what the report has to say.
            tokenizer: its tokenizer; None for a model without one.
            hf_config: transformers' configuration, or None.
            built: what `stored` said; None without.
            **keywords: for the class.

        Raises:
            LeanLoadError: there can be no such model here.
        """

    def model_on_meta(self, cls: type, cfg: Any, built: Mapping[str, Any] | None) -> Any:
        """The same on the meta device, without a tokenizer: shapes and dtypes only."""

    def finished(self, model: Any, device_of: Callable[[str], torch.device]) -> Any:
        """The model that a load returns of what it has filled, which may stand for another one.

        Args:
            model: what was filled.
            device_of: where each parameter and buffer lies, by its name.
        """

    def shared(self, held: Any) -> Shared:
        """What several processes share, of what is filled: a new model, or what stands for one.

        Raises:
            ArgumentError: a model that cannot be parted.
        """

    def stored(self, model: Any) -> Any:
        """A module whose parameters and buffers are what a copy holds of a model; under the name
        `built` it may say what else is needed to build the model, as JSON has it.
        """

    def settle(self, held: Any) -> None:
        """Values were written into what `stored` returned: put right what views them."""

    def default_device(self) -> str:
        """The device on which TransformerLens puts a model if none is asked for."""

    def device_map(self, model: Any, move_to_device: bool) -> Callable[[str], torch.device]:
        """Where each parameter and buffer of a model goes, by its name."""

    def parts(self, model: Any) -> Parts:
        """The parts of a model, or of what is filled in its place, for a device map."""

    def put_to_work(self, model: Any, spread: Spread | None) -> None:
        """Let the parts of a model that is placed run on their devices."""

    def strides_in(
        self, order: str, module: nn.Module, name: str, shape: torch.Size
    ) -> tuple[int, ...]:
        """Dense strides of a parameter in one of `ground.memory_orders.LAYOUTS`, in elements.

        Args:
            order: which one.
            module: the module that owns it.
            name: its name in the model.
            shape: its shape.
        """

    def why_skipped(self, step: str, cfg: Any) -> str | None:
        """Why a model of this configuration does not allow a processing step; None if it does."""

    def check_flags(self, cfg: Any, flags: Mapping[str, bool]) -> None:
        """Raise ArgumentError for steps that a model of this configuration cannot even skip."""

    def is_processed(self, model: Any, flags: Mapping[str, bool]) -> bool:
        """Whether every step that is asked for, and that the model allows, would change nothing, by
        the values of its parameters.
        """

    def steps_of(self, model: Any, asked: Mapping[str, bool]) -> dict[str, bool]:
        """The processing steps by which weights become what a live model's own are.

        Args:
            model: the model.
            asked: steps that the caller decides.

        Raises:
            ArgumentError: a step that contradicts the model, or must be given.
            HalfWrittenError: the weights of a half-written model do not tell.
        """

    def hf_config(self, model: Any) -> Any:
        """transformers' configuration of a live model; None if nobody knows it."""

    def role(self, name: str) -> Role:
        """What a parameter or a buffer of a model is, by its name in it; wrappers' parts in the
        name do not matter.
        """

    def roles_in(self, model: Any) -> RoleOf:
        """What the parameters of one model are, or of what stands for it while it is filled: its
        modules may say which way round a matrix lies.
        """

    def folded_names(self, model: Any) -> list[str]:
        """The weights and biases of norms that a model has folded into what reads them."""

    def is_unused(self, name: str, cfg: Any) -> bool:
        """Whether a weight of a checkpoint has no place in the model, which the report says."""
