"""Files of rows: their kinds, how they are opened, and their rows one by one, each with its values or its error."""
