"""Models: loading by name, the embedded model, published checkpoint layouts, trained weights by
digest, and models that workers map.

Imports `search.data` and `search.files`; no Ray, Optuna, MLflow or ONNX. It measures nothing and
trains nothing.
"""
