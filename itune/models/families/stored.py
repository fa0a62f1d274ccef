"""How a checkpoint stores a parameter, where that is not simply a tensor of the same shape."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter is every `step`-th entry, from `first` on, of the last axis of the tensor `name`.

    transposed: and the tensor has a kernel's last two axes in the order (in, out).
    """

    name: str
    first: int = 0
    step: int = 1
    transposed: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, of the parameter's."""
        inner = (shape[-1], shape[-2]) if self.transposed else shape[-2:]
        return (*shape[:-2], *inner[:-1], inner[-1] * self.step)


def as_part(entry: str | Part) -> Part:
    """An entry of a family's WEIGHTS; a plain name is a tensor of the parameter's own shape."""
    return Part(entry) if isinstance(entry, str) else entry
