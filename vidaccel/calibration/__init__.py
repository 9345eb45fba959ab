"""Calibration: a plan with little error within a budget, for one model on one device."""
