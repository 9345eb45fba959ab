"""Measurements that can be repeated; each checks its results before it prints a time."""
