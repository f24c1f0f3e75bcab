"""What a model does with each of its parameters: the rows that ``jaxpeft.describe`` gives."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxpeft.lifting.folded import Axes, Folded

KERNEL, CONVOLUTION, EMBEDDING = "kernel", "convolution", "embedding"
NORM, BIAS, OTHER, UNUSED = "norm", "bias", "other", "unused"


@dataclasses.dataclass(frozen=True)
class Role:
    """What a model does with one parameter.

    Attributes:
        path: Its path, without Linen's ``params``.
        shape: Its shape.
        dtype: Its dtype.
        role: "kernel" of products, "convolution", "embedding" (rows are looked up), "norm" (scale
            or offset of a normalisation), "bias", "other" or "unused".
        axes: What its axes mean, for kernels, convolutions and embeddings; else None.
        of: For a bias, the path of the kernel to whose product it is added.
        why: For "other", what the model does with it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    role: str
    axes: Axes | None = None
    of: str = ""
    why: str = ""

    @property
    def stacked(self) -> bool:
        """Whether several weights are stacked in it, such as those of all layers."""
        return self.axes is not None and bool(self.axes.stack)

    @property
    def tied(self) -> bool:
        """Whether it is a table that is a kernel, too, such as the head."""
        return self.axes is not None and self.axes.tied

    def fold(self, leaf: Any) -> Folded:
        """A node that answers for the parameter.

        Raises:
            TypeError: It has no axes.
        """
        if self.axes is None:
            raise TypeError(f"{self.path}: a parameter of role {self.role} has no axes.")
        return Folded(leaf, self.axes)

    @property
    def is_linear(self) -> bool:
        """Whether "all-linear" adapts it: a kernel that is no table."""
        return self.role == KERNEL

    def describe(self) -> str:
        """The meaning of its axes, or what it belongs to, in a few words."""
        if self.role == BIAS:
            return f"of {self.of}"
        if self.axes is None:
            return self.why
        return str(self.axes) + (", also a kernel" if self.tied else "")


class Roles(Mapping[str, Role]):
    """A row for each parameter, by its path; printing it lists all of them."""

    def __init__(self, rows: Mapping[str, Role]):
        self._rows = dict(rows)

    def __getitem__(self, path: str) -> Role:
        return self._rows[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        head = ("parameter", "shape", "role", "all-linear", "axes")
        lines = [head] + [
            (
                row.path,
                " x ".join(map(str, row.shape)) or "scalar",
                row.role,
                "yes" if row.is_linear else "",
                row.describe(),
            )
            for row in self.values()
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


@dataclasses.dataclass
class Uses:
    """What was seen of one parameter.

    Attributes:
        kernels: The meaning of its axes in each product.
        lookups: The meaning of its axes in each look-up of rows.
        convolutions: The meaning of its axes in each convolution.
        norms: How often it scales or offsets what was normalised.
        biases: The kernels to whose products it is added.
        others: What else the model does with it.
        pending: Where a constant is added to it, as in ``1 + scale``, or it scales something: what
            it is shows when that is normalised.
    """

    kernels: list[Axes] = dataclasses.field(default_factory=list)
    lookups: list[Axes] = dataclasses.field(default_factory=list)
    convolutions: list[Axes] = dataclasses.field(default_factory=list)
    norms: int = 0
    biases: list[str] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    pending: list[str] = dataclasses.field(default_factory=list)

    def role(self, row: Role) -> Role:
        """The row of the parameter, filled in."""
        forms = self.kernels + self.convolutions + self.lookups
        why = next(iter(self.pending or self.others), "")
        if self.lookups:
            turned = [_turned(axes) for axes in self.kernels]
            if len(set(self.lookups + turned)) == 1 and not (why or self.convolutions):
                tied = bool(self.kernels)
                axes = dataclasses.replace(self.lookups[0], table=True, tied=tied)
                return dataclasses.replace(row, role=EMBEDDING, axes=axes)
            why = why or "rows are looked up, and more"
        elif forms and not why and not (self.norms or self.biases):
            if len(set(forms)) == 1 and not (self.kernels and self.convolutions):
                role = KERNEL if self.kernels else CONVOLUTION
                return dataclasses.replace(row, role=role, axes=forms[0])
            why = "products contract different axes of it"
        elif forms:
            why = why or "a kernel, and more"
        elif self.norms and not why:
            return dataclasses.replace(row, role=NORM)
        elif len(set(self.biases)) == 1 and not why:
            return dataclasses.replace(row, role=BIAS, of=self.biases[0])
        why = why or ", ".join(self.biases)
        return dataclasses.replace(row, role=OTHER, why=why) if why else row


def _turned(axes: Axes) -> Axes:
    return dataclasses.replace(axes, ins=axes.outs, outs=axes.ins)
