"""What a bare machine need not have installed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

_NAMES = {
    "datasets": ("Dataset", "IterableDataset", "load_dataset"),
    "datasets.arrow_dataset": ("Dataset",),
    "datasets.iterable_dataset": ("IterableDataset",),
    "datasets.load": ("load_dataset",),
}


def stand_in_for_datasets() -> bool:
    """Put empty classes in the place of `datasets`, if it is missing: TransformerLens imports it
    for its evaluations only, and with pyarrow it is larger than all that a report needs.
    """
    if importlib.util.find_spec("datasets") is not None:
        return False
    for name, classes in _NAMES.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update({"__version__": "0", **{one: type(one, (), {}) for one in classes}})
        sys.modules[name] = module
    return True
