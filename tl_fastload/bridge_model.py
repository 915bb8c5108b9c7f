"""The public classes: TransformerBridge, loaded lean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_fastload.bridge import versions
from tl_fastload.bridge.boot import boot_in_memory
from tl_fastload.bridge.hooks import look_for_hooks
from tl_fastload.bridge.processing import process_in_place
from tl_fastload.bridge.quantizing import make_plain, require_bytes_can_follow
from tl_fastload.bridge.record import COMPATIBILITY, IS_RECORDING
from tl_fastload.bridge.road import ROAD
from tl_fastload.bridge.steps import check_flags, right_steps, run_stock
from tl_fastload.errors import ArgumentError
from tl_fastload.face import Face, loaded, request_of
from tl_fastload.ground.boundary import guarded
from tl_fastload.ground.mark import require_whole
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.huggingface.lora.live import adapters_of
from tl_fastload.placement.own_values import parameter_versions
from tl_fastload.placement.values_here import require_values
from tl_fastload.quantized.spec import as_dtype
from tl_fastload.report.load_report import LoadReport
from tl_fastload.report.progress import Progress, ProgressOption
from tl_fastload.request.argument_types import checked
from tl_fastload.request.options import DEFAULT_DTYPE
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.known import describe_steps

if TYPE_CHECKING:
    from typing_extensions import Self


class LeanBridgeMixin(Face):
    """Makes a `TransformerBridge` class load lean: `class Mine(LeanBridgeMixin, TheirClass)`.

    Attributes:
        load_report: what the load did; a bridge that somebody else booted has none.
    """

    load_report: LoadReport
    _road = ROAD

    @classmethod
    @guarded("while booting")
    def boot_transformers_lean(
        cls,
        model_name: str | Path,
        hf_config_overrides: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = DEFAULT_DTYPE,
        tokenizer: Any = None,
        load_weights: bool = True,
        trust_remote_code: bool = False,
        model_class: Any = None,
        hf_model: Any = None,
        n_ctx: int | None = None,
        revision: str | None = None,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        *,
        mmap: str | bool = "auto",
        progress: ProgressOption = None,
        check_memory: bool = True,
        dequantize: bool = False,
        adapter: Any = None,
        requantize: bool = False,
        check_base: bool = True,
        device_map: Any = None,
        max_memory: Mapping[Any, Any] | None = None,
        n_devices: int | None = None,
        mesh: Any = None,
        parallel: str | None = None,
        **stock_arguments: Any,
    ) -> Self:
        """`TransformerBridge.boot_transformers`, with weights that are mapped from their files
        where these hold them as they are, and read one at a time where not. Nothing is processed:
        `enable_compatibility_mode()` does that, in place.

        Args:
            model_name: TransformerLens name or alias, any hub name, a local folder, or a folder
                that `save_lean` wrote of a bridge that was booted and not processed.
            hf_config_overrides: fields of transformers' configuration to set.
            device: where the parameters go; by default what TransformerLens chooses.
            dtype: dtype of the parameters; by default float32, and for a copy what was saved.
            tokenizer: the tokenizer; by default the one that lies with the model, or none.
            load_weights: False makes random weights, as TransformerLens does.
            trust_remote_code: whether code that comes with the checkpoint may run.
            model_class: transformers' class, if not the one that TransformerLens chooses.
            hf_model: a transformers model in memory; it becomes the bridge's own, as in
                TransformerLens. One with LoRA adapters (peft), or with `adapter=`, is read and
                stays as it is: the bridge has weights of its own, with the adapters merged.
            n_ctx: another context length than the model's own.
            revision: branch, tag or commit on the hub.
            checkpoint_index: which training checkpoint, counted from zero.
            checkpoint_value: which training checkpoint, by step or tokens.
            mmap: whether weights are mapped from files; "auto" does so on local disks.
            progress: as for `from_pretrained_lean`.
            check_memory: raise NotEnoughMemory before weights are read if they cannot be held.
            dequantize: as for `from_pretrained_lean`.
            adapter: as for `from_pretrained_lean`.
            requantize: as for `from_pretrained_lean`.
            check_base: as for `from_pretrained_lean`.
            device_map: as for `from_pretrained_lean`; nothing is offloaded by accelerate.
            max_memory: as for `from_pretrained_lean`.
            n_devices: as for `from_pretrained_lean`.
            mesh: as for `from_pretrained_lean`.
            parallel: as for `from_pretrained_lean`.
            **stock_arguments: other arguments of `boot_transformers`.

        Returns:
            The bridge; with a `load_report` unless `hf_model` was given or no weights were loaded.

        Raises:
            LeanLoadError: as `from_pretrained_lean`.
        """
        for name in ("code_revision", "offload_folder"):
            if stock_arguments.pop(name, None) is not None:
                raise ArgumentError(
                    f"{name}= is for transformers' own loading: use "
                    "TransformerBridge.boot_transformers, or leave it out."
                )
        boot = {"hf_config_overrides": hf_config_overrides, "model_class": model_class}
        boot = {name: value for name, value in boot.items() if value is not None}
        checked(load_weights=load_weights, trust_remote_code=trust_remote_code)
        given = checked(device=device, tokenizer=tokenizer, n_ctx=n_ctx, dtype=dtype)
        own = {"dequantize": dequantize, "adapter": adapter, "requantize": requantize}
        own |= {"device_map": device_map, "max_memory": max_memory}
        own |= {"check_memory": check_memory, "check_base": check_base}
        own |= {"mesh": mesh, "parallel": parallel}
        given |= checked(n_devices=1 if n_devices is None else n_devices)
        base, adapters = adapters_of(hf_model)
        has_adapters = adapter is not None or base is not hf_model or bool(adapters)
        if not load_weights or (hf_model is not None and not has_adapters):
            _check_in_memory(
                hf_model, own | {"n_devices": given.pop("n_devices") > 1}, stock_arguments
            )
            booted: Self = boot_in_memory(
                cls,
                str(model_name),
                hf_model=hf_model,
                load_weights=load_weights,
                trust_remote_code=trust_remote_code,
                revision=revision,
                checkpoint_index=checkpoint_index,
                checkpoint_value=checkpoint_value,
                **boot,
                **stock_arguments,
                **{**given, "dtype": as_dtype(given["dtype"])},
            )
            return booted
        given |= {"model_name": model_name, "mmap": mmap, "progress": progress}
        given |= {"checkpoint_index": checkpoint_index, "checkpoint_value": checkpoint_value}
        given |= {"hf_model": hf_model, COMPATIBILITY: False}
        keywords = {"revision": revision, "trust_remote_code": trust_remote_code}
        keywords |= stock_arguments
        arguments = {**_DEFAULTS, **boot, **own, **given}
        bridge: Self = loaded(request_of(cls, cls._road, keywords, **arguments))
        return bridge

    @classmethod
    def of(cls, bridge: Any) -> Any:
        """Let a bridge that was booted otherwise be processed lean, in place.

        Args:
            bridge: a TransformerBridge; its own class stays among the bases of its new one.

        Returns:
            The same object.

        Raises:
            ArgumentError: it is no TransformerBridge.
        """
        if not isinstance(bridge, versions.bridge_class()):
            raise ArgumentError(
                f"bridge is a {type(bridge).__name__}: pass what "
                "TransformerBridge.boot_transformers(...) returns, before it is compiled."
            )
        if not isinstance(bridge, LeanBridgeMixin):
            kinds: Any = (cls, type(bridge))
            bridge.__class__ = _lean_class(*kinds)
        return bridge

    @guarded("while processing")
    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerLens' `enable_compatibility_mode`, in place: its names of hooks, and weights
        processed by `process_weights`. What cannot be processed is refused before anything changes.

        Args:
            disable_warnings: say nothing about names of earlier versions.
            no_processing: leave the weights as they are.
            fold_ln: fold the norm weights into the following layer.
            center_writing_weights: give what writes to the residual stream zero mean.
            center_unembed: give the unembedding zero mean over the vocabulary.
            fold_value_biases: fold the value biases into the output bias.
            refactor_factored_attn_matrices: make the factors of the QK and OV circuits even.

        Raises:
            LeanLoadError: as `process_weights`.
        """
        flags = {step: on for step, on in locals().items() if step in STEPS}
        checked(disable_warnings=disable_warnings, no_processing=no_processing, **flags)
        require_whole(self, "enable_compatibility_mode")  # type: ignore[arg-type]
        if not no_processing:
            self._make_processable(flags)
        super().enable_compatibility_mode(  # type: ignore[misc]
            disable_warnings=disable_warnings, no_processing=no_processing, **flags
        )

    def _make_processable(self, flags: dict[str, bool]) -> None:
        """Raise ArgumentError if the weights cannot be processed with these steps, or not here."""
        bridge: Any = self
        if versions.is_processed(bridge) or IS_RECORDING in bridge.__dict__:
            return
        if getattr(bridge.cfg, "is_audio_model", False):
            return  # TransformerLens refuses it
        make_plain(bridge)
        require_values(bridge.original_model, "enable_compatibility_mode")
        require_bytes_can_follow(bridge, flags)
        check_flags(bridge.cfg, flags)

    @guarded("while processing")
    def process_weights(
        self,
        verbose: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerLens' `process_weights`, which `enable_compatibility_mode` calls: recorded,
        then done in place, one parameter at a time. A step that would change the model's output is
        left out with a NumbersWarning. The steps are as for `enable_compatibility_mode`.

        Args:
            verbose: print what is done.

        Raises:
            ArgumentError: weights that are not here, or a step that this model cannot have.
            UnsupportedArchitectureError: TransformerLens does not process such a model.
            HalfWrittenError: it was stopped in the middle, now or before.
        """
        flags = {step: on for step, on in locals().items() if step in STEPS}
        checked(verbose=verbose, **flags)
        bridge: Any = self
        require_whole(bridge, "enable_compatibility_mode")
        stock = super().process_weights  # type: ignore[misc]
        if versions.is_processed(bridge):
            stock(verbose)  # says that it does nothing
            return
        self._make_processable(flags)
        flags = right_steps(bridge.cfg, flags)
        if IS_RECORDING in bridge.__dict__:
            stock(verbose, **flags)
            return
        with torch.inference_mode(False), own_defaults(), Progress(None) as progress:
            process_in_place(
                bridge, lambda: run_stock(lambda: stock(verbose, **flags)), flags, progress
            )
        bridge._processed = ({n for n, on in flags.items() if on}, parameter_versions(bridge))
        if hasattr(bridge, "load_report"):
            steps = describe_steps(bridge, flags)
            bridge.load_report = replace(bridge.load_report, processing=steps)

    def _scan_existing_hooks(self, module: Any, prefix: str = "") -> None:
        look_for_hooks(super()._scan_existing_hooks, module, prefix)  # type: ignore[misc]

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = True,
    ) -> None:
        """`enable_compatibility_mode` under the name that it has on `LeanHookedTransformer`; see
        `enable_compatibility_mode` for the steps and what is raised.
        """
        flags = {step: on for step, on in locals().items() if step in STEPS}
        self.enable_compatibility_mode(disable_warnings=True, **flags)


def _check_in_memory(hf_model: Any, own: dict[str, Any], others: dict[str, Any]) -> None:
    """Raise ArgumentError for arguments that TransformerLens' own boot cannot take."""
    for name in ("device_map", "max_memory", "n_devices"):
        if own[name]:
            raise ArgumentError(
                f"{name}= spreads weights that are read from files: dispatch a model in memory "
                "with accelerate before, or leave it out."
            )
    for name in ("dequantize", "adapter", "requantize", "mesh", "parallel"):
        if own[name]:
            raise ArgumentError(f"{name}= is for weights that are read from files.")
    if hf_model is not None and not hasattr(hf_model, "config"):
        raise ArgumentError(
            f"hf_model is a {type(hf_model).__name__} without a configuration. Pass a transformers "
            "model, such as AutoModelForCausalLM.from_pretrained(...) returns."
        )
    unknown = others.keys() - inspect.signature(versions.stock_boot()).parameters.keys()
    if unknown:
        raise ArgumentError(f"{min(unknown)}= is no argument of boot_transformers. Leave it out.")


@cache
def _lean_class(cls: Any, kind: Any) -> Any:
    """The class of a bridge of some kind that is lean from now on."""
    if issubclass(cls, kind):
        return cls
    return type(f"Lean{kind.__name__}", (LeanBridgeMixin, kind), {"__module__": __name__})


_DEFAULTS: dict[str, Any] = {
    **{
        name: one.default
        for name, one in inspect.signature(LeanBridgeMixin.from_pretrained_lean).parameters.items()
        if one.default is not one.empty
    },
    **dict.fromkeys(STEPS, False),
    "cache": False,
}
"""Of a bridge that is booted and not processed."""


class LeanTransformerBridge(LeanBridgeMixin, versions.bridge_class()):  # type: ignore[misc]  # a class that mypy does not see
    """`TransformerBridge` that loads lean; everything else about it is TransformerLens' own."""
