"""PEFT folders of models that are not ours, by a map from their paths to names of PEFT's modules.

An adapter of kernels means the same in both worlds if a kernel of the model, its inputs and outputs
flattened, is the transposed weight of the module that the map names. The readers and writers of all
families then work on a base that bears those names.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.lifting.roles import KERNEL, Roles
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.foreign import as_base, with_axes
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import shape_of

LAYER = "{layer}"
KERNELS = ("ADALORA", "IA3", "LOHA", "LOKR", "LORA", "OFT", "VERA")
"""Methods of PEFT that change kernels."""
OTHERS = ("modules_to_save", "trainable_token_indices")
"""Keys of PEFT for what is trained beside kernels."""


@dataclasses.dataclass(frozen=True)
class NamedBase:
    """The parameters of a model that is not ours, with PEFT's names for its kernels.

    Attributes:
        params: The parameters.
        templates: By path, the name of a kernel's module, with "{layer}" for the index in a stack.
        config: What messages say of the model.
        roles: What `jaxpeft.describe` found.
    """

    params: paths.NamedTree
    templates: Mapping[str, str]
    config: Any
    roles: Roles
    name: str = ""
    revision: str = ""

    def writes(self, adapter: Adapter) -> Adapter:
        """The adapter with the names that its writer uses.

        Raises:
            UserError: It has places that are no named kernels.
        """
        lost = [path for path in adapter.spec.paths if path not in self.templates]
        self._require_kernels(adapter, lost)
        names = tuple((path, self.templates[path]) for path in adapter.spec.paths)
        spec = dataclasses.replace(adapter.spec, names=names)
        return dataclasses.replace(adapter, spec=spec)

    def require_kernels(self, values: Mapping[str, Any], place: Any) -> None:
        """Checks that a folder of PEFT holds changes of kernels alone.

        Args:
            values: Its config.
            place: Its file, for the message.

        Raises:
            UserError: It holds more, or something else.
        """
        odd = [key for key in OTHERS if values.get(key)]
        if values.get("peft_type") not in KERNELS or odd:
            what = odd[0] if odd else f"peft_type: {values.get('peft_type')}"
            raise UserError(
                f"{place}: {what}: a model that is not of jaxpeft reads changes of kernels alone "
                f"by names; of {', '.join(KERNELS)}."
            )

    def reads(self, adapter: Adapter) -> Adapter:
        """An adapter that was read for this base, as one of the model.

        Raises:
            UserError: It has places that are no named kernels.
        """
        self._require_kernels(adapter, [])
        return with_axes(adapter, self.params, self.roles, tied=False)

    def _require_kernels(self, adapter: Adapter, lost: list[str]) -> None:
        kind = KINDS[adapter.spec.kind]
        whole = [
            path
            for path in adapter.spec.paths
            for name in paths.get(adapter.params, path, {})
            if kind.role(name).replaces == "whole"
        ]
        if lost or whole or kind.peft is None or kind.peft.type not in KERNELS:
            raise UserError(
                f"names: {first_few(lost or whole or [kind.name])}: a folder of PEFT by names "
                "holds changes of kernels that are named, and nothing else; leave names out to "
                "save all in a folder of our own."
            )


def named_base(params: Any, roles: Roles, names: Mapping[str, str]) -> NamedBase:
    """The base for PEFT's readers and writers.

    Args:
        params: The parameters, or their shapes.
        roles: What `jaxpeft.describe` found.
        names: By pattern of a path (`jaxpeft.core.paths.path_matches`), the full name of PEFT's
            module, in which "{}" stands for what "*" matched, in order, and "{layer}" for the index
            in a stack of layers.

    Raises:
        UserError: A pattern matches no kernel, a name lacks a place for an index or has one too
            many, or two kernels get the same name.
    """
    base = as_base(params, roles)
    templates: dict[str, str] = {}
    sites: dict[str, paths.Site] = {}
    for pattern, name in names.items():
        found = {
            path: caught
            for path, row in roles.items()
            if (caught := paths.captures(pattern, path)) is not None and row.role == KERNEL
        }
        if not found:
            raise UserError(f"names: {pattern!r} matches no kernel of this model.")
        for path, caught in found.items():
            stack = shape_of(paths.get(base, path))[:-2]
            templates[path] = _filled(name, path, caught, len(stack))
            for layer in range(stack[0]) if stack else [None]:
                full = templates[path].replace(LAYER, str(layer))
                if full in sites:
                    raise UserError(f"names: {full} is the name of {sites[full].path} and {path}.")
                sites[full] = paths.Site(path, layer)
    leaves = {"kernel": sites, "bias": {}, "scale": {}, "embedding": {}}
    tree = paths.NamedTree(base, leaves, biases=base.biases)
    layers = max((site.layer or 0 for site in sites.values()), default=0) + 1
    config = types.SimpleNamespace(num_layers=layers, model_type="")
    return NamedBase(tree, templates, config, roles)


def _filled(name: str, path: str, caught: tuple[str, ...], stack_axes: int) -> str:
    """The name of a module, with what the stars of its pattern matched."""
    wanted = f"{len(caught)} times {{}} for what its pattern matched and {stack_axes} times {LAYER}"
    if stack_axes > 1 or (name.count("{}"), name.count(LAYER)) != (len(caught), stack_axes):
        more = "; PEFT has no names for several stack axes" if stack_axes > 1 else ""
        raise UserError(f"names: {name!r}: {path} needs {wanted}{more}.")
    for part in caught:
        name = name.replace("{}", part, 1)
    return name
