"""What the public classes of all roads share: a call made of its arguments, a load and a plan of
it, and the methods that every lean model has.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from transformers import PretrainedConfig

from tl_fastload.copies.to_hub import push_lean_to_hub
from tl_fastload.copies.write import MAX_SHARD_BYTES, save_lean
from tl_fastload.errors import ArgumentError, NotEnoughMemory, SaveError
from tl_fastload.ground.boundary import called, guarded
from tl_fastload.loading.relayout import put_in_layout
from tl_fastload.loading.resolve import resolved
from tl_fastload.loading.through_cache import load_through_cache
from tl_fastload.placement.together import over_devices
from tl_fastload.planning import make
from tl_fastload.planning.plan import LoadPlan
from tl_fastload.quantized.formats import read_quantization
from tl_fastload.quantized.spec import quantization_argument
from tl_fastload.report.progress import ProgressOption
from tl_fastload.request.adapters import read_adapter_argument
from tl_fastload.request.argument_types import checked, checked_keywords
from tl_fastload.request.keywords import sort_keywords
from tl_fastload.request.options import DEFAULT_DTYPE, DEFAULT_LAYOUT, Options
from tl_fastload.roads.road import Request, Road

if TYPE_CHECKING:
    from typing_extensions import Self

_OF_SEVERAL_PARTS = re.compile(
    r"[Wb]_(?!U$|E$|pos$)\w+|QK|OV|accumulated_bias|all_composition_scores"
    r"|tokens_to_residual_directions"
)
"""What of TransformerLens' models reads the weights of several parts."""


