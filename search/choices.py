"""Names that a job chooses from, where the code that implements them imports a heavy package.

The command declares its options from these without importing torch, Optuna or onnxruntime.
Imports nothing.
"""

from __future__ import annotations

#: dtypes of a model and its images (`search.measure.accuracy`)
DTYPES = ("float32", "bfloat16", "float16")
#: what runs a model whose latency is measured (`search.runtimes.backends`)
RUNTIMES = ("eager", "compiled", "cudagraph", "onnxruntime")
#: what proposes trials (`search.study.samplers`)
SAMPLERS = ("tpe", "nsga2", "random")
#: what a search can optimise (`search.study.results` describes each)
SEARCHABLE_OBJECTIVES = ("top1", "top5", "gmacs", "params_m", "latency_ms", "peak_mb")
