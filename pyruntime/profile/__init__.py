"""Calibration of budgets, and what a budget costs in accuracy and saves in work and in time."""
