"""Jobs: files of rows labelled overnight, stopped and gone on with at any point, each row once in the output."""
