"""What a model is on disk: names, downloads, conversion, tokenizer, chat template, fingerprint."""
