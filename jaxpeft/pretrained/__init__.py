"""Models, adapters and tokenizers of other people's folders and files, in and out."""
