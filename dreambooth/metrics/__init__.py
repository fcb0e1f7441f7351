"""Pure scores of features and pixels, the table that names them all, and their shells for torchmetrics."""
