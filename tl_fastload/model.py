"""The public classes: HookedTransformer, loaded lean."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tl_fastload.face import Face, loaded, request_of
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
from tl_fastload.report.progress import ProgressOption
from tl_fastload.request.argument_types import checked
from tl_fastload.request.options import DEFAULT_DTYPE, DEFAULT_LAYOUT
from tl_fastload.roads.road import Recording


class LeanLoadingMixin(Face):
    """Makes a `HookedTransformer` class load lean: `class Mine(LeanLoadingMixin, TheirClass)`.

    A class with a loading method of its own, which has to run, comes first instead:
    `class Mine(TheirClass, LeanHookedTransformer)`. The order in which one of them would be passed
    over in silence is an ArgumentError when the class is made.

    Every way to load weights goes the lean way: `from_pretrained_lean`, and also `from_pretrained`,
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
    def from_pretrained_lean(
        cls,
        model_name: str | Path,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        checkpoint_label: int | None = None,
        hf_model: Any = None,
        device: str | torch.device | None = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        dtype: str | torch.dtype = DEFAULT_DTYPE,
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        *,
        strategy: str = "auto",
        mmap: str | bool = "auto",
        progress: ProgressOption = None,
        quantize: Any = None,
        dequantize: bool = False,
        adapter: Any = None,
        requantize: bool = False,
        cache: bool | str | Path | None = None,
        verify: bool = False,
        check_memory: bool = True,
        check_base: bool = True,
        layout: str = DEFAULT_LAYOUT,
        **from_pretrained_kwargs: Any,
    ) -> Any:
        """Load a pretrained model with the numbers of `from_pretrained` and about one copy of its
        weights in memory.

            model = LeanHookedTransformer.from_pretrained_lean("gpt2-xl", dtype="bfloat16")
            print(model.load_report)  # time, memory, and what was done

        Args:
            model_name: TransformerLens name or alias, any hub name, a local folder, or a folder
                that `save_lean` wrote. Arguments that contradict such a copy are errors, the
                defaults of the processing steps included.
            fold_ln: fold the norm weights into the following layer.
            center_writing_weights: give what writes to the residual stream zero mean.
            center_unembed: give the unembedding zero mean over the vocabulary.
            refactor_factored_attn_matrices: make the factors of the QK and OV circuits even.
            checkpoint_index: which training checkpoint, counted from zero.
            checkpoint_value: which training checkpoint, by step or tokens.
            checkpoint_label: another name of `checkpoint_value`.
            hf_model: a transformers model in memory; read, never changed, and not shared.
            device: where the parameters go; CUDA if there is one, else the CPU.
            n_devices: how many CUDA devices share the layers.
            tokenizer: the tokenizer; by default the one that lies with the model, or none.
            move_to_device: False leaves the parameters on the CPU.
            fold_value_biases: fold the value biases into the output bias.
            default_prepend_bos: whether strings get a BOS token.
            default_padding_side: "left" or "right".
            dtype: dtype of the parameters, such as "bfloat16" or torch.float32; by default
                float32, and for a processed copy what was saved.
            first_n_layers: load only that many layers.
            n_ctx: another context length than the model's own.
            strategy: "assign" puts finished tensors into the model (torch 2.1 or newer), "copy"
                copies into the model's own; "auto" assigns where it can.
            mmap: whether weights that need no change are mapped from the file instead of read;
                "auto" does so on local disks, and leaves every parameter dense and in memory of
                its own; True also maps views with gaps into fused matrices (Q, K, V of GPT-2, NeoX
                and BLOOM, unprocessed), which fused optimizers and `torch.save` of one of them
                cannot take.
            progress: None for a bar when somebody watches, True or False, or a function of a
                `tl_fastload.ProgressEvent`.
            quantize: "8bit", "nf4", "fp4" or a `transformers.BitsAndBytesConfig` quantizes the
                projections while they are loaded, after processing. None leaves weights as the
                checkpoint has them; quantized ones stay quantized.
            dequantize: make ordinary weights of a quantized checkpoint while it is read; of a
                method that has no format here, transformers does, at the memory that it takes.
            adapter: a LoRA adapter of peft to merge while loading: a folder,
                "organisation/name", "organisation/name@revision"; or a list of adapters, each
                alone or as (adapter, weight). Merged before processing and `quantize`.
            requantize: merge the adapter into weights that came quantized, by quantizing them
                again; without it that is an error.
            cache: keep a processed copy of what is loaded, and map it the next time: True for the
                usual folder, or a folder; None for what the environment variable
                TL_FASTLOAD_CACHE says; False for not. See `tl_fastload.cache`.
            verify: compare every byte of a processed copy with its checksums.
            check_memory: raise NotEnoughMemory, with choices that would fit, before weights are
                read if they cannot be held. False goes ahead.
            check_base: raise AdapterError if the base model that an adapter names is known to be
                another than this one. False merges into any model that the adapter fits.
            layout: memory order of the parameters: "forward" as the forward pass multiplies, or
                "stock", row-major as TransformerLens has them, for code that looks at strides;
                by default "forward", and for a processed copy what was saved.
            **from_pretrained_kwargs: for Hugging Face: revision, cache_dir, token,
                local_files_only, subfolder, trust_remote_code (False by default), torch_dtype, or
                fields of the model's configuration.

        Returns:
            The model, with a `load_report`.

        Raises:
            LeanLoadError: the base of all of: ArgumentError, UnknownModelError,
                UnsupportedArchitectureError, CheckpointError, MissingWeightsError,
                AdapterError, NotEnoughMemory, StrategyError. Raised before weights are read
                whenever that is possible; nothing half-loaded is returned.
        """
        return loaded(request_of(road=cls._road, **locals()))

    @classmethod
    def from_pretrained_no_processing_lean(
        cls,
        model_name: str | Path,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        **arguments: Any,
    ) -> Any:
        """`from_pretrained_lean` with every processing step off by default; the other arguments
        are the same.
        """
        return cls.from_pretrained_lean(
            model_name,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            fold_value_biases=fold_value_biases,
            **arguments,
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained_lean` under the name that existing code calls."""
        return cls.from_pretrained_lean(*args, **kwargs)

    @classmethod
    def from_pretrained_no_processing(
        cls,
        model_name: str | Path,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        **arguments: Any,
    ) -> Any:
        """`from_pretrained` with every processing step off by default, which is the class's own
        where it has one, as in TransformerLens; the other arguments are the same. See
        `from_pretrained_lean`.
        """
        return cls.from_pretrained(
            model_name,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            fold_value_biases=fold_value_biases,
            **arguments,
        )

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
        steps = {
            name: value for name, value in locals().items() if name not in ("self", "state_dict")
        }
        steps.pop("__class__", None)
        steps = checked(state_dict=state_dict, **steps)
        steps.pop("state_dict")
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
        quantized ones also their bytes.

        Args:
            fold_ln: fold the norm weights into the following layer.
            center_writing_weights: give what writes to the residual stream zero mean.
            center_unembed: give the unembedding zero mean over the vocabulary.
            refactor_factored_attn_matrices: make the factors of the QK and OV circuits even.

        Raises:
            ArgumentError: parameters whose values are elsewhere (offloaded, sharded, on meta), or a
                step that the model forbids; the model is as it was.
            HalfWrittenError: this step, or one before it, was stopped in the middle. An interrupt
                (Ctrl-C) goes on as it is, and the model says so from then on.
        """
        steps = checked(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=True,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
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
