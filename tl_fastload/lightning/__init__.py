"""Lightning checkpoints without the pretrained part.

Imports no Lightning itself: the mixin goes in front of `lightning.LightningModule` and
`pytorch_lightning.LightningModule` alike.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tl_fastload.errors import ArgumentError, DifferentModelError, MissingWeightsError
from tl_fastload.ground.words import listed
from tl_fastload.ground.wrappers import plain_name
from tl_fastload.lightning import record as frozen
from tl_fastload.lightning.untouched import Baseline

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

RECORD_KEY = "tl_fastload_frozen_submodules"
"""Where a checkpoint says which pretrained models stood in the module."""

_WAYS_OUT = (
    "To save it, too, set frozen_submodules = () on the module, and save again. If it was changed "
    "on purpose, and will be before a checkpoint is loaded, attach it again (model.lens = "
    "model.lens)."
)

_allow_other: ContextVar[bool] = ContextVar("allow_other_frozen", default=False)


class FrozenSubmodulesMixin(_Base):
    """Leaves pretrained submodules out of a `LightningModule`'s checkpoints:
    `class Probe(FrozenSubmodulesMixin, LightningModule)`.

    What is named is frozen from the moment that it is attached: no gradients, and in eval mode also
    while the rest trains. A state dict and a checkpoint have everything else. Loading one puts it
    beside the pretrained part that stands there already, which is never written to. The checkpoint
    records which model that was, and another one is refused.

    Overridden hooks (`on_save_checkpoint`, `on_load_checkpoint`, `on_fit_start`, `train`) must call
    `super()`.

    Attributes:
        frozen_submodules: names of the submodules, such as `("lens",)` or `("probe.lens",)`.
        allow_other_frozen: load checkpoints that were trained beside another pretrained model, too;
            what differs is warned about.
    """

    frozen_submodules: Iterable[str] = ()
    allow_other_frozen: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__[: cls.__mro__.index(FrozenSubmodulesMixin)]
        before = [base for base in bases if not issubclass(base, FrozenSubmodulesMixin)]
        if any(issubclass(base, nn.Module) for base in before):
            raise ArgumentError(
                f"{cls.__name__}: FrozenSubmodulesMixin must come before {before[0].__name__} "
                "among the base classes, or it changes nothing."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) or name == "frozen_submodules":
            baselines: dict[str, Baseline] = self.__dict__.setdefault("_baselines", {})
            for frozen_name in list(baselines):
                if f"{frozen_name}.".startswith(f"{name}."):
                    del baselines[frozen_name]  # what is attached now is what is to be kept
            self._freeze()

    def train(self, mode: bool = True) -> Any:
        """`torch.nn.Module.train` for everything that is not frozen."""
        super().train(mode)
        self._freeze()
        return self

    def on_fit_start(self) -> None:
        """Freeze what was attached late.

        Raises:
            ArgumentError: `frozen_submodules` names something that is not there, or that has
                changed since it was attached: no checkpoint could be saved.
        """
        super().on_fit_start()  # type: ignore[misc]
        self._require_frozen()
        self._freeze()
        self._require_untouched()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """`torch.nn.Module.state_dict` without the frozen submodules; warns if one of them has been
        trained.
        """
        self._warn_of_training()
        result = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        is_frozen = self._frozen_test()
        for table in (result, getattr(result, "_metadata", {})):
            for key in [key for key in table if key.startswith(prefix)]:
                if is_frozen(key[len(prefix) :]):
                    del table[key]
        return result

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """`torch.nn.Module.load_state_dict` for everything that is not frozen.

        Frozen submodules keep their values. If `state_dict` has some for them, as full checkpoints
        do, they must be those that stand here. Names may have `_orig_mod.` (of `torch.compile`) in
        other places than here.

        Raises:
            MissingWeightsError: keys that are not frozen are missing or unexpected (unless `strict`
                is False), or shapes differ; names all of them. Nothing was written then, except
                where a module's own hooks translate keys.
            DifferentModelError: the frozen values of a full state dict are others, and
                `allow_other_frozen` is off.
            ArgumentError: `frozen_submodules` names something that is not there.
        """
        frozen = {id(module) for module in self._require_frozen().values()}
        is_frozen = self._frozen_test()
        full = {plain_name(key): value for key, value in state_dict.items() if is_frozen(key)}
        if full:
            self._compare_full(full)
        own = self.state_dict(keep_vars=True)
        actual = {plain_name(key): key for key in own}
        rest: OrderedDict[str, Any] = OrderedDict(
            (key if key in own else actual.get(plain_name(key), key), value)
            for key, value in state_dict.items()
            if not is_frozen(key)
        )
        if hasattr(state_dict, "_metadata"):
            rest._metadata = state_dict._metadata  # type: ignore[attr-defined]
        if not self._translates_keys(is_frozen):
            missing = [key for key in own if strict and key not in rest]
            unexpected = [key for key in rest if strict and key not in own]
            self._check_keys(missing, unexpected, _misshapen(rest, own))
        try:
            loads = super(FrozenSubmodulesMixin, _apart(self, frozen)).load_state_dict
            found = loads(rest, False, *args, **kwargs)
        except RuntimeError as error:
            raise MissingWeightsError(str(error)) from error
        found.missing_keys[:] = [key for key in found.missing_keys if not is_frozen(key)]
        if strict:
            self._check_keys(found.missing_keys, found.unexpected_keys, [])
        return found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Called for this module wherever it stands, `load_state_dict` for the outermost alone."""
        if _forgive_frozen not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_forgive_frozen)  # type: ignore[no-untyped-call]
        self.__dict__["_loading_prefix"] = prefix
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record of the frozen submodules; drop them from the hyperparameters.

        Raises:
            ArgumentError: a frozen submodule is not there, or something in it trains, or has
                trained since it was attached: it would be lost.
        """
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        modules = self._require_frozen()
        trained = [
            f"{name}.{parameter}"
            for name, module in modules.items()
            for parameter, value in module.named_parameters()
            if value.requires_grad
        ]
        if trained:
            raise ArgumentError(
                f"{listed(trained)} trains, but frozen_submodules leaves it out of the "
                "checkpoint. Keep what trains outside of the frozen submodules."
            )
        self._require_untouched()
        checkpoint[RECORD_KEY] = frozen.record_of(modules)
        hyperparameters = checkpoint.get("hyper_parameters")
        if isinstance(hyperparameters, dict):
            ids = {id(tensor) for module in modules.values() for tensor in module.parameters()}
            for name, value in list(hyperparameters.items()):
                if isinstance(value, nn.Module) and any(id(p) in ids for p in value.parameters()):
                    del hyperparameters[name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the record with the pretrained models that stand here.

        Raises:
            DifferentModelError: they are others, and `allow_other_frozen` is off; names each
                difference.
            ArgumentError: a frozen submodule is not there.
            CheckpointError: a newer version of tl_fastload wrote the record.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        modules = self._require_frozen()
        record = checkpoint.get(RECORD_KEY)
        if record is not None:
            self._judge(frozen.differences(record, modules), frozen.describe(record))
        elif modules and not any(map(self._frozen_test(), checkpoint["state_dict"])):
            warnings.warn(
                "The checkpoint does not say which pretrained model it was trained beside, so "
                "nobody can tell whether this is the same one. Saving it again adds that.",
                stacklevel=2,
            )

    @classmethod
    def load_from_checkpoint(
        cls, *args: Any, allow_other_frozen: bool = False, **kwargs: Any
    ) -> Any:
        """`LightningModule.load_from_checkpoint`; pass what makes the pretrained part again, such
        as `lens=lens`.

        Args:
            *args: the checkpoint and so on, as Lightning takes them.
            allow_other_frozen: whether this call accepts another pretrained model, whatever the
                class says.
            **kwargs: arguments of the class, and Lightning's own.

        Raises:
            DifferentModelError, MissingWeightsError, ArgumentError: as in `on_load_checkpoint` and
                `load_state_dict`.
        """
        token = _allow_other.set(allow_other_frozen)
        try:
            return super().load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            _allow_other.reset(token)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel asks for this name. It would send every frozen weight from the
        # first process to the others: they have it already, mapped or as bytes that cannot be sent.
        return self._frozen_tensors()

    def _frozen_modules(self) -> dict[str, nn.Module]:
        """The frozen submodules that are there."""
        names = self.frozen_submodules
        if isinstance(names, str):
            raise ArgumentError(f"frozen_submodules is a string: write ({names!r},).")
        found = {}
        for name in names:
            module: Any = self
            for part in name.split("."):
                module = getattr(module, part, None)
            if isinstance(module, nn.Module):
                found[name] = module
        return found

    def _require_frozen(self) -> dict[str, nn.Module]:
        modules = self._frozen_modules()
        missing = [name for name in self.frozen_submodules if name not in modules]
        if missing:
            there = ", ".join(name for name, _ in self.named_children()) or "none"
            raise ArgumentError(
                f"frozen_submodules names {', '.join(missing)}, but {type(self).__name__} has no "
                f"such submodule (it has: {there}). Correct the name, or attach the submodule in "
                "__init__ or configure_model."
            )
        return modules

    def _freeze(self) -> None:
        baselines: dict[str, Baseline] = self.__dict__.setdefault("_baselines", {})
        for name, module in self._frozen_modules().items():
            baseline = baselines.get(name)
            if baseline is not None and baseline.home in (None, id(module)):
                baseline.look(module)
            else:
                made = Baseline.of(module)
                if made is not None:
                    baselines[name] = made
            module.requires_grad_(False)
            module.eval()

    def _require_untouched(self) -> None:
        """Raise ArgumentError if a frozen submodule is not what was attached."""
        trainer = getattr(self, "_trainer", None)
        self._tell_of_training(getattr(trainer, "optimizers", None) or (), is_error=True)

    def _warn_of_training(self) -> None:
        baselines = self.__dict__.get("_baselines", {})
        # Counts alone, which cost nothing: a state dict may be asked for at every step.
        if any(
            name in baselines and baselines[name].written(module)
            for name, module in self._frozen_modules().items()
        ):
            self._tell_of_training((), is_error=False)

    def _tell_of_training(self, optimizers: Iterable[Any], *, is_error: bool) -> None:
        """Raise or warn of what has changed in frozen submodules; warn of what may have."""
        changed: list[str] = []
        doubtful: list[str] = []
        for name, module in self._frozen_modules().items():
            baseline = self.__dict__.get("_baselines", {}).get(name)
            if baseline is not None:
                for names, found in zip(
                    (changed, doubtful), baseline.trained(module, optimizers), strict=True
                ):
                    names += [f"{name}.{key}" for key in found]
        if changed:
            message = (
                f"{listed(changed, 5)} of {type(self).__name__} has changed since it was attached, "
                "and frozen_submodules leaves it out of state dicts and checkpoints: its training "
                f"would be lost. {_WAYS_OUT}"
            )
            if is_error:
                raise ArgumentError(message)
            warnings.warn(message, stacklevel=4)
        if doubtful:
            warnings.warn(
                f"{listed(doubtful, 5)} of {type(self).__name__} has been written to since it was "
                "attached. The values that were compared are the same, so it counts as frozen; if "
                f"it was trained all the same, that is not saved. {_WAYS_OUT}",
                stacklevel=4,
            )

    def _frozen_tensors(self) -> list[str]:
        """Names of frozen parameters and buffers, also where another submodule shares them."""
        modules = self._frozen_modules().values()
        ids = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
        everything = (
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        )
        return [name for name, tensor in everything if id(tensor) in ids]

    def _frozen_test(self) -> Callable[[str], bool]:
        """Tells of a key, or of a submodule's name, whether it is frozen."""
        names = tuple(self.frozen_submodules)
        shared = {plain_name(name) for name in self._frozen_tensors()}
        prefixes = tuple(f"{name}." for name in names)

        def test(key: str) -> bool:
            plain = plain_name(key)
            return plain in names or plain in shared or plain.startswith(prefixes)

        return test

    def _translates_keys(self, is_frozen: Callable[[str], bool]) -> bool:
        """Whether a submodule may read other keys than it writes."""
        plain = (
            nn.Module._load_from_state_dict,
            FrozenSubmodulesMixin._load_from_state_dict,
        )
        return any(
            module._load_state_dict_pre_hooks
            or set(module._load_state_dict_post_hooks.values()) - {_forgive_frozen}
            or type(module)._load_from_state_dict not in plain
            for name, module in self.named_modules()
            if not is_frozen(name)
        )

    def _compare_full(self, values: Mapping[str, Any]) -> None:
        """Compare the frozen values of a full state dict with those that stand here."""
        found = []
        for name, module in self._frozen_modules().items():
            start = len(name) + 1
            own = {
                key[start:]: value
                for key, value in values.items()
                if key.startswith(f"{name}.") and isinstance(value, torch.Tensor)
            }
            found += frozen.tensor_differences(own, name, module) if own else []
        self._judge(found, "")

    def _judge(self, differences: list[str], models: str) -> None:
        if not differences:
            return
        trained = f" (there: {models})" if models else ""
        message = (
            f"The checkpoint was trained beside another pretrained model{trained}: "
            f"{'; '.join(differences)}."
        )
        if self.allow_other_frozen or _allow_other.get():
            warnings.warn(message, stacklevel=3)
            return
        raise DifferentModelError(
            f"{message} Load that one, or allow this one with allow_other_frozen=True (an "
            "attribute of the module, and an argument of load_from_checkpoint)."
        )

    def _check_keys(self, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
        """Raise MissingWeightsError if there are any."""
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        wrong = [f"{label}: {', '.join(names)}" for label, names in parts if names]
        if wrong:
            raise MissingWeightsError(
                f"The checkpoint does not fit {type(self).__name__}. Keys {'; '.join(wrong)}. "
                "Build the module as it was when the checkpoint was written; strict=False "
                "(strict_loading) leaves missing and unexpected keys alone."
            )


def _misshapen(values: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} ({list(values[key].shape)} in the checkpoint, {list(tensor.shape)} here)"
        for key, tensor in own.items()
        if isinstance(values.get(key), torch.Tensor)
        and isinstance(tensor, torch.Tensor)
        and values[key].shape != tensor.shape
    ]


def _apart(module: Any, frozen: Collection[int]) -> Any:
    """A stand-in without the submodules of these identities, which shares all else. Those must not
    even be visited: TransformerLens' fused Q, K and V write their own values when they are loaded.
    """
    if not any(id(one) in frozen for one in module.modules()):
        return module
    apart = object.__new__(type(module))
    vars(apart).update(vars(module))
    vars(apart)["_modules"] = {
        name: None if child is None else _apart(child, frozen)
        for name, child in module._modules.items()
        if id(child) not in frozen
    }
    return apart


def _forgive_frozen(module: Any, incompatible: Any) -> None:
    """What is frozen is in no state dict, also inside of another module, such as an average."""
    prefix, is_frozen = module.__dict__["_loading_prefix"], module._frozen_test()
    incompatible.missing_keys[:] = [
        key
        for key in incompatible.missing_keys
        if not (key.startswith(prefix) and is_frozen(key[len(prefix) :]))
    ]
