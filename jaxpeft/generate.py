"""Answers prompts with a model and, if given, an adapter.

Command: ``python -m jaxpeft.generate --model PATH [--adapter DIR] PROMPT [PROMPT ...]``
"""

from jaxpeft.cli import arguments, exits, huge_pages

if __name__ == "__main__":  # before heavy imports, because it restarts the program
    huge_pages.enable_huge_pages()

from jaxpeft.cli import inputs
from jaxpeft.core.errors import UserError


def main(argv: list[str]) -> None:
    """Prints the answer to every prompt, in order.

    Raises:
        UserError: An argument, the model or the adapter is wrong, or there is no prompt.
    """
    parser = arguments.make_parser("generate", "Answers prompts with a base model and an adapter.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text; - reads lines")
    arguments.add_base(parser)
    parser.add_argument("--adapter", help="adapter folder or hub id")
    parser.add_argument("--system", help="system message in front of every prompt")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools that may be called")
    parser.add_argument("--documents", metavar="FILE", help="JSON list of documents to read")
    parser.add_argument(
        "--chat_template_kwargs",
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--raw", action="store_true", help="continue the text, no chat template")
    parser.add_argument("--task", type=int, default=0, help="of an adapter for several tasks")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="0 is off")
    parser.add_argument("--top_p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts answered at once")
    args, _ = arguments.parse_arguments(parser, argv)
    for name in ("system", "tools", "documents", "chat_template", "chat_template_kwargs"):
        if args.raw and getattr(args, name) is not None:
            raise UserError(f"--{name} needs the chat template; leave out --raw or --{name}.")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2**32), got {args.seed}.")
    texts = [
        line
        for prompt in args.prompts
        for line in (inputs.read_lines() if prompt == "-" else [prompt])
        if line.strip()
    ]
    named = [(f"prompt {number}", text) for number, text in enumerate(texts, 1)]
    for name, text in [*named, ("--system", args.system or "")]:
        inputs.require_text(name, text)
    if not texts:
        raise UserError("no prompt: every line is empty.")
    beside = {
        "tools": args.tools and inputs.read_objects("--tools", args.tools),
        "documents": args.documents and inputs.read_objects("--documents", args.documents),
        "chat_template_kwargs": args.chat_template_kwargs
        and inputs.parse_object("--chat_template_kwargs", args.chat_template_kwargs),
    }
    import jax

    from jaxpeft.inference.chat_prompts import tokenizer_of
    from jaxpeft.inference.decoding import generate

    base = arguments.load_base(args)
    adapter = arguments.load_adapter(args, args.adapter, base) if args.adapter else None
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    if not args.raw and not tokenizer_of(base, adapter).chat_template:
        raise UserError(f"{args.model}: has no chat template; add --raw to continue the text.")
    answers = generate(
        base,
        texts if args.raw else [[*system, {"role": "user", "content": text}] for text in texts],
        adapter=adapter,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        key=jax.random.key(args.seed),
        batch_size=args.batch_size,
        task=args.task,
        **beside,
    )
    for answer in answers:
        print(answer)


if __name__ == "__main__":
    exits.run(main)
