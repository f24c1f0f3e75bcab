"""Trainable tokens: only the embeddings of a few tokens are trained.

The rows ``token_ids`` of the embedding table are replaced by trained ones, see
`jaxpeft.methods.leaves.token_rows`. This suits tokens that were added, or that are to get a new
meaning. The head of a tied model is the table and uses the trained rows too; a separate head uses
them only if it is a target.

Reference:
    HF PEFT 0.21, ``tuners/trainable_tokens``.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.family import Kind
from jaxpeft.methods.leaves import token_rows
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import contiguous, require_finite
from jaxpeft.methods.peft.patterns import keep_names
from jaxpeft.methods.peft.values import PREFIX, PeftFormat, Tensors, Values

DEFAULT_TARGETS = ("embed_tokens",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Which tokens are trained.

    Attributes:
        token_ids: Ids of the tokens, each one once.
        targets: The weights with trained rows: names, or a regex matched in full, as in PEFT.
            ``embed_tokens`` is the embedding table, ``lm_head`` a head that is not tied to it. In
            other models, the table by default, or the names of tables and kernels.
    """

    name: ClassVar[str] = "trainable_tokens"

    token_ids: tuple[int, ...]
    targets: str | tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self):
        ids = token_rows.check_ids("TrainableTokens.token_ids", self.token_ids)
        object.__setattr__(self, "token_ids", ids)
        keep_names(self, "targets")
        if not self.targets or self.targets == paths.ALL_LINEAR:
            raise ValueError(
                f"TrainableTokens.targets must be embed_tokens or lm_head, got {self.targets!r}."
            )

    def check_any_model(self) -> None:
        """It can: tokens are rows of a table, or columns of a kernel."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """Copies the base's rows; `key` and `context` are not used.

        Args:
            params: Base parameters.
            key: Not used.
            context: Not used.

        Returns:
            An adapter that leaves the model's function unchanged.

        Raises:
            UserError: If an id is beyond the vocabulary, or a target is missing.
        """
        del key, context
        if isinstance(params, paths.NamedTree) and self.targets == DEFAULT_TARGETS:
            places = [paths.table_of(params)]
        else:
            chosen = paths.match(self.targets, (), _sites(params), what="embedding table or head")
            places = sorted(site.path for site in chosen.values())
        trained, frozen = {}, {}
        for path in places:
            trained[path], frozen[path] = token_rows.start(
                params, path, self.token_ids, "TrainableTokens.token_ids"
            )
        spec = Spec(kind=self.name, paths=tuple(places))
        return Adapter(paths.unflatten(trained), paths.unflatten(frozen), spec)


def _sites(params: dict) -> dict[str, paths.Site]:
    """The modules whose rows can be trained, by name."""
    if isinstance(params, paths.NamedTree):
        kernels = paths.module_names(params)
        return paths.module_names(params, "embedding") | {
            name: site for name, site in kernels.items() if not site.row.stacked
        }
    return {
        paths.module_name(path): paths.Site(path, None)
        for path in token_rows.PLACES
        if paths.get(params, path) is not None
    }


def config_of(adapter: Adapter) -> TrainableTokens:
    """The config of an adapter; targets come back as full names."""
    first, *_ = adapter.spec.paths
    return TrainableTokens(
        token_ids=token_rows.ids_of(adapter, first),
        targets=tuple(paths.module_name(path) for path in adapter.spec.paths),
    )


# HF PEFT.


def config_from_peft(values: Values) -> TrainableTokens:
    """Reads PEFT's config; see `PeftFormat`."""
    return TrainableTokens(
        token_ids=values.ints("token_indices") or (),
        targets=values.selection(DEFAULT_TARGETS).targets,
    )


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads an adapter from PEFT's config and tensors; see `PeftFormat`.

    For a tied model PEFT stores the rows a second time, for the head; the two must be the same.

    Raises:
        UserError: The token ids are wrong, the two differ, or only the head of a tied model is
            named.
    """
    try:
        ids = token_rows.check_ids("token_indices", values.ints("token_indices"))
    except ValueError as error:
        raise UserError(f"{values.file}: {error}") from None
    token_rows.require_known(ids, base.config.vocab_size, f"{values.file}: token_indices")
    selection, head = values.selection(DEFAULT_TARGETS), paths.module_name(paths.HEAD)
    sites, tied = _sites(base.params), paths.get(base.params, paths.HEAD) is None
    if tied and selection.selects(head) and not any(map(selection.selects, sites)):
        raise UserError(
            f"{values.file}: target_modules: tokens of a tied head alone are not supported."
        )
    chosen = selection.select(sites, values.file)
    shape = (len(ids), base.config.d_model)
    names = [*chosen, head] if tied else [*chosen]
    tensors.require({_key(name): shape for name in names}, base.name)
    trained, frozen = {}, {}
    for name, site in chosen.items():
        trained[site.path] = {"rows": jnp.array(tensors.read(_key(name)))}
        frozen[site.path] = {"ids": jnp.array(ids, jnp.int32), "rank": jnp.ones((), jnp.int32)}
    stored = [tensors.raw(_key(name)) for name in names]
    if tied and not np.array_equal(stored[0], stored[1]):
        raise UserError(
            f"{tensors.file}: {head} has other rows than the embedding table, and this base "
            "ties the two; the adapter was made for another model."
        )
    spec = Spec(kind=TrainableTokens.name, paths=tuple(sorted(trained)))
    return Adapter(paths.unflatten(trained), paths.unflatten(frozen), spec)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    tensors, config = {}, config_of(adapter)
    for name, path in zip(config.targets, adapter.spec.paths, strict=True):
        rows = paths.get(adapter.params, f"{path}/rows")
        require_finite(name, rows)
        tensors[_key(name)] = contiguous(rows)
        if paths.get(base.params, paths.HEAD) is None:
            tensors[_key(paths.module_name(paths.HEAD))] = contiguous(rows)
    values = {
        "target_modules": sorted(config.targets),
        "token_indices": list(config.token_ids),
    }
    return values, tensors


def _key(name: str) -> str:
    return f"{PREFIX}{name}.trainable_tokens_delta"


PEFT = PeftFormat(
    type="TRAINABLE_TOKENS",
    title="Trained tokens",
    defaults={"init_weights": True, "target_modules": None, "token_indices": []},
    read_keys=("target_modules", "token_indices"),
    harmless_keys=("init_weights",),
    read=read,
    write=write,
    config=config_from_peft,
)

KIND = Kind(
    config=TrainableTokens,
    bind=token_rows.bind,
    config_of=config_of,
    arrays=token_rows.ARRAYS,
    compared=token_rows.COMPARED,
    check=token_rows.check,
    peft=PEFT,
)
