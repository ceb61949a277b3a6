"""What every room stands on: files, settings, ranks, signals and words to the user."""
