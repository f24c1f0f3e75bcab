"""Merges an adapter into its base and writes a model that transformers loads.

Command: ``python -m jaxpeft.merge --model PATH --adapter DIR --output DIR``
"""

from jaxpeft import cli


def main(argv: list[str]) -> None:
    """Writes the merged model and says where."""
    parser = cli.make_parser("merge", "Writes base and adapter as one Hugging Face model.")
    parser.add_argument("--model", required=True, help="HF folder, hub id or GGUF file")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--dtype", default="float32", help="dtype in which weights are read")
    parser.add_argument("--save_dtype", help="dtype of the merged weights; default: --dtype")
    args, _ = cli.parse_arguments(parser, argv)
    import jaxpeft as jp

    base = jp.load_model(args.model, revision=args.revision, dtype=args.dtype)
    adapter = jp.load_adapter(args.adapter, base)
    jp.save_model(args.output, base, adapter=adapter, dtype=args.save_dtype)
    print(f"{args.output}: the merged model is ready.")


if __name__ == "__main__":
    cli.run(main)
