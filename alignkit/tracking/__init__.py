"""What a run says: numbers and samples in files, a tracker if one is wanted, one live line in the terminal."""
