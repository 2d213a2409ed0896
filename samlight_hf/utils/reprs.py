"""Short representations of objects that hold arrays, as notebooks and debuggers print them."""

from dataclasses import fields


class ShortRepr:
    """A dataclass, made with `repr=False`, that is printed with the shapes of its arrays instead of their values.

    Example:
        >>> from samlight_hf.masks.results import MaskResult
        >>> import numpy as np
        >>> MaskResult(np.zeros((2, 30, 40), bool), np.zeros(2, np.float32), np.zeros((2, 4), np.float32))
        MaskResult(masks=bool (2, 30, 40), scores=float32 (2,), boxes_xyxy=float32 (2, 4))
    """

    def __repr__(self) -> str:
        parts = (f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self) if field.repr)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(parts)})"


def _short(value) -> str:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return repr(value)
    device = str(getattr(value, "device", "cpu"))
    place = "" if device == "cpu" else f" on {device}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{place}"
