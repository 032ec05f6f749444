"""FastLanguageModel and FastModel: loading, adapters, modes, repairs and saving. Importing this loads nothing."""
