"""Names of settings in PEFT, TRL and the Hugging Face Trainer, and the names they have here.

A config that uses one of these names gets an error that says which name to use instead. An empty
path means that there is no such setting here; the remark then says why, or what to do instead.
"""

from typing import NamedTuple


class Foreign(NamedTuple):
    """A setting of another library.

    Attributes:
        library: The library that uses the name.
        path: The dotted path of the setting here, or "" if there is none.
        remark: What differs, or what to do instead.
    """

    library: str
    path: str
    remark: str = ""

    def whose(self, name: str) -> str:
        """The name with its library, such as ``PEFT's r``."""
        return f"{self.library}'s {name}" if self.library else f'"{name}"'

    def ours(self, name: str, path: str) -> str:
        """The error text: the key is unknown, and the setting is called `path` here."""
        remark = f" ({self.remark})" if self.remark else ""
        return f'unknown key, {self.whose(name)} is "{path}" here{remark}'


_PEFT = {
    "r": ("method.rank",),
    "lora_r": ("method.rank",),
    "lora_rank": ("method.rank",),
    "lora_alpha": ("method.alpha",),
    "lora_dropout": ("method.dropout",),
    "target_modules": ("method.targets",),
    "lora_target_modules": ("method.targets",),
    "lora_target": ("method.targets",),
    "exclude_modules": ("method.exclude",),
    "use_rslora": ("method.rslora",),
    "peft_type": ("method.name",),
    "peft_config": ("method.name", "the section is called method"),
    "lora": ("method.name", "write method: {name: lora, rank: 8}"),
    "adapter": ("method.name", "the section is called method"),
    "task_type": ("", "every model here is a causal language model; drop the key"),
    "bias": ("method.bias", "with name: lora, all or lora_only; biases alone: name: bitfit"),
    "layers_to_transform": ("method.layers", "with name: lora; others take a regex as targets"),
    "modules_to_save": ("method.save_modules",),
    "trainable_token_indices": ("method.token_ids", "of the head: head_token_ids"),
    "token_indices": ("method.token_ids",),
    "init_lora_weights": ("method.init_weights",),
    "use_dora": ("method.dora",),
    "fan_in_fan_out": ("", "kernels always are (in, out) here; drop the key"),
    "inference_mode": ("", "adapters are always ready to train; drop the key"),
    "base_model_name_or_path": ("model.path",),
    "load_in_4bit": ("model.quantization",),
    "load_in_8bit": ("model.quantization",),
    "bnb_4bit_quant_type": ("model.quantization",),
    "bnb_4bit_compute_dtype": ("model.compute_dtype",),
    "quantization_config": ("model.quantization",),
}

_ACCUMULATION = (
    "batch_size counts the sequences of one update over all devices; "
    "microbatch_size those that are computed at once"
)

