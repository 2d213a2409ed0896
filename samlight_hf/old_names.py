"""Imports from modules that have moved: they work, with a DeprecationWarning that names the new module."""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


# Old module: {name: new module, and after a colon the new name if it has changed}.
OLD_NAMES = {
    "averaging": {"average_models": "conversion.averaging"},
    "files": {"read_yaml": "utils.atomic_files", "write_aside": "utils.atomic_files:atomic_write"},
    "mask_files": {"coco_document": "masks.files"},
    "messages": {"one_line": "utils.messages"},
    "model_card": {"CardFacts": "publishing.card", "render_card": "publishing.card"},
    "preprocessing": {"check_size": "images.preprocessing"},
}
_PACKAGE = __name__.rpartition(".")[0]


class _OldModules(MetaPathFinder, Loader):
    """Finds and creates the modules of OLD_NAMES, whose attributes come from the new modules."""

    def find_spec(self, name, path=None, target=None):
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, self) if package == _PACKAGE and module in OLD_NAMES else None

    def exec_module(self, module):
        module.__getattr__ = _getter(module.__name__.rpartition(".")[2])


def _getter(module: str) -> Callable[[str], object]:
    """Return the `__getattr__` of an old module."""

    def get(name: str):
        if name not in OLD_NAMES[module]:
            raise AttributeError(f"module {_PACKAGE}.{module} has no attribute {name!r}")
        new, _, new_name = OLD_NAMES[module][name].partition(":")
        warnings.warn(
            f"{_PACKAGE}.{module}.{name} is now {_PACKAGE}.{new}.{new_name or name}", DeprecationWarning, stacklevel=2
        )
        return getattr(importlib.import_module(f"{_PACKAGE}.{new}"), new_name or name)

    return get


sys.meta_path.append(_OldModules())
