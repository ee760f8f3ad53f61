"""Every model type of transformers, small and random, against an eager loop and itself streamed.

    python -m tests.architectures --json found.json [MODEL_TYPE ...]

Nothing here knows a model: configurations are made small by the names of their fields, batches
come from the signature of `forward`.
"""
