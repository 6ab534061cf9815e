"""Classification of rows of text by the log-probability a model gives to each label."""
