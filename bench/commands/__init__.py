"""The commands of `python -m bench`: each module has a main(arguments), which returns the exit status."""
