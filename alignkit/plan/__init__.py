"""What a stage will do and need, before it runs: `alignkit plan` and `dry_run=true`. JSON and rows are read, no torch.

- `shape`: a model's parameters and matrices, from its config.json
- `counts`: rows, tokens, sequences, optimizer steps
- `compute`: FLOPs and hours
- `memory`: bytes a rank in each phase
- `fit`: what to change where that is too much
- `text`: all of it in words
"""
