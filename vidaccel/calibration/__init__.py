"""Calibration: the plan with the least error within a budget, for one model on one device."""
