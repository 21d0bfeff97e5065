"""The safety-utility benchmark: scenarios, methods, one cell, the grid, the report."""