def request_of(
    cls: Any, road: Road, from_pretrained_kwargs: dict[str, Any], **arguments: Any
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
    own = {item.name: arguments.pop(item.name) for item in fields(Options)}
    own["quantize"] = read_quantization(quantization_argument(own["quantize"], keywords))
    own["adapter"] = read_adapter_argument(own["adapter"])
    if "torch_dtype" in keywords:
        arguments["torch_dtype"] = keywords.pop("torch_dtype")
    function = called() or "from_pretrained_lean"
    of_loading = _names(cls.from_pretrained_lean)
    names = _names(getattr(cls, function, cls.from_pretrained_lean))
    names = names if "device" in names else of_loading  # else it hands on what it is given
    sorted_keywords = sort_keywords(keywords, function, names, of_loading)
    return Request(cls, road, Options(**own), arguments, sorted_keywords)


def _names(function: Any) -> tuple[str, ...]:
    """Of the arguments that a function takes."""
    return tuple(inspect.signature(function).parameters)


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


@contextmanager
def _folder_of(model: str | Path | PretrainedConfig) -> Iterator[str | Path]:
    """What a plan is made of: a name or a folder, for a configuration one for the moment."""
    if not isinstance(model, PretrainedConfig):
        yield model
        return
    with TemporaryDirectory(prefix="tl_fastload-") as folder:
        model.save_pretrained(folder)
        yield folder


class Face:
    """The methods that every lean model has.

    Attributes:
        _road: of the models.
    """

    _road: Road

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        over_devices(cls, _OF_SEVERAL_PARTS, "run_with_cache")

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
        mesh: Any = None,
        parallel: str | None = None,
        device_map: Any = None,
        max_memory: Any = None,
        **from_pretrained_kwargs: Any,
    ) -> Self:
        """Load a pretrained model, its weights processed, with TransformerLens' own numbers (those
        of HookedTransformer's `from_pretrained`, or of TransformerBridge's `boot_transformers` and
        `enable_compatibility_mode`) and about one copy of its weights in memory.

            model = LeanHookedTransformer.from_pretrained_lean("gpt2-xl", dtype="bfloat16")
            print(model.load_report)  # time, memory, and what was done

        Args:
            model_name: TransformerLens name or alias, any hub name, a local folder, a GGUF file, a
                folder that `save_lean` wrote, or a repository that it was pushed to. Arguments that
                contradict such a copy are errors, the defaults of the processing steps included.
            fold_ln: fold the norm weights into the following layer.
            center_writing_weights: give what writes to the residual stream zero mean.
            center_unembed: give the unembedding zero mean over the vocabulary.
            refactor_factored_attn_matrices: make the factors of the QK and OV circuits even.
            checkpoint_index: which training checkpoint, counted from zero.
            checkpoint_value: which training checkpoint, by step or tokens.
            checkpoint_label: another name of `checkpoint_value`.
            hf_model: a transformers model in memory; read, never changed, and not shared.
            device: where the parameters go; CUDA if there is one, else the CPU.
            n_devices: how many CUDA devices share the layers, evenly, as in TransformerLens.
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
                by default "forward", and for a processed copy what was saved. A bridge has one
                order, TransformerLens' own.
            mesh: a one-dimensional `torch.distributed.device_mesh.DeviceMesh` of processes that
                share the model; all of them call this alike. Each reads and holds its part alone.
            parallel: how they share it. "fsdp": each parameter lies in parts (DTensor), and those
                of a block come together while it runs (torch's `fully_shard`). "tp": each has some
                of the heads and of the MLPs' columns, and computes with them (DTensor).
            device_map: spread the model: module -> device ({"embed": 0, "blocks": 0, "blocks.7":
                "cpu", "": 1}, the longest name that fits counts; blocks are not split), or a map
                that accelerate makes: "auto" or "balanced" fills the CUDA devices evenly,
                "sequential" one after the other, and what is left goes to "cpu" and "disk". Those
                parts stay on the host and are copied to the first other device while they run;
                "disk" wants weights that are mapped from a file as they are. Parts of a bridge go
                by its names (embed, blocks.3, unembed) or by transformers' (model.layers.3).
            max_memory: what such a map may take: device -> bytes or a text, {0: "20GiB", "cpu":
                "60GiB"}.
            **from_pretrained_kwargs: for Hugging Face: revision, cache_dir, token,
                local_files_only, subfolder, gguf_file (which of a folder's or repository's),
                trust_remote_code (False by default), torch_dtype, or fields of the model's
                configuration.

        Returns:
            The model, with a `load_report`.

        Raises:
            LeanLoadError: the base of all of: ArgumentError, UnknownModelError,
                UnsupportedArchitectureError, CheckpointError, MissingWeightsError,
                AdapterError, NotEnoughMemory, StrategyError. Raised before weights are read
                whenever that is possible; nothing half-loaded is returned.
        """
        model: Self = loaded(request_of(road=cls._road, **locals()))
        return model

    @classmethod
    @guarded("while planning")
    def plan(cls, model_name: str | Path | PretrainedConfig, *args: Any, **kwargs: Any) -> LoadPlan:
        """Predict what `from_pretrained_lean` of this class would take, without loading; see
        `tl_fastload.plan`.
        """
        lean: Any = cls
        with _folder_of(model_name) as place:
            bound = inspect.signature(lean.from_pretrained_lean).bind(place, *args, **kwargs)
            bound.apply_defaults()
            request = request_of(cls, cls._road, **bound.arguments)
            if request.options.mesh is not None:
                raise ArgumentError(
                    "A plan tells of one process: leave mesh= out. Each process of a mesh holds "
                    "its part of the parameters, and while it loads the largest one as well."
                )
            found = make.plan_load(resolved(request))
            if place is model_name:
                return found
            advice = found.advice  # now, while there is a configuration to read
        advise = None if found.advise is None else lambda: advice
        return replace(found, source=type(model_name).__name__, advise=advise)

    @guarded("while moving parameters")
    def to_layout_(self, layout: str) -> Self:
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

    @guarded("while saving", SaveError)
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

    def push_lean_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Push this model as it is in memory to the hub, from where `from_pretrained_lean(repo_id)`
        loads it; see `tl_fastload.push_lean_to_hub` for the options and what is raised.
        """
        return push_lean_to_hub(self, repo_id, **options)
