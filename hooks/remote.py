"""Run an instrument where the model is: an nnsight model's own process, or nnsight's remote service."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from hooks.errors import HookError

R = TypeVar("R")
_OPTION = inspect.Parameter("remote", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool | str")
_NOTE = """

    remote: with a model of nnsight that names its checkpoint, run all of this on nnsight's remote service (True),
    which gets this package's code with the request, or rehearse that here ("local"). Rehearsed in the tests, never
    tried on the service. `progress` is left out then.
"""


def anywhere(method: Callable[..., R]) -> Callable[..., R]:
    """Let `method(model, ...)` also take an nnsight model, and `remote`.

    Raises HookError for `remote` with a model that is not nnsight's.
    """

    @functools.wraps(method)
    def run(model: Any, *args: Any, remote: bool | str = False, **options: Any) -> R:
        ours = type(model).__module__.partition(".")[0] != "nnsight" and isinstance(model, nn.Module)
        if remote and (ours or not hasattr(model, "_remoteable_model_key")):
            raise HookError(
                f"{method.__name__}: remote={remote!r} needs an nnsight model that names its checkpoint, such as "
                f"nnsight.TransformersModel('hub/name'); got a {type(model).__name__}"
            )
        if not remote:
            return method(model if ours else getattr(model, "_module", model), *args, **options)
        options.pop("progress", None)
        with _by_value():
            return _ship(method, model, args, options, remote)

    signature = inspect.signature(method)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), _OPTION])  # type: ignore[attr-defined]
    run.__doc__ = (method.__doc__ or "").rstrip() + _NOTE
    return run


def _ship(method: Callable[..., R], model: Any, args: Any, options: dict[str, Any], remote: bool | str) -> R:
    # A session without a trace: the method runs the model by itself, with its own hooks, on the other side.
    with model.session(remote=remote):
        found = method(model._module, *args, **options).save()  # type: ignore[attr-defined]
    return found


@contextmanager
def _by_value() -> Iterator[None]:
    """The service does not have this package: its functions travel with the request as code."""
    from cloudpickle import list_registry_pickle_by_value, register_pickle_by_value, unregister_pickle_by_value

    known = list_registry_pickle_by_value()
    package = [sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] == __package__]
    mine = [module for module in package if module.__name__ not in known]
    for module in mine:
        register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in mine:
            unregister_pickle_by_value(module)
