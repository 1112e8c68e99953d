"""Runtimes of a model: eager, compiled, CUDA graph, torch.export and onnxruntime.

Only this room and `search.export` may import onnx and onnxruntime, and do so when a program is
written or run. May import `methods` and `search.errors`, and no other room.
"""
