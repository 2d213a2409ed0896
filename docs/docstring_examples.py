"""Show an `Example:` section of a docstring as code, as Griffe does with `Examples:` alone."""

import re

import griffe


_EXAMPLE = re.compile(r"^( *)Example:(?=\n\s*>>> )", re.MULTILINE)


class ExampleSections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
