"""A checked config becomes finished run folders: inputs, stages in order, stages shared, lineage, sweeps."""
