"""What is looked at before anything starts: config files, rows, models, reward models. No torch."""
