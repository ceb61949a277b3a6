"""What tools/crash_test.py is made of: the command that it watches and kills, and its accounts."""
