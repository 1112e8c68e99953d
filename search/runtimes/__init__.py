"""Runtimes of a model: eager, compiled, CUDA graph, torch.export and onnxruntime.

May import `methods` and `search.errors`; onnx and onnxruntime are imported here and in
`search.export` only, and only when a program is written or run.
"""
