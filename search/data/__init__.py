"""Images with labels: datasets by folder or name, splits, order, decoding, the embedded images.

Imports `search.files`; no Ray, Optuna, MLflow or ONNX, and no models. `datasets.open_data` is the
entry point. It draws no conclusions from images and changes no user's file.
"""
