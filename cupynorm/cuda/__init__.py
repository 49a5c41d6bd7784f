"""The CuPy backend. Importing it needs CuPy and a driver; its parts plan, source and launch need neither."""
