"""A training run in memory: base, adapter, optimizer and the state that changes.

`jaxpeft.train` drives it. The code is the same for one device and for a mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.config import run_config
from jaxpeft.config.run_config import RunConfig
from jaxpeft.core import paths
from jaxpeft.core.backend import give_back_memory
from jaxpeft.data.batches import eval_batches
from jaxpeft.files.storage import StoragePath, as_path
from jaxpeft.inference.metrics import Sample, count_cut, evaluate_loss, exact_match
from jaxpeft.mesh import layouts, placement, processes
from jaxpeft.mesh.constraints import traced_on
from jaxpeft.methods import summary
from jaxpeft.methods.adapter import Adapter, Label
from jaxpeft.methods.chat_settings import ChatSettings
from jaxpeft.methods.merging import head_is_frozen
from jaxpeft.methods.method import Context
from jaxpeft.methods.registry import KINDS
from jaxpeft.pretrained.adapters import save_adapter
from jaxpeft.pretrained.identity import identity_of
from jaxpeft.pretrained.model import Model
from jaxpeft.pretrained.save import save_model
from jaxpeft.reports import tables
from jaxpeft.training.checks import check_unchanged
from jaxpeft.training.output.result import export_path
from jaxpeft.training.rows import Rows
from jaxpeft.training.start import choose_start, place_start
from jaxpeft.updates.lora_rules import without_a
from jaxpeft.updates.losses import make_lm_loss
from jaxpeft.updates.optimizers import make_optimizer, make_schedule, masked
from jaxpeft.updates.step import TrainState, init_train_state, make_train_step


class Run:
    """One run.

    Attributes:
        config: The config as the user wrote it.
        rows: Its data.
        base: The base model; leaves that full fine-tuning replaces are not held twice.
        state: What training changes.
        notes: Notes about changes since the run was interrupted, and about unknown facts.
        schedule: Learning rate by number of updates.

    The state is initialised for a new adapter; with `restored` its values are arbitrary until
    `restore`. With ``shapes_only`` the base and the state are shapes with shardings: there is a
    step to compile, and nothing is computed.
    """

    def __init__(
        self,
        config: RunConfig,
        base: Model,
        rows: Rows,
        mesh: jax.sharding.Mesh | layouts.Layout,
        *,
        restored: bool = False,
        shapes_only: bool = False,
    ):
        self.config, self.rows = config, rows
        self.layout = layouts.as_layout(mesh, base.config)
        self.output = as_path(config.output_dir)
        self.notes: list[str] = []
        self.schedule = make_schedule(config.optim, rows.steps)
        self._kind = KINDS[config.method.name]
        tx = make_optimizer(config.optim, rows.steps, config.method)
        self.tx = masked(tx, self._trainable)
        context = Context(
            base.config,
            base.module,
            base.tokenizer,
            batches=(self.put(self.batch(step)) for step in range(rows.steps)),
            shapes_only=restored or shapes_only,
            steps=rows.steps,
        )
        keys = jax.random.split(jax.random.key(config.train.seed))
        base, chosen = choose_start(config, base, self.layout, keys[0], context)
        self.base_shapes = jax.eval_shape(lambda params: params, base.params)
        replaced = tuple(paths.flatten(self.base_shapes)) if self._kind.replaces_base else ()
        self.base = dataclasses.replace(base, params=paths.without(base.params, replaced))
        names = {"base_name": Label(base.name), "base_revision": Label(base.revision)}
        names["chat"] = self.chat_settings().label()

        def first_state(params: dict, keys: jax.Array, chosen: Adapter | None) -> TrainState:
            adapter = config.method.init(params, keys[0], context) if chosen is None else chosen
            adapter, kept = dataclasses.replace(adapter, **names), paths.without(params, replaced)
            return init_train_state(kept, adapter, self.tx, keys[1])

        self.state, self.shardings = place_start(
            first_state,
            self.layout,
            self._kind.arrays,
            base.params,
            keys,
            chosen,
            shapes_only=shapes_only,
        )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The base's identity apart from its weights, as JSON values."""
        return identity_of(self.base.config, self.base.tokenizer).to_values()

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of devices."""
        return self.layout.mesh

    def batch(self, step: int) -> dict:
        """This process's part of a training batch, see `put`."""
        return self.rows.plan.batch(step, placement.process_rows(self.mesh, self.batch_size))

    @property
    def batch_size(self) -> int:
        """Sequences of a training batch."""
        return self.config.train.batch_size

    def put(self, batch: dict) -> dict:
        """A training batch on the mesh, rows split over data and fsdp."""
        return placement.put_batch(batch, self.mesh, self.batch_size)

    def model(self) -> Model:
        """The base, with the current values of leaves that are trained."""
        return dataclasses.replace(self.base, params=self.state.base(self.base.params))

    def make_step(self) -> Callable:
        """The training step, not yet compiled: ``step(state, params, batch)``."""
        train = self.config.train
        module = self.base.module.clone(remat=train.remat)
        return make_train_step(
            make_lm_loss(
                module,
                head_frozen=self.head_frozen,
                dropout=self.config.method.drops,
                penalty=self.config.method.penalty,
            ),
            self.tx,
            microbatches=train.batch_size // (train.microbatch_size or train.batch_size),
            state_shardings=self.shardings,
            watch_gradients=True,
        )

    def compile_step(self, run: Callable[[Callable], Any] = lambda compile_: compile_()) -> Any:
        """Compiles the training step once, for the one shape of all batches.

        Args:
            run: Calls the compilation, perhaps in a thread.

        Returns:
            ``step(state, params, batch) -> (state, metrics)``.
        """
        step: Any = self.make_step()
        with traced_on(self.layout):
            lowered = step.lower(*self.step_arguments())
        compiled = run(lowered.compile)
        give_back_memory()
        return compiled

    def step_arguments(self) -> tuple[TrainState, dict, dict]:
        """State, parameters, and the shapes of a batch, for which the step is compiled."""
        where = placement.batch_sharding(self.mesh)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            self.rows.plan.batch(0),
        )
        return self.state, self.base.params, batch

    @property
    def head_frozen(self) -> bool:
        """Whether no weight of the head is trained, so that the loss omits its gradient."""
        return head_is_frozen(self.base.params, self.state.adapter, self.state.trained["base"])

    def evaluate(self) -> tuple[dict[str, float], list[Sample]]:
        """Metrics of the current model, and its answers if exact match is requested."""
        section, examples = self.config.evaluation, self.rows.eval_examples
        assert examples is not None
        model, adapter = self.model(), self.state.adapter
        batches = eval_batches(
            examples,
            batch_size=section.batch_size,
            max_length=self.config.data.max_length,
            packing=self.config.data.packing,
            pad_id=model.config.pad_token_id,
            rows=placement.process_rows(self.mesh, section.batch_size),
        )
        put = functools.partial(placement.put_batch, mesh=self.mesh, batch_size=section.batch_size)
        with traced_on(self.layout):
            metrics, samples = evaluate_loss(model, batches, adapter, put=put), []
            if section.exact_match:
                metrics["eval_exact_match"], samples = exact_match(
                    model,
                    self.rows.questions,
                    adapter,
                    max_new_tokens=section.max_new_tokens,
                    batch_size=4 * section.batch_size,
                )
                metrics |= count_cut(samples)
        return metrics, samples

    def chat_settings(self) -> ChatSettings:
        """The chat settings of the training, which generation with the adapter needs."""
        section = self.config.data
        changed = {
            field.name: getattr(section, field.name)
            for field in dataclasses.fields(section)
            if field.name in ("learn", "end_of_turn", "special_tokens_in_content")
            and getattr(section, field.name) != field.default
        }
        tokenizer = self.base.tokenizer  # None where only shapes are known
        overridden = self.config.model.chat_template is not None
        return ChatSettings(
            template=tokenizer.chat_template if tokenizer is not None and overridden else "",
            arguments=dict(section.chat_template_kwargs),
            stop_ids=self.rows.stop_ids,
            **changed,
        )

    def save(self, checkpoints: Checkpoints, metrics: dict[str, float] | None = None) -> None:
        """Starts saving. The "best" metric is stored so that lower is better."""
        metric, best = None, self.config.checkpoint.best
        if best and metrics:
            lower_is_better = best in ("eval_loss", "eval_perplexity")
            metric = metrics[best] if lower_is_better else -metrics[best]
        meta = {
            "config": run_config.to_yaml(self.config),
            "config_hash": run_config.config_hash(self.config),
            "data_hash": self.rows.plan.hash,
            "steps": self.rows.steps,
            "base": self.base.fingerprint,
            "identity": self.identity,
        }
        checkpoints.save(int(self.state.step), leaves(self.state), meta=meta, metric=metric)

    def restore(self, checkpoints: Checkpoints, step: int) -> None:
        """Restores the state of a checkpoint.

        Raises:
            UserError: The base is not the one that the run began with.
        """
        saved = checkpoints.meta(step)["base"]
        check_unchanged("base weights", saved, self.base.fingerprint, self.output)
        like = placement.placed_shapes(self.state, self.shardings)
        restored = checkpoints.restore(step, like=leaves(like))
        order = [restored[name] for name in leaves(self.state)]
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), order)

    def export(self, checkpoints: Checkpoints) -> StoragePath:
        """Writes the result: the best state if the config asks for it, else the last.

        Returns:
            ``adapter/``, an HF PEFT folder, or ``model/``, a whole HF model, if leaves of the base
            were trained.
        """
        if self.config.checkpoint.best and (best := checkpoints.best()) is not None:
            self.restore(checkpoints, best)
        place, model, adapter = export_path(self.config), self.model(), self.state.adapter
        if place.name == "model":
            dtype = self.config.model.dtype
            save_model(str(place), model, adapter=adapter, dtype=dtype, overwrite=True)
        else:
            adapter = jax.tree.map(processes.whole, adapter)
            processes.together(lambda: save_adapter(str(place), adapter, model))
        return place

    def describe(self) -> tuple[list[tuple[str, str]], list[Any]]:
        """The facts and adapted modules for the table at the start."""
        config, plan = self.config, self.rows.plan
        adapter = self.state.adapter
        trained = self.config.method.trainable(adapter.params)
        extra = sum(leaf.size for leaf in jax.tree.leaves(self.state.trained["base"]))
        rows = tables.describe_run(
            trainable=summary.count_trainable(adapter, trained) + extra,
            base_parameters=summary.count_parameters(self.base_shapes),
            dtypes={
                "base": config.model.dtype,
                "compute": self.base.module.compute_dtype,
                "adapter": "float32",
            },
            tokens_per_epoch=plan.tokens_per_epoch,
            supervised_per_epoch=plan.supervised_tokens_per_epoch,
            rows=self.rows.train_rows,
            examples=self.rows.train_examples,
            steps=self.rows.steps,
            epochs=self.rows.steps * plan.batch_size / plan.num_sequences,
            first_step=int(self.state.step),
            batch_size=plan.batch_size,
            microbatch_size=config.train.microbatch_size,
            seq_len=plan.seq_len,
            mesh=dict(self.mesh.shape),
            dropped=self.rows.dropped,
            truncated=self.rows.truncated,
            replicated=placement.unsharded(self.base_shapes, self.layout),
        )
        rows.insert(0, ("model", f"{config.model.path} ({self.base.config.model_type})"))
        rows.insert(1, ("method", str(config.method)))
        if config.optim.trainable:
            rows.append(("base leaves trained", ", ".join(config.optim.trainable)))
        if self.rows.shared:
            total = len(self.rows.eval_examples or ())
            rows.append(("note", f"{self.rows.shared} of {total} rows of data.eval are trained on"))
        rows += [("note", note) for note in self.rows.notes]
        return rows, summary.describe_adapter(self.base_shapes, adapter, trained)

    def _trainable(self, tree: dict) -> dict:
        """The label tree over base and adapter: the adapter and leaves that the config names."""
        patterns, on = self.config.optim.trainable, self.config.method.trainable(tree["adapter"])
        return {
            "base": paths.unflatten(
                {path: paths.ends_in(path, patterns) for path in paths.flatten(tree["base"])}
            ),
            "adapter": without_a(on, self._kind) if self.config.optim.lora_fa else on,
        }


def leaves(tree: Any) -> dict[str, Any]:
    """All leaves of a tree by a readable name, in the order of the tree.

    Checkpoints hold a state under these names, whatever the classes of its nodes are called.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}
