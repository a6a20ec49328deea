"""A run on disk: its folder and manifest, the hashes of what lies in it, and who works there. No torch."""

from alignkit.core import lazy

__all__, __getattr__ = lazy.names(
    __name__,
    {
        "model_hash": "hashes",
        "read_manifest": "manifests",
        "write_manifest": "manifests",
    },
)
