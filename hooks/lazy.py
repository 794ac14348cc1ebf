"""Names of a package that are loaded on first use (PEP 562), so that importing the package loads none of its files."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazily(
    package: str, names: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package``, whose file ``key`` has the public names ``names[key]``.

    ``modules`` are files that are public themselves.

    >>> __getattr__, __dir__ = lazily(__name__, {"logit_lens": ("Lens", "lens")}, ["plots"])  # doctest: +SKIP
    """
    home = {name: f"{package}.{file}" for file, members in names.items() for name in members}
    public = sorted([*home, *modules])

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name in home:
            return getattr(import_module(home[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(public)}")

    return get, lambda: public
