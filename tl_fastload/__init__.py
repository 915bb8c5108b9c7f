"""tl_fastload: load models into TransformerLens' HookedTransformer with one copy of the weights in
memory.
"""

from tl_fastload import compat as _compat

_compat.require_hooked_transformer()

from tl_fastload.errors import (  # noqa: E402  # after the check, whose message would be lost otherwise
    ArgumentError,
    CheckpointError,
    LeanLoadError,
    MissingWeightsError,
    NotEnoughMemoryError,
    QuantizationError,
    RecordingError,
    StrategyError,
    UnknownModelError,
    UnsupportedArchitectureError,
)
from tl_fastload.load_weights import load_weights_  # noqa: E402
from tl_fastload.model import LeanHookedTransformer, LeanLoadingMixin  # noqa: E402
from tl_fastload.progress import ProgressEvent  # noqa: E402
from tl_fastload.report import LoadReport  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "LeanHookedTransformer",
    "LeanLoadError",
    "LeanLoadingMixin",
    "LoadReport",
    "MissingWeightsError",
    "NotEnoughMemoryError",
    "ProgressEvent",
    "QuantizationError",
    "RecordingError",
    "StrategyError",
    "UnknownModelError",
    "UnsupportedArchitectureError",
    "load_weights_",
]
