"""Accuracy: run the parity record, compare, judge, remember and choose."""
