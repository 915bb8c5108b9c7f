"""The public classes: HookedTransformer, loaded lean."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_fastload.face import Face
from tl_fastload.ground.boundary import guarded
from tl_fastload.ground.memory_orders import FORWARD
from tl_fastload.hooked import HookedTransformer
from tl_fastload.hooked.inheritance import check_bases
from tl_fastload.hooked.live import process_with, record_state_dict
from tl_fastload.hooked.processing import Recorder
from tl_fastload.hooked.road import ROAD
from tl_fastload.hooked.state_dicts import fill_missing_keys
from tl_fastload.loading import live
from tl_fastload.placement.half_written import forgive
from tl_fastload.report.load_report import LoadReport
from tl_fastload.request.argument_types import checked
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.road import Recording

if TYPE_CHECKING:
    from typing_extensions import Self


class LeanLoadingMixin(Face):
    """Makes a `HookedTransformer` class load lean: `class Mine(LeanLoadingMixin, TheirClass)`.

    A class with a loading method of its own, which has to run, comes first instead:
    `class Mine(TheirClass, LeanHookedTransformer)`. The order in which one of them would be passed
    over in silence is an ArgumentError when the class is made.

    Every way to load weights is lean: `from_pretrained_lean`, and also `from_pretrained`,
    `from_pretrained_no_processing`, `load_and_process_state_dict` and `process_weights_`.

    Attributes:
        load_report: what the last load did.
    """

    load_report: LoadReport
    _road = ROAD
    _recorder: Recorder | None = None  # while TransformerLens' loading code runs
    _processed: tuple[set[str], Any]
    _hf_config: Any = None  # Hugging Face's configuration, for weights in its naming
    _layout: str = FORWARD  # the memory order that a copy gets

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, LeanLoadingMixin)

    @classmethod
    @guarded("while loading")
    def from_pretrained_no_processing_lean(
        cls,
        model_name: str | Path,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        **arguments: Any,
    ) -> Self:
        """`from_pretrained_lean` with every processing step off by default; the other arguments
        are the same.
        """
        steps = {step: on for step, on in locals().items() if step in STEPS}
        return cls.from_pretrained_lean(model_name, **steps, **arguments)

    @classmethod
    @guarded("while loading")
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """`from_pretrained_lean` under the name that existing code calls."""
        return cls.from_pretrained_lean(*args, **kwargs)

    @classmethod
    @guarded("while loading")
    def from_pretrained_no_processing(
        cls,
        model_name: str | Path,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        **arguments: Any,
    ) -> Self:
        """`from_pretrained` with every processing step off by default, which is the class's own
        where it has one, as in TransformerLens; the other arguments are the same. See
        `from_pretrained_lean`.
        """
        steps = {step: on for step, on in locals().items() if step in STEPS}
        return cls.from_pretrained(model_name, **steps, **arguments)

    @guarded("while loading a state dict")
    def load_and_process_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Load a state dict in TransformerLens' naming and process it, one parameter at a time.

        The model's Parameter objects keep their identity (an optimizer goes on holding them);
        their values are written in place. `state_dict` and its tensors are left as they are, and
        share no memory with the model.

        Args:
            state_dict: parameter name -> tensor; quantized ones for the quantized parameters.
            fold_ln: fold the norm weights into the following layer.
            center_writing_weights: give what writes to the residual stream zero mean.
            center_unembed: give the unembedding zero mean over the vocabulary.
            fold_value_biases: fold the value biases into the output bias.
            refactor_factored_attn_matrices: make the factors of the QK and OV circuits even.

        Raises:
            MissingWeightsError: weights are missing or misshapen, or norms or biases that the
                model has trained are missing (as in a processed state dict for an unprocessed
                model); the model is as it was. Tables of another length (masks, rotary embeddings)
                are left out, and the model keeps its own.
            ArgumentError: quantized weights cannot take these values or steps, or values are
                elsewhere (offloaded, sharded, on meta); likewise.
            HalfWrittenError: as for `process_weights_`. A complete state dict makes a half-written
                model whole.
        """
        steps = checked(**{step: on for step, on in locals().items() if step in STEPS})
        checked(state_dict=state_dict)
        stock = super().load_and_process_state_dict  # type: ignore[misc]
        if self._recorder is not None:
            self._recorder.record(self, state_dict, steps, stock)
            return

        def record(given: dict[str, Any], flags: dict[str, bool]) -> Recording:
            return record_state_dict(self, given, flags, stock)

        live.load_state_dict(self, state_dict, steps, record)

    @guarded("while processing weights")
    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Process the weights of this model in place, one parameter at a time.

        A second call with nothing changed in between does nothing and says so in
        `load_report.notes`: steps are never applied twice. Parameter objects keep their identity,
        quantized ones also their bytes. The steps are as for `load_and_process_state_dict`.

        Raises:
            ArgumentError: parameters whose values are elsewhere (offloaded, sharded, on meta), or a
                step that the model forbids; the model is as it was.
            HalfWrittenError: this step, or one before it, was stopped in the middle. An interrupt
                (Ctrl-C) goes on as it is, and the model says so from then on.
        """
        flags = {step: on for step, on in locals().items() if step in STEPS}
        steps = checked(fold_value_biases=True, **flags)
        stock, stock_load = super().process_weights_, super().load_and_process_state_dict  # type: ignore[misc]

        def record(given: dict[str, Any], flags: dict[str, bool]) -> Recording:
            return record_state_dict(self, given, flags, stock_load)

        live.process(self, steps, record, partial(process_with, self, steps, stock))

    def fill_missing_keys(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Complete a state dict with the model's own defaults; a missing weight matrix is an
        error.
        """
        filled = fill_missing_keys(self, state_dict)
        if self._recorder is None:
            return filled
        # Stock completes the very dictionary that it then puts its float32 copies into.
        state_dict.update(filled)
        return state_dict

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """`torch.nn.Module.load_state_dict`; while a lean load runs, recorded values are collected
        instead.
        """
        if self._recorder is not None:
            return self._recorder.collect(state_dict)
        found = super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        forgive(self, state_dict)  # type: ignore[arg-type]
        return found


class LeanHookedTransformer(LeanLoadingMixin, HookedTransformer):  # type: ignore[misc]  # our order of arguments
    """`HookedTransformer` that loads lean; everything else about it is TransformerLens' own."""
