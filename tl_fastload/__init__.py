"""tl_fastload: load models into TransformerLens' HookedTransformer with one copy of the weights in
memory.
"""

from tl_fastload import compat as _compat

_compat.require_hooked_transformer()

from tl_fastload.errors import (  # noqa: E402  # after the check, whose message would be lost otherwise
    AdapterError,
    ArgumentError,
    CheckpointError,
    DifferentModelError,
    LeanLoadError,
    MissingPackageError,
    MissingWeightsError,
    NotEnoughMemory,
    QuantizationError,
    RecordingError,
    SaveError,
    StrategyError,
    UnknownModelError,
    UnsupportedArchitectureError,
)
from tl_fastload.load_plan import LoadPlan  # noqa: E402
from tl_fastload.load_weights import load_weights_  # noqa: E402
from tl_fastload.memory import watch_memory  # noqa: E402
from tl_fastload.model import LeanHookedTransformer, LeanLoadingMixin, plan  # noqa: E402
from tl_fastload.progress import ProgressEvent  # noqa: E402
from tl_fastload.report import LoadReport  # noqa: E402
from tl_fastload.store_bytes import verify_copy  # noqa: E402
from tl_fastload.store_write import save_lean  # noqa: E402
from tl_fastload.version import __version__ as __version__  # noqa: E402

__all__ = [
    "AdapterError",
    "ArgumentError",
    "CheckpointError",
    "DifferentModelError",
    "LeanHookedTransformer",
    "LeanLoadError",
    "LeanLoadingMixin",
    "LoadPlan",
    "LoadReport",
    "MissingPackageError",
    "MissingWeightsError",
    "NotEnoughMemory",
    "ProgressEvent",
    "QuantizationError",
    "RecordingError",
    "SaveError",
    "StrategyError",
    "UnknownModelError",
    "UnsupportedArchitectureError",
    "load_weights_",
    "plan",
    "save_lean",
    "verify_copy",
    "watch_memory",
]
