"""A checked config becomes finished run folders: inputs, stages in order, stages shared, lineage, sweeps."""

from alignkit.core import lazy

__all__, __getattr__ = lazy.names(
    __name__,
    {
        "run_pipeline": "stage",
        "run_stage": "stage",
    },
    ("pipeline.stage", "pipeline.inputs"),
)
