"""The mathematics of the paper. Needs torch alone; an export carries these files."""
