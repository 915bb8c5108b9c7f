"""tl_fastload: load models into TransformerLens' classes with one copy of the weights in memory."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tl_fastload.errors import (
    AdapterError,
    ArgumentError,
    CheckpointError,
    DifferentModelError,
    HalfWrittenError,
    InternalError,
    LeanLoadError,
    MissingPackageError,
    MissingWeightsError,
    NotEnoughMemory,
    NumbersWarning,
    QuantizationError,
    RecordingError,
    ReplacedFunctionError,
    SaveError,
    StrategyError,
    UnknownModelError,
    UnsupportedArchitectureError,
)
from tl_fastload.ground.compat import __version__ as __version__

if TYPE_CHECKING:
    from tl_fastload.bridge_model import LeanBridgeMixin, LeanTransformerBridge
    from tl_fastload.copies.to_hub import push_copy, push_lean_to_hub
    from tl_fastload.copies.verify import verify_copy
    from tl_fastload.copies.write import save_lean
    from tl_fastload.faces import plan
    from tl_fastload.loading.load_weights import load_weights_
    from tl_fastload.model import LeanHookedTransformer, LeanLoadingMixin
    from tl_fastload.planning.plan import LoadPlan
    from tl_fastload.report.load_report import LoadReport
    from tl_fastload.report.memory import watch_memory
    from tl_fastload.report.progress import ProgressEvent
else:
    # Imported when they are first asked for: TransformerLens takes seconds, which the command line
    # does not need to say what its options are.
    _HOMES = {
        "LeanBridgeMixin": "bridge_model",
        "LeanHookedTransformer": "model",
        "LeanLoadingMixin": "model",
        "LeanTransformerBridge": "bridge_model",
        "LoadPlan": "planning.plan",
        "LoadReport": "report.load_report",
        "ProgressEvent": "report.progress",
        "load_weights_": "loading.load_weights",
        "plan": "faces",
        "push_copy": "copies.to_hub",
        "push_lean_to_hub": "copies.to_hub",
        "save_lean": "copies.write",
        "verify_copy": "copies.verify",
        "watch_memory": "report.memory",
    }

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            value = import_module(f"{__name__}.{name}")  # `tl_fastload.cache` needs no import
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "AdapterError",
    "ArgumentError",
    "CheckpointError",
    "DifferentModelError",
    "HalfWrittenError",
    "InternalError",
    "LeanBridgeMixin",
    "LeanHookedTransformer",
    "LeanLoadError",
    "LeanLoadingMixin",
    "LeanTransformerBridge",
    "LoadPlan",
    "LoadReport",
    "MissingPackageError",
    "MissingWeightsError",
    "NotEnoughMemory",
    "NumbersWarning",
    "ProgressEvent",
    "QuantizationError",
    "RecordingError",
    "ReplacedFunctionError",
    "SaveError",
    "StrategyError",
    "UnknownModelError",
    "UnsupportedArchitectureError",
    "load_weights_",
    "plan",
    "push_copy",
    "push_lean_to_hub",
    "save_lean",
    "verify_copy",
    "watch_memory",
]
