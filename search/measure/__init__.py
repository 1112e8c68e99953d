"""What a model costs and how accurate it is: MACs, parameters, memory, latency and correctness.

`macs` is part of the library's public interface. The modules:

- `closed_form`: MACs of a recipe from its shapes, without running it
- `fvcore_macs`: the same count by fvcore on a traced forward; the only import of fvcore
- `counting`: the counting conventions of published sources
- `memory`, `timing`, `latency_table`: peak memory, latency, block latencies for NViT
- `latency`: the records of a latency and of the target that it holds for
- `accuracy`: per-image correctness on a split

May import `methods`, `search.files` and `search.data`; not Ray, Optuna, MLflow, ONNX, models or a
study. Only `fvcore_macs` imports fvcore, so that importing this package stays fast.
"""

from vitpareto.search.measure.closed_form import macs

__all__ = ["macs"]
