"""Functions, their arguments and results as bytes and back. The only module of meshd that unpickles.

Unpickling runs whatever code the bytes name, so it happens in two places: in the process of a job, which runs its
owner's code anyway, and in the program that made the calls, with the results of its own jobs only. Whoever may run
jobs for a mesh, as a node of it, may therefore run code in programs that use its executor. The agent never loads this.
"""

from __future__ import annotations

import pickle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})
"""Types that cannot hold anything of the caller's own, so that the plain pickle of one is complete."""


class RemoteTraceback(Exception):
    """The cause of an exception that a call raised on a node: where it came from there, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class RemoteError(Exception):
    """What a call raised cannot be carried over as it is: this names it."""


def dump_function(function: Callable[..., Any]) -> bytes:
    """By value where the nodes cannot import it: what is defined in `__main__`, lambdas, closures."""
    return _dump(function)


def dump_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    return _dump((args, kwargs) if kwargs else (args,))


def load_function(data: bytes) -> Callable[..., Any]:
    function: Callable[..., Any] = _load_here(data)
    return function


def load_call(data: bytes) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    args, *kwargs = _load_here(data)
    return args, kwargs[0] if kwargs else {}


def dump_result(value: Any, function: Callable[..., Any]) -> bytes:
    """What the function returned."""
    if type(value) in _PLAIN:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    try:
        return _dump(value)
    except Exception as error:
        name = getattr(function, "__qualname__", repr(function))
        error.add_note(f"the result of {name}, of type {type(value).__name__}, cannot be sent to its caller")
        raise


def load_result(data: bytes) -> Any:
    return pickle.loads(data)  # noqa: S301 - of the caller's own job


def dump_error(error: BaseException) -> bytes:
    """The exception, if it can travel; what it says; and where it came from."""
    import traceback

    text = "".join(traceback.format_exception(error))
    says = "".join(traceback.format_exception_only(error)).strip()
    try:
        own = _dump(error)
    except Exception:  # whatever its reducer raises: then it travels as text alone
        own = b""
    return pickle.dumps((own, says, text), pickle.HIGHEST_PROTOCOL)


def load_error(data: bytes) -> BaseException:
    """As it was raised, with its remote traceback as its cause."""
    own, says, text = pickle.loads(data)  # noqa: S301 - of the caller's own job
    error: BaseException = RemoteError(says)
    try:
        found = pickle.loads(own) if own else None  # noqa: S301 - of the caller's own job
    except Exception:  # a class with an __init__ of its own way, or one that this program does not have
        found = None
    if isinstance(found, BaseException):
        error = found
    error.__cause__ = RemoteTraceback(text)
    return error


def _load_here(data: bytes) -> Any:
    """In the job's own process."""
    try:
        return pickle.loads(data)  # noqa: S301 - see above
    except ModuleNotFoundError as error:
        error.add_note(
            "install it on the nodes, or send a module of your own along: "
            f"cloudpickle.register_pickle_by_value({error.name or 'module'})"
        )
        raise


def _dump(value: Any) -> bytes:
    # Late: a task whose function the node imports, and which returns a number, goes without it.
    import cloudpickle

    data: bytes = cloudpickle.dumps(value)
    return data
