"""Models: where they come from, their tokenizers and templates, and the builtin ones."""
