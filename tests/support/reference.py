"""What unmodified TransformerLens and transformers make of a checkpoint of the zoo.

Stock refuses folders and decides by name, so its own functions run here as private copies whose
globals read the folder instead of the hub: names, configuration and files come from the folder;
converters, guards, processing and the model are stock's, untouched. Nothing of tl_fastload is used.
"""

from __future__ import annotations

import contextlib
import io
import json
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformer_lens.loading_from_pretrained as loading
import transformers
from packaging.version import Version
from transformer_lens import HookedTransformer

from tests.support import stock_config
from tests.support.stock_config import TRANSFORMER_LENS
from tests.support.zoo import CASES, Case, read_weights

_MOE_DTYPE = "the expert layers are made in float32 whatever cfg.dtype says, and the forward fails"
_WHOLE_W_POS = "the converter does not cut W_pos to a smaller n_ctx: size mismatch"
_TOYS = ("attn-only", "solu", "gelu", "shortformer", "solu-old", "solu-old-8l", "othello")

STOCK_SKIPS: dict[str, dict[str, str]] = {
    "forward in another dtype than float32": dict.fromkeys(
        ("mixtral", "olmoe", "olmoe-gqa"), _MOE_DTYPE
    ),
    "smaller n_ctx": dict.fromkeys(("opt", "santacoder", *_TOYS), _WHOLE_W_POS),
    "first_n_layers": {
        "solu-old-8l": "the converter tells the weights' orientation by the number of layers"
    },
}
"""What stock cannot do: what -> case -> why. Every case loads, given a repaired configuration."""


@dataclass(frozen=True)
class StockWrong:
    """A checkpoint that stock 3.9 loads without a word and whose log-probabilities are then wrong.

    off_by: the largest difference from transformers' own, in nats, on `tokens(case_id)`.
    overrides: configuration keywords for `zoo.build`. flags: arguments of `from_pretrained`,
    on top of NO_PROCESSING.
    """

    case_id: str
    off_by: float
    why: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)


NO_PROCESSING = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}
_LINEAR_ROPE = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
_YARN_ROPE = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
}
_LONG_ROPE = {
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [2.0, 3.0, 5.0],
    },
    "original_max_position_embeddings": 16,
}
_WRONG_SIDE = "folds norms into the wrong side of a square matrix"
_ALL_SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}

STOCK_WRONG: tuple[StockWrong, ...] = (
    StockWrong(
        "gpt-oss",
        1.3,
        "attention sinks make pattern rows sum to less than one, so b_V does not fold",
        flags={"fold_value_biases": True},
    ),
    StockWrong("bloom-5-heads", 4.5, "ALiBi slopes for a head count that is no power of two"),
    StockWrong("llama", 3.5, "drops the attention biases", {"attention_bias": True}),
    StockWrong("llama", 1.6, "drops the MLP biases", {"mlp_bias": True}),
    StockWrong("llama", 5.8, "ignores linear rope scaling", _LINEAR_ROPE),
    StockWrong("mistral-nemo", 1.8, "ignores linear rope scaling", _LINEAR_ROPE),
    StockWrong("qwen2", 1.4, "ignores yarn rope scaling", _YARN_ROPE),
    StockWrong("qwen2", 4.7, "ignores the sliding window", _ALL_SLIDING),
    StockWrong("qwen3", 14.0, "ignores the sliding window", _ALL_SLIDING),
    StockWrong("qwen3", 9.2, "drops the attention biases", {"attention_bias": True}),
    StockWrong("phi", 1.4, "drops the query and key norms", {"qk_layernorm": True}),
    StockWrong("phi3", 2.8, "rotates whole heads", {"partial_rotary_factor": 2 / 3}),
    StockWrong("gptj", 0.08, "takes 1e-5 for the epsilon", {"layer_norm_epsilon": 1e-2}),
    StockWrong(
        "bloom",
        8.5,
        "takes the residual before the norm",
        {"apply_residual_connection_post_layernorm": True},
    ),
    StockWrong("gemma", 2.5, "drops the attention biases", {"attention_bias": True}),
    StockWrong("gemma3", 17.0, "ignores the logit soft-cap", {"final_logit_softcapping": 4.0}),
    StockWrong("apertus", 2.0, "drops the attention biases", {"attention_bias": True}),
    StockWrong("phi3", 0.84, "ignores longrope's factors", _LONG_ROPE),
    StockWrong("llama", 3.0, _WRONG_SIDE, {"intermediate_size": 30}, {"fold_ln": True}),
    StockWrong("neox", 1.4, _WRONG_SIDE, {"intermediate_size": 48}, {"fold_ln": True}),
    StockWrong("gpt-oss", 3.3, "clamps the experts at 7 always", {"swiglu_limit": 0.5}),
)
"""Where stock is silently wrong, measured with transformers 5.23 in float32."""


# Neutral, so that no branch of stock that looks for a word in the name fires.
_NAME = "checkpoint-of-the-zoo"


class _Overlay:
    """`base` with some attributes replaced."""

    def __init__(self, base: Any, **replacements: Any) -> None:
        self.__dict__.update(replacements)
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _copy_with_globals(function: Any, **replacements: Any) -> Callable[..., Any]:
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **replacements},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def stock_model(case_id: str, folder: Path, **flags: Any) -> HookedTransformer:
    """Stock's `HookedTransformer.from_pretrained(checkpoint in folder, **flags)`.

    `cfg.model_name` and `cfg.tokenizer_name` are what stock derives from a folder as the name
    (no tokenizer when the folder has none); of a .pth model, what it derives from its hub name.
    """
    case = CASES[case_id]
    from_pretrained = _copy_with_globals(
        HookedTransformer.from_pretrained.__func__, loading=_stock_loading(case, folder)
    )
    name = case.repo if case.kind == "pth" else _NAME
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return from_pretrained(HookedTransformer, name, **flags)


