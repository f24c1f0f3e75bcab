"""Lists the commands: ``python -m jaxpeft``."""

import ast
import pathlib
import sys

COMMANDS = ("train", "evaluate", "generate", "merge", "plan")


def main(argv: list[str]) -> int:
    """Prints every command with the first line of its module, and how to see its options.

    Args:
        argv: The arguments after ``python -m jaxpeft``.

    Returns:
        The exit code: 0 without arguments or with ``--help``; 2 for anything else, since every
        command is a module of its own.
    """
    if argv and argv[0] not in ("-h", "--help"):
        verb = argv[0] if argv[0] in COMMANDS else "train"
        print(
            f"error: commands are modules, write python -m jaxpeft.{verb}; python -m jaxpeft "
            "lists them",
            file=sys.stderr,
        )
        return 2
    for verb in COMMANDS:
        source = pathlib.Path(__file__).with_name(f"{verb}.py").read_text(encoding="utf-8")
        first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        print(f"python -m jaxpeft.{verb:9} {first}")
    print("Add --help to a command for its options.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
