"""Arguments that all commands ``python -m jaxpeft.VERB`` share, and overrides of config keys."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jaxpeft.cli.exits import note_command
from jaxpeft.config.flags import take_flag
from jaxpeft.config.schema import Schema, describe
from jaxpeft.core import limits, notes
from jaxpeft.core.errors import UserError, nearest

if TYPE_CHECKING:  # --help must not import JAX
    from jaxpeft.methods.adapter import Adapter
    from jaxpeft.pretrained.model import Model
else:
    Adapter = Model = Any


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the reading of arguments; argparse calls it.

        Raises:
            UserError: Always, with `message`.
        """
        raise UserError(f"{message}; see {self.prog} --help")


def make_parser(verb: str, description: str, schema: Schema | None = None) -> Parser:
    """A parser for ``python -m jaxpeft.VERB``.

    Args:
        verb: The module's name.
        description: What the command does.
        schema: If given, ``--help`` lists the config's keys.
    """
    note_command(verb)
    keys = f"keys of CONFIG that may follow:\n{describe(schema)}" if schema else None
    return Parser(
        prog=f"python -m jaxpeft.{verb}",
        description=description,
        epilog=keys,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_compilation_cache(parser: Parser) -> None:
    """Adds the flag that `keep_compiled` reads."""
    parser.add_argument(
        "--no_compilation_cache",
        action="store_true",
        help="compile anew; else compiled programs are kept in ~/.cache/jaxpeft",
    )


def keep_compiled(args: argparse.Namespace) -> None:
    """Lets JAX reuse programs that an earlier process compiled, unless a flag turns that off.

    They are stored in JAX_COMPILATION_CACHE_DIR, by default in ``jaxpeft/compiled`` of the user's
    cache folder. Programs that compiled in less than a second are not stored.
    """
    import jax

    if args.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "jaxpeft" / "compiled"))


def add_base(parser: Parser) -> None:
    """Adds the flags that say which base model to load, for `load_base`."""
    parser.add_argument("--model", required=True, help="HF folder, hub id or GGUF file")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", default="float32", help="dtype of the base")
    add_chat_template(parser)
    parser.add_argument("--quantization", help="nf4, int4 or int8 for the kernels of its layers")
    parser.add_argument(
        "--double_quantization", action="store_true", help="quantise their scales too"
    )
    add_compilation_cache(parser)


def load_base(args: argparse.Namespace) -> Model:
    """Loads the base that the flags of `add_base` name."""
    from jaxpeft.pretrained.chat_template import override_template
    from jaxpeft.pretrained.load import load_model

    keep_compiled(args)
    template = chat_template(args)
    base = load_model(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        quantization=args.quantization,
        double_quantization=args.double_quantization,
    )
    return base.replace(tokenizer=override_template(base.tokenizer, template))


def add_chat_template(parser: Parser) -> None:
    """Adds the flag for a chat template in place of the model's and the adapter's."""
    parser.add_argument(
        "--chat_template",
        metavar="FILE",
        help="a Jinja template, in place of the model's or the adapter's",
    )


def chat_template(args: argparse.Namespace) -> str:
    """The text of the file that ``--chat_template`` names; "" without the flag."""
    from jaxpeft.pretrained.chat_template import read_template

    return (
        "" if args.chat_template is None else read_template(args.chat_template, "--chat_template")
    )


def load_adapter(args: argparse.Namespace, path: str, base: Model) -> Adapter:
    """Loads an adapter for a base, with the chat template that a flag may name.

    Notes about facts that cannot be checked are printed on standard error.

    Raises:
        UserError: The folder is no adapter of this base, or the template cannot be read.
    """
    from jaxpeft.pretrained import adapters
    from jaxpeft.pretrained.chat_template import override_in_adapter

    adapter = adapters.load_adapter(path, base)
    for text in adapters.notes_of(path, adapter, base):
        notes.note(text)
    return override_in_adapter(adapter, chat_template(args))


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str], schema: Schema | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line, and separates config overrides from other arguments.

    Args:
        parser: The parser of the command's own options.
        argv: The arguments after the command.
        schema: The config's keys; without it there are no overrides.

    Returns:
        The parser's namespace, and the overrides for `jaxpeft.config.run_config.load_config`.

    Raises:
        UserError: An option is unknown; the message names the nearest known one.
    """
    own = list(parser._option_string_actions)
    plain = {key.path for key in schema.keys if "." not in key.path} if schema else set()
    rest, overrides, problems = [], [], []
    todo = list(argv)
    while todo:
        flag = todo[0].partition("=")[0]
        name = flag[2:]
        if todo[0] == "--":
            rest += todo
            break
        if not flag.startswith("--") or flag in own:
            rest.append(todo.pop(0))
        elif schema is not None and ("." in name or name in plain or name in schema.sections()):
            try:
                overrides.append("=".join(take_flag(todo)))
            except UserError as error:
                problems.append(str(error))
        else:
            problems.append(f"{flag}: {_explain(name, own, schema)}")
            todo.pop(0)
    if problems:
        raise UserError("\n".join(problems))
    found = parser.parse_args(rest)
    for name, value in vars(found).items():
        if text := limits.exceeds(name, value):
            raise UserError(f"--{name} {text}")
    return found, overrides


def _explain(name: str, own: list[str], schema: Schema | None) -> str:
    """The error text for an unknown option."""
    known = [flag for flag in own if flag.startswith("--")]
    if schema is not None:
        leaf = name.replace("-", "_")
        paths = [key.path for key in schema.keys if key.path.rpartition(".")[2] == leaf]
        if paths:
            return f"unknown option, write {' or '.join('--' + p for p in dict.fromkeys(paths))}"
        if leaf in schema.foreign:
            return schema.explain("", leaf, [])
        known += [f"--{key.path}" for key in schema.keys]
    close = nearest(f"--{name}", known, 1)
    return f"unknown option, did you mean {close[0]}?" if close else "unknown option; see --help"
