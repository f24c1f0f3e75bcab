"""What was seen of a parameter in a trace, and the role that follows from it."""

import dataclasses

from jaxpeft.lifting.folded import Axes
from jaxpeft.lifting.roles import BIAS, CONVOLUTION, EMBEDDING, KERNEL, NORM, OTHER, Role


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