_TRAINER = {
    "model_name_or_path": ("model.path",),
    "model_name": ("model.path",),
    "model_id": ("model.path",),
    "model_revision": ("model.revision",),
    "base_model": ("model.path",),
    "torch_dtype": ("model.dtype",),
    "bf16": ("model.dtype", "dtype: bfloat16 stores the base so; model.compute_dtype: computes"),
    "fp16": ("model.dtype", "bfloat16 and float32 are supported"),
    "tf32": ("", "jax's default matmul precision is used; drop the key"),
    "trust_remote_code": ("", "no code is ever run from a model folder; drop the key"),
    "attn_implementation": ("", "attention picks its own implementation; drop the key"),
    "use_flash_attention_2": ("", "attention picks its own implementation; drop the key"),
    "dataset_name": ("data.train", "a jsonl or json file of rows"),
    "dataset": ("data.train", "a jsonl or json file of rows"),
    "datasets": ("data.train", "a jsonl or json file of rows"),
    "train_file": ("data.train",),
    "train_dataset": ("data.train",),
    "train_data": ("data.train",),
    "validation_file": ("data.eval",),
    "eval_file": ("data.eval",),
    "eval_dataset": ("data.eval",),
    "eval_data": ("data.eval",),
    "test_file": ("data.eval",),
    "max_seq_length": ("data.max_length", "in tokens"),
    "max_seq_len": ("data.max_length", "in tokens"),
    "sequence_len": ("data.max_length", "in tokens"),
    "seq_length": ("data.max_length", "in tokens"),
    "cutoff_len": ("data.max_length", "in tokens; rows that are longer: data.on_long"),
    "sample_packing": ("data.packing",),
    "dataset_num_proc": ("data.workers",),
    "dataloader_num_workers": ("data.workers",),
    "preprocessing_num_workers": ("data.workers",),
    "completion_only_loss": ("data.learn", "false is all, for prompts and completions of text"),
    "assistant_only_loss": ("data.learn", "assistant, the default: messages learn nothing else"),
    "train_on_inputs": ("data.learn", "all, for prompts and completions of text"),
    "train_on_input": ("data.learn", "all, for prompts and completions of text"),
    "train_on_prompt": ("data.learn", "all, for prompts and completions of text"),
    "mask_history": ("data.learn", "last_message learns the last answer alone"),
    "roles_to_train": ("data.learn", "assistant turns are learned; weight: 0 leaves one out"),
    "train_on_eos": ("data.end_of_turn", "the token that ends a turn is always learned"),
    "enable_thinking": ("data.chat_template_kwargs", "write {enable_thinking: false}"),
    "dataset_text_field": ("", 'the row format is fixed: rename the field to "text"'),
    "chat_template_path": ("model.chat_template", "a file; null is the tokenizer's own template"),
    "chat_template_jinja": ("model.chat_template", "a file that holds the template"),
    "lr": ("optim.learning_rate",),
    "optimizer": ("optim.name",),
    "optim_name": ("optim.name",),
    "lr_scheduler_type": ("optim.schedule", "constant, linear or cosine"),
    "lr_scheduler": ("optim.schedule", "constant, linear or cosine"),
    "warmup_ratio": ("optim.warmup_steps", "a number of steps: the ratio times train.steps"),
    "warmup": ("optim.warmup_steps", "a number of steps"),
    "max_grad_norm": ("optim.clip_norm",),
    "gradient_clipping": ("optim.clip_norm",),
    "adam_beta1": ("optim.b1",),
    "adam_beta2": ("optim.b2",),
    "beta1": ("optim.b1",),
    "beta2": ("optim.b2",),
    "max_steps": ("train.steps",),
    "num_steps": ("train.steps",),
    "num_train_steps": ("train.steps",),
    "total_steps": ("train.steps",),
    "num_train_epochs": ("train.epochs", "give steps or epochs, not both"),
    "num_epochs": ("train.epochs", "give steps or epochs, not both"),
    "per_device_train_batch_size": ("train.batch_size", _ACCUMULATION),
    "train_batch_size": ("train.batch_size", _ACCUMULATION),
    "micro_batch_size": ("train.microbatch_size", _ACCUMULATION),
    "gradient_accumulation_steps": ("train.microbatch_size", _ACCUMULATION),
    "accumulation_steps": ("train.microbatch_size", _ACCUMULATION),
    "auto_find_batch_size": ("train.microbatch_size", "choose it yourself"),
    "gradient_checkpointing": ("train.remat", "none, dots or full"),
    "data_seed": ("train.seed",),
    "per_device_eval_batch_size": ("evaluation.batch_size",),
    "eval_batch_size": ("evaluation.batch_size",),
    "eval_steps": ("evaluation.every", "in steps"),
    "eval_strategy": ("evaluation.every", "in steps; it also runs at the start and the end"),
    "evaluation_strategy": ("evaluation.every", "in steps; it also runs at the start and the end"),
    "do_eval": ("data.eval", "evaluation runs when this file is given"),
    "do_train": ("", "the command trains; drop the key"),
    "max_eval_samples": ("evaluation.max_rows",),
    "save_steps": ("checkpoint.every", "in steps"),
    "save_strategy": ("checkpoint.every", "in steps"),
    "save_total_limit": ("checkpoint.keep",),
    "load_best_model_at_end": ("checkpoint.best", "the metric to choose by, e.g. eval_loss"),
    "metric_for_best_model": ("checkpoint.best", "e.g. eval_loss"),
    "resume_from_checkpoint": ("", "the same command resumes by itself; --resume never: not"),
    "overwrite_output_dir": ("", "give --overwrite on the command line"),
    "logging_steps": ("", "every step is written to metrics.jsonl; drop the key"),
    "logging_dir": ("output_dir", "logs go there"),
    "report_to": ("track.tensorboard", "or track.wandb: the project's name"),
    "wandb_project": ("track.wandb",),
    "run_name": ("output_dir", "a run is called by its folder"),
    "fsdp_config": ("mesh.fsdp", "the number of devices the base is spread over"),
    "tensor_parallel_size": ("mesh.tensor",),
    "deepspeed": ("mesh.fsdp", "the number of devices the base is spread over"),
    "push_to_hub": ("", "nothing is uploaded"),
    "hub_model_id": ("", "nothing is uploaded"),
}