def stock_config_dict(case_id: str, folder: Path) -> dict[str, Any]:
    """Stock's configuration dictionary of a checkpoint, repaired as `stock_config` says."""
    case = CASES[case_id]
    stock = _stock_loading(case, folder)
    if case.kind == "pth":
        return stock.convert_neel_model_config(case.repo)
    return stock.convert_hf_model_config(_NAME)


def _stock_loading(case: Case, folder: Path) -> Any:
    """The module `loading_from_pretrained` as it would be if stock knew this folder."""
    shared = {
        "get_official_model_name": lambda name: name,
        "HfApi": lambda: _LocalHub(folder),
        "utils": _Overlay(loading.utils, download_file_from_hf=_local_download(folder)),
        "AutoConfig": _Overlay(
            None, from_pretrained=lambda *_, **__: stock_config.hf_config(case, folder)
        ),
    }
    labels = _copy_with_globals(loading.get_checkpoint_labels, **shared)
    toy = _copy_with_globals(loading.convert_neel_model_config, **shared)
    named = _copy_with_globals(loading.convert_hf_model_config, **shared)

    def convert_hf_model_config(name: str, **kwargs: Any) -> dict[str, Any]:
        hf_config = stock_config.hf_config(case, folder)
        config = named(stock_config.TABLES.get(case.architecture, name), **kwargs)
        config.update(stock_config.repairs(case.architecture, hf_config))
        has_tokenizer = (folder / "tokenizer_config.json").exists()
        config["tokenizer_name"] = str(folder) if has_tokenizer else None
        return config

    def named_config(name: str, **kwargs: Any) -> Any:
        get = _copy_with_globals(
            loading.get_pretrained_model_config,
            **shared,
            get_checkpoint_labels=labels,
            convert_neel_model_config=toy,
            convert_hf_model_config=convert_hf_model_config,
        )
        config = get(name, **kwargs)
        if case.kind != "pth":
            config.model_name = folder.name
        return config

    local_auto_model = _LocalModels(case, folder, transformers.AutoModel)
    convert = _copy_with_globals(
        loading.get_pretrained_state_dict,
        **shared,
        AutoModelForCausalLM=_LocalModels(case, folder, transformers.AutoModelForCausalLM),
        AutoModel=local_auto_model,
    )

    def state_dict(name: str, cfg: Any, hf_model: Any = None, **kwargs: Any) -> Any:
        if case.architecture == "Gemma3ForConditionalGeneration" and TRANSFORMER_LENS.major < 3:
            # It imports AutoModel in the function, where globals do not reach.
            hf_model = local_auto_model.from_pretrained(name, torch_dtype=kwargs["dtype"])
        return convert(name, cfg, hf_model, **kwargs)

    return _Overlay(
        loading,
        get_official_model_name=lambda name: name,
        get_pretrained_model_config=named_config,
        get_pretrained_state_dict=state_dict,
        convert_hf_model_config=convert_hf_model_config,
        convert_neel_model_config=toy,
    )


class _LocalHub:
    """`huggingface_hub.HfApi` for one folder; the hub lists files in alphabetical order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list_repo_files(self, repo_id: str) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in files)


def _local_download(folder: Path) -> Callable[..., Any]:
    def download_file_from_hf(repo_name: str, file_name: str, **_: Any) -> Any:
        path = folder / file_name
        if path.suffix == ".pth":
            return torch.load(path, map_location="cpu", weights_only=True)
        return json.loads(path.read_text())

    return download_file_from_hf


class _LocalModels:
    """An `AutoModel...` class that loads the folder whatever name it is asked for."""

    def __init__(self, case: Case, folder: Path, auto_class: Any) -> None:
        self.case, self.folder, self.auto_class = case, folder, auto_class

    def from_pretrained(self, name: str, **keywords: Any) -> torch.nn.Module:
        if self.case.kind == "raw":
            return raw_module(self.folder, keywords.get("dtype") or keywords["torch_dtype"])
        model: torch.nn.Module = self.auto_class.from_pretrained(self.folder, **keywords)
        return model


def raw_module(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A bare module tree with the parameters of a checkpoint that transformers has no code for.

    It has a `config`, so that it also serves as `hf_model=`.
    """
    raw = json.loads((folder / "config.json").read_text())
    root = torch.nn.Module()
    root.config = types.SimpleNamespace(**raw, to_dict=lambda: dict(raw))
    for name, value in read_weights(folder).items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                # The converters index the layers by number.
                child = torch.nn.ModuleList() if parent == "h" else torch.nn.Module()
                module.add_module(parent, child)
            module = module.get_submodule(parent)
        module.register_parameter(leaf, torch.nn.Parameter(value.to(dtype)))
    return root


def hf_model(case_id: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a checkpoint, with eager attention; None where it has no code."""
    case = CASES[case_id]
    if case.kind != "hf":
        return None
    model_class = getattr(transformers, case.architecture)
    options = {"attn_implementation": "eager"}
    if Version(transformers.__version__).major >= 5:
        # The grouped kernel wants rows of whole 16 bytes; the zoo's sizes are odd on purpose.
        options["experts_implementation"] = "eager"
    return model_class.from_pretrained(folder, torch_dtype=dtype, **options).eval()


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32 (or float64): what centring the unembedding leaves alone."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def hf_log_probs(
    case_id: str, folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor | None:
    """transformers' log-probabilities `[batch, position, d_vocab]`; None where it has no code."""
    model = hf_model(case_id, folder, dtype)
    if model is None:
        return None
    with torch.no_grad():
        return log_probs(model(input_ids=tokens).logits)
