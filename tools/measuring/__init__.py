"""What tools/measure.py measures, a module each; what they share is in common.py."""