_SECTIONS = {
    "training": ("train", "the section's name"),
    "trainer": ("train", "the section's name"),
    "training_args": ("train", "the section's name"),
    "optimization": ("optim", "the section's name"),
    "validation": ("evaluation", "the section's name; the file of rows is data.eval"),
    "checkpoints": ("checkpoint", "the section's name"),
    "checkpointing": ("checkpoint", "the section's name"),
    "sharding": ("mesh", "the section's name"),
    "logging": ("track", "the section's name"),
}

FOREIGN: dict[str, Foreign] = {
    **{name: Foreign("PEFT", *rest) for name, rest in _PEFT.items()},
    **{name: Foreign("Hugging Face", *rest) for name, rest in _TRAINER.items()},
    **{name: Foreign("", *rest) for name, rest in _SECTIONS.items()},
}

ELSEWHERE: dict[str, Foreign] = {
    path.partition(".")[2]: Foreign("", path)
    for path in (
        *(
            f"optim.{name}"
            for name in ("learning_rate", "schedule", "warmup_steps", "weight_decay")
        ),
        *(f"train.{name}" for name in ("steps", "epochs", "batch_size", "seed")),
        *(f"data.{name}" for name in ("max_length", "packing")),
    )
}
"""Keys of other sections that people often give to a method; the answer names their section."""


_FOUR = "write nf4 (or int4: whole numbers)"
_EIGHT = "write int8"
_NOT_READ = "such weights are not read: give the plain model; nf4, int4 or int8 round it here"
_HALF = "float16 overflows in training; write bfloat16, which is as small"
_QUANTIZATION = {
    **dict.fromkeys(("4bit", "4-bit", "4", "fp4", "qlora", "true", "load-in-4bit", "q4"), _FOUR),
    **dict.fromkeys(("bnb", "bitsandbytes", "bnb-4bit", "bnb-nf4", "bitsandbytes-nf4"), _FOUR),
    **dict.fromkeys(("8bit", "8-bit", "8", "load-in-8bit", "bnb-8bit", "q8", "llm-int8"), _EIGHT),
    **dict.fromkeys(("gptq", "awq", "aqlm", "hqq", "fp8", "eetq", "quanto", "torchao"), _NOT_READ),
    **dict.fromkeys(("none", "no", "false", "16", "16bit", "16-bit", "off"), "write null"),
}
_DTYPE = {
    **dict.fromkeys(("bf16", "torch.bfloat16", "bfloat"), "write bfloat16"),
    **dict.fromkeys(("fp32", "f32", "float", "torch.float32", "32"), "write float32"),
    **dict.fromkeys(("fp16", "f16", "half", "float16", "torch.float16", "16"), _HALF),
}
VALUES = {
    "model.quantization": _QUANTIZATION,
    "model.dtype": _DTYPE | {"auto": "write float32 or bfloat16"},
    "model.compute_dtype": _DTYPE,
    "optim.name": {
        **dict.fromkeys(("adam", "adamw-torch", "adamw-torch-fused", "adamw-hf"), "write adamw"),
        **dict.fromkeys(
            ("adamw-8bit", "adamw-bnb-8bit", "paged-adamw-8bit", "paged-adamw-32bit"),
            "write adamw; its states are float32 here, and only what is trained has any",
        ),
    },
    "optim.schedule": {
        "constant-with-warmup": "write constant, with optim.warmup_steps",
        "cosine-with-restarts": "write cosine; there are no restarts here",
        "cosine-with-min-lr": "write cosine",
        "polynomial": "write linear",
    },
    "train.remat": {"true": "write full", "false": "write none", "on": "write full"},
}
"""Values that other libraries use for our keys (in lower case, with "-"), and our values."""


def quantization_advice(kind: str) -> str:
    """A hint "; ..." if another library uses this name for a quantisation; else ""."""
    known = _QUANTIZATION.get(kind.strip().lower().replace("_", "-"))
    return f"; {known.replace('write null', 'leave it out')}" if known else ""


def dtype_advice(dtype: str) -> str:
    """A hint "; ..." if another library uses this name for a dtype of weights; else ""."""
    known = _DTYPE.get(str(dtype).strip().lower())
    return f"; {'write float16' if known == _HALF else known}" if known else ""
