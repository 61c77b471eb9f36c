"""The three tables and the tokenizer store: their formats, files and identities."""
