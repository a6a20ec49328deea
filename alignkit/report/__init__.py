"""What came of runs: summaries, pages, report cards, comparisons and diagnoses."""
