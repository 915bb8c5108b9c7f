"""What may leave the public functions: errors of this family, and what is the caller's own.

An error of another library means a file, a memory or a system that did not do what it should, and
becomes an error of ours that says what to do, with the other one as its cause. What nobody foresaw
is called a fault of tl_fastload.
"""

from __future__ import annotations

import errno
import functools
import inspect
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from tl_fastload.errors import (
    CheckpointError,
    InternalError,
    LeanLoadError,
    MissingPackageError,
    NotEnoughMemory,
    is_out_of_memory,
)
from tl_fastload.ground.words import nearest

_P = ParamSpec("_P")
_R = TypeVar("_R")

_called: ContextVar[str] = ContextVar("called", default="")
_HERE = str(Path(__file__).parents[1])
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
# Where transformers puts the code of checkpoints that may run.
_OF_CHECKPOINTS = "transformers_modules"
_FEWER_FILES = "Close other files, or allow more of them (`ulimit -n`)."
_REMEDIES = {
    errno.EMFILE: _FEWER_FILES,
    errno.ENFILE: _FEWER_FILES,
    errno.ENAMETOOLONG: "A name is too long for a file: check the names in the checkpoint's JSON.",
    errno.ENOSPC: "Free space on the disk.",
}


def spelt(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function that is called with arguments that it does not have name the nearest ones, as
    Python does from 3.13 on, under the name that it was called by.
    """
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name not in ("self", "cls")]

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            close = [nearest(name, names) for name in kwargs if name not in names]
            meant = next(filter(None, close), None)
            guess = f" Did you mean {meant}=?" if meant else ""
            raise TypeError(f"{function.__name__}() {error}.{guess}") from None
        return function(*args, **kwargs)

    return call


def guarded(
    doing: str, system: type[LeanLoadError] = CheckpointError
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function raise nothing but errors of this family and the caller's own.

    Args:
        doing: what it does, as in "while loading".
        system: the error for what the system refuses.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        function = spelt(function)

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if _called.get():  # what a part of a load raises, the whole may explain better
                return function(*args, **kwargs)
            token = _called.set(function.__name__)
            try:
                with boundary(doing, system):
                    return function(*args, **kwargs)
            finally:
                _called.reset(token)

        return call

    return decorate


def called() -> str:
    """The name of the public function that was called from outside; "" in none."""
    return _called.get()


@contextmanager
def boundary(doing: str, system: type[LeanLoadError] = CheckpointError) -> Iterator[None]:
    """`guarded` for a block of statements."""
    try:
        yield
    except Exception as error:
        ours = translated(error, doing, system)
        if ours is None:
            raise
        raise ours from error
    except BaseException as error:
        # A panic of code in Rust (tokenizers, safetensors) is no `Exception`.
        if not is_panic(error):
            raise
        raise _internal(error, doing) from error


def is_panic(error: BaseException) -> bool:
    """Whether code in Rust has panicked."""
    return type(error).__name__ == "PanicException"


def translated(
    error: Exception, doing: str, system: type[LeanLoadError] = CheckpointError
) -> LeanLoadError | None:
    """The error of this family that an error means; None for one that goes on as it is.

    Args:
        error: what was raised.
        doing: what was being done, as in "while loading".
        system: the error for what the system refuses.
    """
    if isinstance(error, (LeanLoadError, Warning)) or is_callers(error):
        return None
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if is_out_of_memory(error):
        return NotEnoughMemory(
            f"Memory ran out {doing} ({said}). Close other programs, or load a smaller model, "
            "another dtype, or with quantize=; tl_fastload.plan says what a load takes."
        )
    if isinstance(error, OSError):
        remedy = _REMEDIES.get(error.errno or 0, "Check that the files are there and may be read.")
        return system(f"The system refused something {doing} ({said}). {remedy} Then try again.")
    if isinstance(error, RecursionError):
        return system(
            f"Something is nested too deeply {doing} ({said}). Check the files' JSON and names, or "
            "raise sys.setrecursionlimit."
        )
    if isinstance(error, ImportError):
        name = getattr(error, "name", None)
        return MissingPackageError(
            f"A package could not be imported {doing} ({said}). Install "
            f"{name or 'what it names'} in a version that fits the others."
        )
    return _internal(error, doing)


def is_callers(error: BaseException) -> bool:
    """Whether an error comes out of code of the caller (a callback, a class of their own), or out
    of the call itself, such as arguments that the signature does not have.
    """
    trace: TracebackType | None = error.__traceback__
    within = False
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith(_HERE):
            within = within or not name.endswith("boundary.py")
        elif within and not name.startswith((*_LIBRARIES, "<")) and _OF_CHECKPOINTS not in name:
            return True
        trace = trace.tb_next
    return not within


def _internal(error: BaseException, doing: str) -> InternalError:
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    return InternalError(
        f"tl_fastload met what it did not foresee {doing} ({type(error).__name__}: {first_line}). "
        "This is a fault of tl_fastload. Please report it, with the whole traceback; if a "
        "checkpoint may be damaged, download it again meanwhile."
    )
