"""Merges an adapter into its base and writes a model that transformers loads.

Command: ``python -m jaxpeft.merge --model PATH --adapter DIR --output DIR``
"""

from jaxpeft.cli import arguments, exits


def main(argv: list[str]) -> None:
    """Writes the merged model and prints where."""
    parser = arguments.make_parser("merge", "Writes base and adapter as one Hugging Face model.")
    parser.add_argument("--model", required=True, help="HF folder, hub id or GGUF file")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--adapter", required=True, help="adapter folder or hub id")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder there")
    parser.add_argument("--dtype", help="dtype of the merged weights; default: as stored")
    arguments.add_chat_template(parser)
    args, _ = arguments.parse_arguments(parser, argv)
    from jaxpeft.pretrained.load import load_model
    from jaxpeft.pretrained.save import require_place, save_model

    require_place(args.output, overwrite=args.overwrite, source=args.model)
    # Sums are rounded once either way: `merge` computes in float32.
    read_as = None if args.dtype is None else "float32"
    arguments.chat_template(args)  # reports a bad file before the slow load of the model
    base = load_model(args.model, revision=args.revision, dtype=read_as)
    adapter = arguments.load_adapter(args, args.adapter, base)
    save_model(args.output, base, adapter=adapter, dtype=args.dtype, overwrite=args.overwrite)
    print(f"{args.output}: the merged model is ready.")


if __name__ == "__main__":
    exits.run(main)
