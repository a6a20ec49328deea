"""What came of runs: summaries, pages, report cards, comparisons and diagnoses."""

from alignkit.core import lazy

__all__, __getattr__ = lazy.names(
    __name__,
    {
        "RunFolder": "summary",
        "summarize": "summary",
    },
    ("report.summary",),
)
