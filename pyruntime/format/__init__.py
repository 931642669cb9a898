"""The runtime format: what a model folder holds, how it is made, read and described."""
